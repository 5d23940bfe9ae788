"""Tokens of a Kubernetes service account, their keys fetched over HTTPS as a pod fetches them from its cluster."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from fq_identity import Authority

from flightquant.errors import UnauthenticatedError
from flightquant.server import jwks
from flightquant.server.app import make_gate
from flightquant.server.auth import Gate
from flightquant.server.config import ConfigError, ServerConfig

ISSUER, AUDIENCE, POD_TOKEN = "https://kubernetes.default.svc.cluster.local", "flightquant", "pod-token"
ELSEWHERE = "/elsewhere"


def key_set(keys: dict[str, rsa.RSAPrivateKey]) -> bytes:
    """As an API server's ``/openid/v1/jwks`` has it."""
    shown = []
    for name, key in keys.items():
        public = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
        shown.append({"use": "sig", "kty": "RSA", "kid": name, "alg": "RS256", "n": public["n"], "e": public["e"]})
    return json.dumps({"keys": shown}).encode()


class Cluster:
    """An API server's key set, and the tokens that it would project into a pod."""

    def __init__(self, authority: Authority) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.asked: list[str] = []
        self.moved = False
        self.rotate("first")
        pair, cluster = authority.issue_server(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cluster.asked.append(f"{self.path} {self.headers['Authorization']}")
                body = key_set(cluster.keys)
                allowed = self.headers["Authorization"] == f"Bearer {POD_TOKEN}"
                self.send_response((302 if cluster.moved else 200) if allowed else 401)
                if cluster.moved:
                    self.send_header("Location", ELSEWHERE)
                    cluster.moved = False
                self.send_header("Content-Type", "application/jwk-set+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.address = f"https://127.0.0.1:{self.http.server_port}/openid/v1/jwks"

    def rotate(self, name: str) -> None:
        """Sign by another key from now on; the set has the old ones too."""
        self.keys[name] = rsa.generate_private_key(65537, 2048)
        self.signing = name

    def token(self, **changed: Any) -> str:
        """What ``projected.sources.serviceAccountToken`` puts into a file, but for the claims that are given."""
        now = int(time.time())
        claims = {
            "aud": [AUDIENCE],
            "exp": now + 3607,
            "iat": now,
            "iss": ISSUER,
            "jti": "0e6a2d0a-7f0b-4a51-9f7e-3b1d1b8b6a0c",
            "kubernetes.io": {
                "namespace": "ml",
                "node": {"name": "node-1", "uid": "8d0e1f9c-2b7d-4c0f-a9be-5a7e5a3cfb11"},
                "pod": {"name": "trainer-0", "uid": "4c1b0a7e-90a5-44f4-8a53-6a1f43c7ad52"},
                "serviceaccount": {"name": "trainer", "uid": "be11d2f2-3f3c-4b6a-8f7d-0e6c2f6d7a90"},
                "warnafter": now + 3607 - 60,
            },
            "nbf": now,
            "sub": "system:serviceaccount:ml:trainer",
        }
        return jwt.encode({**claims, **changed}, self.keys[self.signing], "RS256", headers={"kid": self.signing})


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("cluster"), "cluster-ca")


@pytest.fixture
def cluster(authority: Authority) -> Iterator[Cluster]:
    cluster = Cluster(authority)
    thread = threading.Thread(target=cluster.http.serve_forever)
    thread.start()
    yield cluster
    cluster.http.shutdown()
    thread.join()
    cluster.http.server_close()


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """The server's own token, which asks for the key set."""
    file = tmp_path / "token"
    file.write_text(f"{POD_TOKEN}\n")
    return file


def gate_of(cluster: Cluster, ca_file: Path | None, token_file: Path | None) -> Gate:
    return make_gate(
        ServerConfig(
            location="grpc://127.0.0.1:0",
            jwt_jwks=cluster.address,
            jwt_issuer=ISSUER,
            jwt_audience=AUDIENCE,
            jwt_ca_file=ca_file,
            jwt_token_file=token_file,
        )
    )


def headers(token: str) -> dict[str, list[str]]:
    return {"authorization": [f"Bearer {token}"]}


def test_a_service_account_is_known_by_its_name(cluster: Cluster, authority: Authority, pod: Path) -> None:
    gate = gate_of(cluster, authority.file, pod)
    identity = gate.identify(headers(cluster.token()))
    assert identity.name == "system:serviceaccount:ml:trainer"
    identity.require("quantize", "DoExchange")
    assert cluster.asked == [f"/openid/v1/jwks Bearer {POD_TOKEN}"], "fetched once, at the start"


def test_a_pod_that_was_given_other_tokens_is_refused(cluster: Cluster, authority: Authority, pod: Path) -> None:
    gate = gate_of(cluster, authority.file, pod)
    now = int(time.time())
    for changed, why in (
        ({"aud": [ISSUER]}, "for another audience"),
        ({"iss": "https://kubernetes.default.svc"}, "of another issuer"),
        ({"exp": now - 3600}, "expired"),
        ({"nbf": now + 3600}, "not valid"),
    ):
        with pytest.raises(UnauthenticatedError, match=why):
            gate.identify(headers(cluster.token(**changed)))


def test_the_cluster_changes_its_key(
    cluster: Cluster, authority: Authority, pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "RETRY_S", 0.0)
    gate = gate_of(cluster, authority.file, pod)
    old = cluster.token()
    cluster.rotate("second")
    for token in (cluster.token(), old, cluster.token()):
        gate.identify(headers(token))
    assert len(cluster.asked) == 2, "once more, for the key that was not known"


def test_keys_come_from_the_cluster_alone(
    cluster: Cluster, authority: Authority, pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another authority, no token, or an answer that sends elsewhere: no start."""
    for ca_file, token_file in ((None, pod), (Authority(tmp_path, "another").file, pod), (authority.file, None)):
        with pytest.raises(ConfigError, match="cannot read the key set"):
            gate_of(cluster, ca_file, token_file)
    cluster.moved, cluster.asked = True, []
    with pytest.raises(ConfigError, match="cannot read the key set"):
        gate_of(cluster, authority.file, pod)
    assert not any(asked.startswith(ELSEWHERE) for asked in cluster.asked)
    monkeypatch.setattr(jwks, "MAX_JWKS_BYTES", 100)
    with pytest.raises(ConfigError, match="cannot read the key set"):
        gate_of(cluster, authority.file, pod)
