"""``grpc.health.v1``, asked with grpcio's own client."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flightquant.cython_core.engine import Engine
from flightquant.server.app import Server
from flightquant.server.config import ServerConfig
from flightquant.server.health import SERVICES, Health

Status = health_pb2.HealthCheckResponse


def check(address: str, service: str) -> int:
    """The service's state."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        return status


@pytest.mark.parametrize("service", ["", "flightquant"])
def test_a_running_server_is_ready(server: Server, service: str) -> None:
    assert check(server.health_address, service) == Status.SERVING


def test_an_unknown_service(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(server.health_address, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_not_ready_ready_draining() -> None:
    health = Health("127.0.0.1", 0)
    try:
        with grpc.insecure_channel(health.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="flightquant"), timeout=20
            )
            assert {check(health.address, name) for name in SERVICES} == {Status.NOT_SERVING}
            assert next(watch).status == Status.NOT_SERVING
            health.ready()
            assert {check(health.address, name) for name in SERVICES} == {Status.SERVING}
            assert next(watch).status == Status.SERVING
            health.drain()
            assert next(watch).status == Status.NOT_SERVING
            health.ready()
            assert {check(health.address, name) for name in SERVICES} == {Status.NOT_SERVING}
            watch.cancel()
    finally:
        health.close()


def test_a_port_that_is_taken(server: Server) -> None:
    port = int(server.health_address.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        Health("127.0.0.1", port)


class ColdEngine(Engine):
    """An engine whose first use takes as long as the test wants."""

    def __init__(self) -> None:
        super().__init__(n_threads=1)
        self.used, self.warm = threading.Event(), threading.Event()

    def session(self, *args: Any, **options: Any) -> Any:
        self.used.set()
        assert self.warm.wait(30)
        return super().session(*args, **options)


def test_a_server_is_not_ready_before_its_kernels_are_warm() -> None:
    engine = ColdEngine()
    server = Server(ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=1.0), engine)
    starting = threading.Thread(target=server.startup)
    starting.start()
    try:
        assert engine.used.wait(30)
        assert check(server.health_address, "flightquant") == Status.NOT_SERVING
        assert not hasattr(server, "location")
        engine.warm.set()
        starting.join()
        assert check(server.health_address, "flightquant") == Status.SERVING
    finally:
        engine.warm.set()
        starting.join()
        server.shutdown()
        engine.close()
