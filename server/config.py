"""The server's options: one frozen dataclass, checked once, passed down to whatever needs it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from flightquant.cython_core.engine import Limits
from flightquant.server.auth import parse_roles
from flightquant.server.memory import memory_limit

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("json", "text")
PLAIN_SCHEMES = ("grpc", "grpc+tcp")
TLS_SCHEME = "grpc+tls"

MEMORY_SHARE = 4
"""One part in this many of the memory limit may be batches: a message costs twice its size while it is received, its
answer may be as large, and the allocators keep some of what they freed."""


ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures by a private key alone: with a shared secret whoever checks a token could make one."""


class ConfigError(ValueError):
    """An option that cannot be: the message names it, what was given and what is allowed."""


def default_bytes_in_flight(root: Path = Path("/")) -> int:
    """Bytes of batches that the process may hold at once: a quarter of its own memory limit."""
    return max(memory_limit(root) // MEMORY_SHARE, 64 << 20)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything that an operator can choose.

    Attributes
    ----------
    location : str
        ``grpc://host:port`` to listen on; port 0 picks a free one. Metrics and health listen on the same host.
    metrics_port, health_port : int
        Ports of Prometheus' HTTP endpoint and of ``grpc.health.v1``; 0 picks a free one.
    threads : int or None
        Compute threads of the whole process; None takes what the cgroup and the CPU mask allow.
    grace_s : float
        Seconds that running calls have to end after the drain delay.
    drain_delay_s : float
        Seconds between "not ready" and the end of listening, for load balancers to notice.
    limits : Limits
        The largest rows, layers, batches and calls.
    max_calls : int
        Calls at once; one more is refused before its body is read.
    max_bytes_in_flight : int
        Bytes of received batches held at once: over it new calls are refused and running ones wait before they read.
    max_queued : int
        Calls that may wait to be let in.
    queue_timeout_s : float
        The longest that one may wait.
    call_timeout_s, idle_timeout_s : float
        The longest that one call may take, and that its client may be silent.
    liveness_timeout_s : float
        Seconds in which no call comes through, after which the server says that it is not alive.
    tls_cert, tls_key : Path or None
        The server's certificate chain and its key, PEM files, for a ``grpc+tls://`` location; read once, at the start.
    tls_client_ca : Path or None
        Authorities of client certificates: with it every client must show one.
    token_file : Path or None
        Bearer tokens: see :class:`flightquant.server.auth.TokenFile`.
    jwt_jwks, jwt_issuer, jwt_audience, jwt_algorithms, jwt_roles_claim, jwt_ca_file, jwt_token_file
        Bearer tokens that are JWTs: see :class:`flightquant.server.jwks.JwtRules`.
    source_root, sink_root : tuple of Path
        Folders from which stored sources may be read, and into which they may be converted; none by default.
    default_roles : str
        Roles, separated by commas, of an identity that comes without any.
    otlp_endpoint : str or None
        Where OpenTelemetry spans go over OTLP/HTTP, such as ``http://collector:4318/v1/traces``.
    log_level, log_format : str
        One of :data:`LOG_LEVELS` and of :data:`LOG_FORMATS`.

    Raises
    ------
    ConfigError
        A value is out of its range.
    """

    location: str = "grpc://127.0.0.1:8815"
    metrics_port: int = 9464
    health_port: int = 8816
    threads: int | None = None
    grace_s: float = 25.0
    drain_delay_s: float = 0.0
    limits: Limits = field(default_factory=Limits)
    max_calls: int = 128
    max_bytes_in_flight: int = field(default_factory=default_bytes_in_flight)
    max_queued: int = 64
    queue_timeout_s: float = 2.0
    call_timeout_s: float = 3600.0
    idle_timeout_s: float = 600.0
    liveness_timeout_s: float = 60.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    jwt_jwks: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    jwt_algorithms: str = "RS256,ES256"
    jwt_roles_claim: str = "roles"
    jwt_ca_file: Path | None = None
    jwt_token_file: Path | None = None
    source_root: tuple[Path, ...] = ()
    sink_root: tuple[Path, ...] = ()
    default_roles: str = "quantize"
    otlp_endpoint: str | None = None
    log_level: str = "info"
    log_format: str = "json"

    def __post_init__(self) -> None:
        self._check_location()
        for name in ("metrics_port", "health_port"):
            self._check(name, 0 <= getattr(self, name) <= 65535, "a port from 0 to 65535")
        self._check("threads", self.threads is None or 1 <= self.threads <= 1024, "1 to 1024, or none")
        self._check("grace_s", 0 <= self.grace_s <= 86400, "0 to 86400 seconds")
        self._check("drain_delay_s", 0 <= self.drain_delay_s <= 3600, "0 to 3600 seconds")
        self._check("max_calls", 1 <= self.max_calls <= 100_000, "1 to 100000")
        self._check("max_bytes_in_flight", self.max_bytes_in_flight >= 1, "at least 1 byte")
        self._check("call_timeout_s", 0 < self.call_timeout_s <= 7 * 86400, "more than 0 and at most 604800 seconds")
        self._check("max_queued", 0 <= self.max_queued <= 10_000, "0 to 10000")
        self._check("queue_timeout_s", 0 <= self.queue_timeout_s <= 600, "0 to 600 seconds")
        self._check("idle_timeout_s", 0 < self.idle_timeout_s <= 7 * 86400, "more than 0 and at most 604800 seconds")
        self._check("liveness_timeout_s", 0 < self.liveness_timeout_s <= 3600, "more than 0 and at most 3600 seconds")
        self._check("log_level", self.log_level in LOG_LEVELS, "one of " + ", ".join(LOG_LEVELS))
        self._check("log_format", self.log_format in LOG_FORMATS, "one of " + ", ".join(LOG_FORMATS))
        self._check_tls()
        self._check_identity()
        self._check_otlp()
        for name in ("source_root", "sink_root"):
            self._check(name, all(map(Path.is_dir, getattr(self, name))), "folders that exist")
        for limit in fields(self.limits):
            value = getattr(self.limits, limit.name)
            if value is not None and value < 1:
                raise ConfigError(f"limits.{limit.name} is {value}; expected at least 1")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def _check_location(self) -> None:
        expected = "grpc://host:port, such as grpc://127.0.0.1:8815, or grpc+tls://host:port"
        try:
            parts = urlsplit(self.location)
            good = parts.scheme in (*PLAIN_SCHEMES, TLS_SCHEME) and parts.hostname and parts.port is not None
        except ValueError:
            good = False
        self._check("location", bool(good) and not (parts.path or parts.query or parts.username), expected)

    def _check_tls(self) -> None:
        """All of TLS or nothing of it: half a configuration must not end as a server that speaks in the clear."""
        scheme = urlsplit(self.location).scheme
        given = [name for name in ("tls_cert", "tls_key") if getattr(self, name) is not None]
        if scheme != TLS_SCHEME:
            for name in (*given, *(["tls_client_ca"] if self.tls_client_ca else [])):
                self._check(name, False, f"none with location {self.location}, or a location {TLS_SCHEME}://host:port")
            return
        for name in ("tls_cert", "tls_key"):
            self._check(name, name in given, f"a PEM file, since the location is {TLS_SCHEME}://")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert or "", self.tls_key, password=lambda: "")
        except (OSError, ValueError) as error:
            self._check("tls_cert", False, f"a PEM certificate that fits tls_key {self.tls_key} ({_reason(error)})")
        if self.tls_client_ca is not None:
            try:
                context.load_verify_locations(self.tls_client_ca)
            except (OSError, ValueError) as error:
                self._check("tls_client_ca", False, f"a PEM file of authorities ({_reason(error)})")

    def _check_identity(self) -> None:
        try:
            parse_roles(self.default_roles, frozenset())
        except ValueError as error:
            self._check("default_roles", False, str(error))
        jwt = ("jwt_jwks", "jwt_issuer", "jwt_audience")
        given = [name for name in jwt if getattr(self, name)]
        for name in jwt if given else ():
            self._check(name, name in given, f"a value, since {given[0]} is given")
        for name in ("jwt_ca_file", "jwt_token_file"):
            self._check(name, getattr(self, name) is None or bool(given), "none without jwt_jwks")
        scheme = urlsplit(self.jwt_jwks or "").scheme
        self._check("jwt_jwks", scheme in ("", "https"), "a file or an https:// address")
        algorithms = self.jwt_algorithms.split(",")
        allowed = set(algorithms) <= set(ALGORITHMS)
        self._check("jwt_algorithms", allowed, f"some of {','.join(ALGORITHMS)}: private keys only")

    def _check_otlp(self) -> None:
        parts = urlsplit(self.otlp_endpoint or "http://localhost")
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        self._check("otlp_endpoint", good, "an address such as http://collector:4318/v1/traces")

    @property
    def roles(self) -> frozenset[str]:
        """The default roles."""
        return parse_roles(self.default_roles, frozenset())

    @property
    def tls(self) -> bool:
        """Whether the location speaks TLS."""
        return urlsplit(self.location).scheme == TLS_SCHEME

    @property
    def host(self) -> str:
        """The host of the location, in brackets if it is an IPv6 address."""
        host = urlsplit(self.location).hostname or ""
        return f"[{host}]" if ":" in host else host


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
