"""Certificates, keys and tokens for tests: authorities of our own, nothing that anybody else trusts."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ISSUER, AUDIENCE = "https://issuer.test", "flightquant"


def token_line(name: str, token: str, roles: str = "") -> str:
    """An entry of a token file."""
    return f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()} {roles}\n"


@dataclass
class Pair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates, into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._name, self._key.public_key(), [], ca=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, subject: x509.Name, key: Any, names: list[x509.GeneralName], *, ca: bool, days: int = 1) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, name: str, sans: list[x509.GeneralName] | None = None, days: int = 1) -> Pair:
        """A certificate of this common name; expired with negative days."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key.public_key(), sans or [], ca=False, days=days)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def issue_server(self, name: str = "server") -> Pair:
        """A certificate for this machine's loopback address."""
        return self.issue(name, [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])


class Issuer:
    """Signs JWTs and writes its public keys as a key set."""

    def __init__(self, jwks: Path) -> None:
        self.jwks = jwks
        self._keys: dict[str, ec.EllipticCurvePrivateKey] = {}

    def rotate(self, key_id: str) -> None:
        """Sign by a new key from now on; the set names this key alone."""
        self._keys[key_id] = ec.generate_private_key(ec.SECP256R1())
        public = jwt.algorithms.ECAlgorithm.to_jwk(self._keys[key_id].public_key(), as_dict=True)
        self.jwks.write_text(json.dumps({"keys": [{**public, "kid": key_id, "alg": "ES256", "use": "sig"}]}))

    def token(self, key_id: str, **changed: Any) -> str:
        """A good token, but for the claims that are given; None drops one."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "system:serviceaccount:ml:trainer",
            "iat": now,
            "exp": now + 60,
        }
        claims = {name: value for name, value in {**claims, **changed}.items() if value is not None}
        return jwt.encode(claims, self._keys[key_id], "ES256", headers={"kid": key_id})
