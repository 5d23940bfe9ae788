"""The server's options: one frozen dataclass, checked once, passed down to whatever needs it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from flightquant.cython_core.engine import Limits
from flightquant.server.memory import memory_limit

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("json", "text")
LOCATION_SCHEMES = ("grpc", "grpc+tcp")

MEMORY_SHARE = 4
"""One part in this many of the memory limit may be batches: a message costs twice its size while it is received, its
answer may be as large, and the allocators keep some of what they freed."""


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
    call_timeout_s : float
        The longest that one call may take.
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
    call_timeout_s: float = 3600.0
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
        self._check("log_level", self.log_level in LOG_LEVELS, "one of " + ", ".join(LOG_LEVELS))
        self._check("log_format", self.log_format in LOG_FORMATS, "one of " + ", ".join(LOG_FORMATS))
        for limit in fields(self.limits):
            value = getattr(self.limits, limit.name)
            if value is not None and value < 1:
                raise ConfigError(f"limits.{limit.name} is {value}; expected at least 1")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def _check_location(self) -> None:
        expected = "grpc://host:port, such as grpc://127.0.0.1:8815"
        try:
            parts = urlsplit(self.location)
            good = parts.scheme in LOCATION_SCHEMES and parts.hostname and parts.port is not None
        except ValueError:
            good = False
        self._check("location", bool(good) and not (parts.path or parts.query or parts.username), expected)

    @property
    def host(self) -> str:
        """The host of the location, in brackets if it is an IPv6 address."""
        host = urlsplit(self.location).hostname or ""
        return f"[{host}]" if ":" in host else host
