"""Liveness: a server whose calls no longer come through says so; a full one does not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fq_flight import eventually, fails, open_exchange, sample
from fq_identity import Authority
from fq_testing import request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pyarrow import flight

from flightquant.server.app import Server, running_server
from flightquant.server.config import ServerConfig
from flightquant.server.health import LIVENESS
from flightquant.server.liveness import PULSE_HEADER, Liveness
from flightquant.server.service import QuantService

BATCH = request({"a": np.ones((1, 32), np.float32)})
COMMAND = {"scheme": "int8"}
Status = health_pb2.HealthCheckResponse


def check(address: str, service: str) -> int:
    """The service's state."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status
        return status


class Handlers:
    """Stands before the handler that a pulse reaches: counts, and stops it when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.reached = 0
        real = QuantService.list_actions

        def list_actions(service: QuantService, context: Any) -> list[tuple[str, str]]:
            self.free.wait(60)
            self.reached += 1
            return real(service, context)

        monkeypatch.setattr(QuantService, "list_actions", list_actions)


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handlers]:
    made = Handlers(monkeypatch)
    yield made
    made.free.set()


@contextmanager
def serving(timeout_s: float, location: str = "grpc://127.0.0.1:0", **options: Any) -> Iterator[Server]:
    config = ServerConfig(
        location=location, metrics_port=0, health_port=0, grace_s=5.0, liveness_timeout_s=timeout_s, **options
    )
    with running_server(config) as server:
        yield server


def test_a_server_whose_handlers_are_stuck_is_neither_alive_nor_ready(handlers: Handlers) -> None:
    with serving(0.6) as server:
        eventually(lambda: handlers.reached > 0)
        handlers.free.clear()
        eventually(lambda: check(server.health_address, LIVENESS) == Status.NOT_SERVING)
        assert check(server.health_address, "") == Status.NOT_SERVING
        handlers.free.set()
        eventually(lambda: check(server.health_address, LIVENESS) == Status.SERVING)
        assert check(server.health_address, "") == Status.SERVING


def test_a_full_server_is_alive_and_its_calls_to_itself_count_nowhere(handlers: Handlers) -> None:
    with (
        serving(9.0, max_calls=1, max_queued=0) as server,
        flight.connect(server.location) as client,
        open_exchange(client, COMMAND, BATCH.schema) as (writer, reader),
    ):
        writer.write_batch(BATCH)
        reader.read_chunk()
        assert fails(client, COMMAND, schema=BATCH.schema).extra["code"] == "overloaded"
        eventually(lambda: handlers.reached >= 2)
        assert check(server.health_address, LIVENESS) == Status.SERVING
        assert server.admission.peak_calls == 1
        assert sample(server, "refusals_total", code="overloaded") == 1


def test_a_port_that_answers_nobody_is_noticed() -> None:
    """The kernel takes connections to a listening port that nobody accepts: only the silence tells."""
    told: list[bool] = []
    liveness = Liveness(0.6, told.append)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        liveness.start(f"grpc://127.0.0.1:{silent.getsockname()[1]}", certified=False)
        eventually(lambda: told == [False])
        liveness.stop()


@pytest.mark.parametrize("certified", [False, True])
def test_pulses_go_over_tls(tmp_path: Path, certified: bool) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue_server()
    options = {"tls_client_ca": authority.file} if certified else {}
    with serving(0.9, "grpc+tls://127.0.0.1:0", tls_cert=pair.certificate, tls_key=pair.key, **options) as server:
        told: list[bool] = []
        liveness = Liveness(0.9, told.append)
        liveness.start(server.location, certified=not certified)
        if certified:  # turned away in the handshake, which counts as an answer only where it has to
            eventually(lambda: told == [False])
        eventually(lambda: check(server.health_address, LIVENESS) == Status.SERVING)
        liveness.stop()


def test_nobody_else_has_a_pulse(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("")
    with serving(60.0, token_file=tokens) as server, flight.connect(server.location) as client:
        options = flight.FlightCallOptions(headers=[(PULSE_HEADER.encode(), b"0" * 32)], timeout=20)
        with pytest.raises(flight.FlightUnauthenticatedError):
            list(client.list_actions(options))


def test_a_draining_server_is_alive() -> None:
    with serving(0.6, drain_delay_s=2.0) as server:
        ending = threading.Thread(target=server.shutdown)
        ending.start()
        eventually(lambda: check(server.health_address, "") == Status.NOT_SERVING)
        assert check(server.health_address, LIVENESS) == Status.SERVING
        ending.join()
