"""``grpc.health.v1`` on a port of its own: pyarrow's Flight server has no health service."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

SERVICES = ("", "flightquant")
LIVENESS = "liveness"
"""Says whether the process does what it should or has to be replaced; serving from the start, and while it drains."""
THREADS = 4


class Health:
    """Answers whether this server may be sent calls: no until :meth:`ready`, no again after :meth:`drain`.

    The service :data:`LIVENESS` answers whether it is alive; while it is not, it may be sent no calls either.

    Parameters
    ----------
    host : str
        Where to listen; an IPv6 address in brackets.
    port : int
        0 picks a free one.

    Raises
    ------
    OSError
        The port cannot be had.
    """

    def __init__(self, host: str, port: int) -> None:
        self._servicer = health.HealthServicer(
            experimental_non_blocking=True,
            experimental_thread_pool=ThreadPoolExecutor(THREADS, thread_name_prefix="health-watch"),
        )
        self._lock = Lock()
        self._ready, self._draining, self._alive = False, False, True
        self._tell()
        # Without this option two servers share a port in silence.
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="health"), options=[("grpc.so_reuseport", 0)]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self.port: int = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise OSError(f"cannot listen on {host}:{port} for health checks") from None
        self.address = f"{host}:{self.port}"
        self._server.start()

    def ready(self) -> None:
        """Calls may come."""
        with self._lock:
            self._ready = True
            self._tell()

    def drain(self) -> None:
        """No more calls, for good."""
        with self._lock:
            self._draining = True
            self._tell()

    def alive(self, alive: bool) -> None:
        """Whether calls come through."""
        with self._lock:
            self._alive = alive
            self._tell()

    def _tell(self) -> None:
        states = health_pb2.HealthCheckResponse
        told = dict.fromkeys(SERVICES, self._ready and self._alive and not self._draining)
        for service, serving in (told | {LIVENESS: self._alive}).items():
            self._servicer.set(service, states.SERVING if serving else states.NOT_SERVING)

    def close(self) -> None:
        """Stop answering."""
        self._server.stop(grace=None).wait()
