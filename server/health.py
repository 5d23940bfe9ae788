"""``grpc.health.v1`` on a port of its own: pyarrow's Flight server has no health service."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

SERVICES = ("", "flightquant")
THREADS = 4


class Health:
    """Answers whether this server may be sent calls: no until :meth:`ready`, no again after :meth:`drain`.

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
        for service in SERVICES:
            self._servicer.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
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
        for service in SERVICES:
            self._servicer.set(service, health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """No more calls, for good."""
        self._servicer.enter_graceful_shutdown()

    def close(self) -> None:
        """Stop answering."""
        self._server.stop(grace=None).wait()
