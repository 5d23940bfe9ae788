"""JSON Web Tokens: signature by a key set that may rotate, issuer, audience, time, allowed algorithms.

A Kubernetes service-account token is one: issuer and keys are the cluster's, the audience is chosen by the pod.
"""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt

from flightquant.errors import UnauthenticatedError
from flightquant.server.auth import ROLES, Identity, Watch

log = logging.getLogger("flightquant.server")

REFRESH_S = 300.0
RETRY_S = 10.0
"""A key that is not known makes the set be fetched again, but not more often than this."""
FETCH_TIMEOUT_S = 5.0
MAX_JWKS_BYTES = 1 << 20
LEEWAY_S = 30.0


@dataclass(frozen=True, slots=True)
class JwtRules:
    """What a token must say.

    Attributes
    ----------
    jwks : str
        Where the key set is: a file, or an ``https://`` address.
    issuer, audience : str
    algorithms : tuple of str
        Of :data:`flightquant.server.config.ALGORITHMS`.
    roles_claim : str
        The claim that lists roles; a token without it has the default ones.
    ca_file, token_file : Path or None
        For an address: the authorities that its certificate is checked by, and a bearer token to ask with (both as a
        Kubernetes pod finds them).
    """

    jwks: str
    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    roles_claim: str = "roles"
    ca_file: Path | None = None
    token_file: Path | None = None


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no answer that sends elsewhere: this pod's token would go there, perhaps without TLS."""

    def redirect_request(self, *_: Any) -> None:
        """The answer stays an error."""


class Keys:
    """A key set, read again when its file changes, its time is over, or a token names a key that is not in it."""

    def __init__(self, rules: JwtRules) -> None:
        self._rules = rules
        self._is_file = urlsplit(rules.jwks).scheme not in ("http", "https")
        self._watch = Watch(Path(rules.jwks))
        self._lock = threading.Lock()
        self._tried = -RETRY_S
        self._got = 0.0
        self._keys: dict[str | None, Any] = {}

    def load(self) -> None:
        """Read the set now.

        Raises
        ------
        ValueError
            It cannot be had, or is none.
        """
        self._tried = time.monotonic()
        try:
            raw = Path(self._rules.jwks).read_bytes() if self._is_file else self._fetch()
            found = jwt.PyJWKSet.from_dict(json.loads(raw)).keys
        except (OSError, ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
            raise ValueError(f"cannot read the key set {self._rules.jwks}: {type(error).__name__}") from None
        self._keys = {key.key_id: key for key in found}
        self._got = self._tried

    def _fetch(self) -> bytes:
        request = urllib.request.Request(self._rules.jwks)  # noqa: S310 - checked by the configuration
        if self._rules.token_file is not None:
            request.add_header("Authorization", f"Bearer {self._rules.token_file.read_text().strip()}")
        context = ssl.create_default_context(cafile=self._rules.ca_file)
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Stay)
        with opener.open(request, timeout=FETCH_TIMEOUT_S) as answer:
            raw: bytes = answer.read(MAX_JWKS_BYTES)
        return raw

    def find(self, key_id: str | None) -> Any | None:
        """The key of this id; None if the set, read again if need be, has none.

        Only who needs a key that is not there waits while the set is read: a slow address keeps nobody else out.
        """
        missing, old = key_id not in self._keys, self._is_old()
        if (missing or old) and self._lock.acquire(blocking=missing or self._is_file):
            try:
                if old or (key_id not in self._keys and self._may_ask()):
                    self.load()
            except ValueError as error:
                log.error("key set", extra={"fields": {"error": str(error)}})
            finally:
                self._lock.release()
        return self._keys.get(key_id)

    def _may_ask(self) -> bool:
        return time.monotonic() - self._tried > RETRY_S

    def _is_old(self) -> bool:
        if self._is_file:
            return self._watch.changed()
        return time.monotonic() - self._got > REFRESH_S and self._may_ask()


class JwtVerifier:
    """Verifies tokens by :class:`JwtRules`.

    Raises
    ------
    ValueError
        The key set cannot be read at the start.
    """

    def __init__(self, rules: JwtRules, default: frozenset[str]) -> None:
        self._rules = rules
        self._default = default
        self._keys = Keys(rules)
        self._keys.load()

    def verify(self, token: str) -> Identity | None:
        """The token's subject; None for what has not the form of a JWT."""
        if token.count(".") != 2:
            return None
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            return None
        rules = self._rules
        if header.get("alg") not in rules.algorithms:
            raise _refused(f"signed by an algorithm that is not allowed; expected {' or '.join(rules.algorithms)}")
        key = self._keys.find(header.get("kid"))
        if key is None:
            raise _refused("signed by a key that is not known here")
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(rules.algorithms),
                audience=rules.audience,
                issuer=rules.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            return Identity(str(claims["sub"])[:256], _roles(claims.get(rules.roles_claim), self._default))
        except jwt.ExpiredSignatureError:
            raise _refused("expired") from None
        except jwt.InvalidAudienceError:
            raise _refused("for another audience") from None
        except jwt.InvalidIssuerError:
            raise _refused("of another issuer") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise _refused("not valid") from None


def _roles(claim: object, default: frozenset[str]) -> frozenset[str]:
    """The roles that this server knows: a token may list others, for other services."""
    if claim is None:
        return default
    named = claim.split() if isinstance(claim, str) else claim
    return frozenset(ROLES) & frozenset(map(str, named if isinstance(named, list) else ()))


def _refused(why: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the bearer token is {why}", field="authorization")
