"""Who calls: bearer tokens of a file, JWTs, and what each identity may do. Decided on the headers, before any body.

Default deny: with any of these set up, a call of any method without a proven identity ends here, and a method or action
that no role names is nobody's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flightquant.errors import PermissionDeniedError, UnauthenticatedError

ROLES = ("quantize", "sources")
"""``quantize``: exchanges and the actions that tell about them. ``sources``: stored sources and sinks of the server."""

ACTION_ROLES: Mapping[str, str] = {
    "schemes": "quantize",
    "estimate": "quantize",
    "version": "quantize",
    "quantize_to": "sources",
}
METHOD_ROLES: Mapping[str, str] = {
    "DoExchange": "quantize",
    "DoAction": "quantize",
    "ListActions": "quantize",
    "GetFlightInfo": "sources",
    "DoGet": "sources",
}

RECHECK_S = 1.0
"""How often a file is looked at for a change, at most."""
MAX_HEADER_BYTES = 16 * 1024

_ENTRY = re.compile(r"(?P<name>[A-Za-z0-9._@:/-]{1,128})\s+sha256:(?P<digest>[0-9a-f]{64})(\s+(?P<roles>\S+))?")
_EXPECTED = 'expected "NAME sha256:HEX ROLE,ROLE", made by flightquant token NAME'


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, and what they may do."""

    name: str
    roles: frozenset[str]

    def require(self, role: str | None, what: str) -> None:
        """Refuse ``what``, a method or an action, to who has not its role; and to all if there is none for it (None).

        Raises
        ------
        PermissionDeniedError
        """
        if role not in self.roles:
            expected = f"the role {role}" if role else "something that is offered here"
            raise PermissionDeniedError(
                f'"{self.name}" may not use {what}; expected {expected}',
                field="role",
                expected=role,
            )


CERTIFICATE = "certificate"
"""Name of a caller that is known by its certificate alone, until the call's handler can read the certificate's name."""
EVERYONE = Identity("", frozenset(ROLES))
"""Who calls a server that asks for no identity."""


class Verifier(Protocol):
    """Turns a bearer token into an identity."""

    def verify(self, token: str) -> Identity | None:
        """Whose token this is; None if it is none of this verifier's.

        Raises
        ------
        UnauthenticatedError
            It is of this verifier's kind and does not hold.
        """


def parse_roles(text: str, default: frozenset[str]) -> frozenset[str]:
    """Roles separated by commas; the default for none.

    Raises
    ------
    ValueError
        A role is unknown.
    """
    roles = frozenset(part for part in text.split(",") if part)
    unknown = roles - set(ROLES)
    if unknown:
        raise ValueError(f'unknown role "{min(unknown)}"; expected {", ".join(ROLES)}')
    return roles or default


def new_token(name: str, roles: str) -> tuple[str, str]:
    """A fresh token of 256 random bits, and its line for a token file.

    Raises
    ------
    ValueError
        The name or a role cannot be.
    """
    token = secrets.token_urlsafe(32)
    named = ",".join(sorted(parse_roles(roles, frozenset())))
    line = f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()} {named}".strip()
    if not _ENTRY.fullmatch(line):
        raise ValueError(f"{name!r} is no name; expected letters, digits and . _ @ : / -")
    return token, line


class TokenFile:
    """Bearer tokens, each kept as the SHA-256 of a random token, in a file that is read again when it changes.

    A line is ``NAME sha256:HEX ROLE,ROLE``; empty lines and those that begin with ``#`` say nothing. Tokens are random
    and long (``flightquant token`` makes 256 bits), so that a fast hash is enough.

    Parameters
    ----------
    path : Path
    default : frozenset of str
        Roles of a line that names none.
    on_error : callable, optional
        Told why a changed file was not taken over.

    Raises
    ------
    ValueError
        The file cannot be read, or a line is none of these. A later change to such a file is not taken over: the tokens
        stay as they were and the log says why.
    """

    def __init__(self, path: Path, default: frozenset[str], on_error: Callable[[str], None] | None = None) -> None:
        self._path = path
        self._default = default
        self._watch = Watch(path)
        self._on_error = on_error
        self._watch.changed()
        self._entries = self._read()

    def _read(self) -> list[tuple[bytes, Identity]]:
        entries = []
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the token file {self._path}: {type(error).__name__}") from None
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            found = _ENTRY.fullmatch(line.strip())
            if found is None:
                raise ValueError(f"line {number} of the token file {self._path} is no entry; {_EXPECTED}")
            roles = parse_roles(found["roles"] or "", self._default)
            entries.append((bytes.fromhex(found["digest"]), Identity(found["name"], roles)))
        return entries

    def verify(self, token: str) -> Identity | None:
        """The identity whose token this is; every entry is compared, in constant time."""
        if self._watch.changed():
            try:
                self._entries = self._read()
            except ValueError as error:
                if self._on_error is not None:
                    self._on_error(str(error))
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for entry, identity in self._entries:
            if hmac.compare_digest(entry, digest):
                found = identity
        return found


class Watch:
    """Whether a file is another one than at the last look; Kubernetes swaps a link, editors a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._looked = -RECHECK_S
        self._seen: tuple[int, ...] | None = None

    def changed(self) -> bool:
        """True once for every change; looks at most every :data:`RECHECK_S`."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < RECHECK_S:
                return False
            self._looked = now
            try:
                stat = os.stat(self._path)
            except OSError:
                return False
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen == self._seen:
                return False
            self._seen = seen
            return True


class Gate:
    """Decides on a call's headers who calls.

    Parameters
    ----------
    verifiers : sequence of Verifier
        Asked in order. None at all: no header is asked for.
    certificates : bool
        Whether a client certificate was asked for: then a call without a header is its certificate's.
    default : frozenset of str
        Roles of a certificate.
    """

    def __init__(self, verifiers: Sequence[Verifier], certificates: bool, default: frozenset[str]) -> None:
        self._verifiers = verifiers
        self._certified = Identity(CERTIFICATE, default) if certificates else None

    def identify(self, headers: Mapping[str, Sequence[str | bytes]]) -> Identity:
        """Who calls.

        Raises
        ------
        UnauthenticatedError
            No identity, or one that does not hold.
        """
        if not self._verifiers:
            return self._certified or EVERYONE
        token = bearer_token(headers)
        for verifier in self._verifiers:
            identity = verifier.verify(token)
            if identity is not None:
                return identity
        raise UnauthenticatedError("the bearer token is not known here", field="authorization")


def bearer_token(headers: Mapping[str, Sequence[str | bytes]]) -> str:
    """The one bearer token of a call's headers.

    Raises
    ------
    UnauthenticatedError
        There is none, more than one, or it cannot be one.
    """
    values = headers.get("authorization", ())
    if len(values) != 1:
        got = "no" if not values else f"{len(values)}"
        raise UnauthenticatedError(
            f"the call has {got} authorization headers; expected one with a bearer token", field="authorization"
        )
    value = values[0].decode("latin-1") if isinstance(values[0], bytes) else values[0]
    kind, _, token = value.partition(" ")
    if kind.lower() != "bearer" or not token or not token.isascii() or len(token) > MAX_HEADER_BYTES:
        raise UnauthenticatedError(
            'the authorization header is none of "Bearer TOKEN" in ASCII',
            field="authorization",
            expected="Bearer TOKEN",
        )
    return token.strip()
