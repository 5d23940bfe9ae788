"""Clients that misbehave, one kind at a time, against the server as a process: it lives, and serves the next call."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fq_faults
import grpc
import numpy as np
import pyarrow as pa
import pytest
from fq_faults import COMMAND, FAULTS, KILLED, LAYER, PREFACE, connect, flood, frame, headers_block
from fq_flight import eventually, exchange
from fq_process import ServerProcess, server_process
from fq_rawflight import batch_data, flight_data, raw_exchange, schema_data
from pyarrow import flight

SMALL = ("--max-layer-bytes", str(32 << 20), "--max-batch-bytes", str(32 << 20))
CORPUS = os.environ.get("FLIGHTQUANT_CORPUS")
"""A folder of fuzz files of the Arrow project (arrow-testing, ``data/arrow-ipc-stream``)."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process(*SMALL) as server:
        yield server


@pytest.fixture(autouse=True)
def still_serving(server: ServerProcess) -> Iterator[None]:
    """After every test the same process serves a call."""
    yield
    assert server.process.poll() is None
    eventually(lambda: serves(server), "the server serves no more", 60)


def serves(server: ServerProcess) -> bool:
    with flight.connect(server.location) as client:
        try:
            return exchange(client, COMMAND, [LAYER]).end["rows"] == 1
        except (flight.FlightUnavailableError, pa.ArrowInvalid):  # "Writer not initialized": refused as it began
            return False


def status(server: ServerProcess, key: str) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", range(2))
def test_a_fault_ends_in_a_typed_error_or_a_cut(server: ServerProcess, name: str, seed: int) -> None:
    seen = FAULTS[name](server.location, np.random.default_rng(seed))
    expected = {
        "endless rows": {"invalid_request"},
        "bomb": {"ok", "too_large"},
        "killed": {"killed"},
        "idle connections": {"closed"},
        "cancelled": {"CANCELLED", "ok"},
        "large message": {"too_large", "Flight returned unavailable error, with m"},
    }
    if name in expected:
        assert seen in expected[name]


@pytest.mark.skipif(CORPUS is None, reason="needs the fuzz files: FLIGHTQUANT_CORPUS")
def test_the_fuzz_files_of_arrow(server: ServerProcess) -> None:
    files = [path for path in sorted(Path(CORPUS or "").iterdir()) if path.suffix != ".md"]
    assert len(files) > 50
    before = status(server, "VmRSS")
    for path in files:
        raw = path.read_bytes()
        begin = [schema_data(LAYER.schema, COMMAND), batch_data(LAYER)]
        for messages in (
            [raw],
            [flight_data(raw, command=COMMAND)],
            [flight_data(raw[:200], raw[200:], command=COMMAND)],
            [*begin, flight_data(raw)],
            [*begin, raw],
        ):
            reply = raw_exchange(server.location, messages)
            fq_faults.outcome(reply)
            if reply.code is grpc.StatusCode.OK:
                # An OK tells of the good batch alone, or of nothing.
                assert b'"rows": 1,' in reply.messages[-1] or b'"rows": 0,' in reply.messages[-1], path.name
    assert status(server, "VmRSS") - before < 50 << 10


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_a_bomb_within_the_limit_of_a_batch_is_refused_after_it_was_inflated(server: ServerProcess, kind: str) -> None:
    """Arrow inflates before any of our code runs: the process's own memory limit and a proxy bound it, we cannot."""
    batch = pa.record_batch({"layer_name": ["w"], "weights": pa.array([np.zeros(64 << 20, np.float32)])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=kind)) as writer:
        writer.write_batch(batch)
    with pa.BufferReader(sink.getvalue()) as source:
        pa.ipc.read_message(source)
        message = pa.ipc.read_message(source)
    data = flight_data(message.metadata.to_pybytes(), message.body.to_pybytes())
    assert len(data) < 2 << 20
    reply = raw_exchange(server.location, [schema_data(batch.schema, COMMAND), data], timeout=120)
    assert reply.details.startswith("too_large: ")


def test_a_message_of_a_gibibyte_is_never_a_success(server: ServerProcess) -> None:
    body = bytes(1 << 30)
    call = [schema_data(LAYER.schema, COMMAND), flight_data(b"x" * 100, body)]
    assert raw_exchange(server.location, call, timeout=200).code is not grpc.StatusCode.OK


@pytest.mark.parametrize("boundary", range(7))
def test_a_client_killed_at_any_boundary_leaves_nothing(server: ServerProcess, boundary: int) -> None:
    eventually(lambda: status(server, "Threads") > 0)
    serves(server)
    threads, files = status(server, "Threads"), descriptors(server)
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, server.location, str(boundary)], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "here\n"
            client.kill()
    eventually(lambda: status(server, "Threads") <= threads + 2, "threads are left", 60)
    eventually(lambda: descriptors(server) <= files + 1, "descriptors are left", 60)


def test_thousands_of_idle_connections(server: ServerProcess) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(4000, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 500), hard))
    held: list[socket.socket] = []
    try:
        for i in range(count):
            held.append(connect(server.location))
            if i % 4 == 0:
                held[-1].sendall(PREFACE + frame(4))
    finally:
        for sock in held:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(held) == count


def test_two_thousand_streams_on_one_connection(server: ServerProcess) -> None:
    """Each has a thread until it is refused or let in; all end with their connection."""
    with connect(server.location) as sock:
        sock.sendall(PREFACE + frame(4))
        for start in range(0, 2000, 50):
            numbers = range(2 * start + 1, 2 * (start + 50), 2)
            sock.sendall(b"".join(frame(1, 4, number, headers_block()) for number in numbers))
        eventually(lambda: serves(server), "the server serves no more", 60)
    eventually(lambda: status(server, "Threads") < 80, "threads are left", 60)


@pytest.mark.parametrize("seed", range(8))
def test_floods(server: ServerProcess, seed: int) -> None:
    flood(server.location, np.random.default_rng(seed), 20_000)


def test_a_good_client_beside_a_hundred_slow_readers(server: ServerProcess) -> None:
    """The slow ones hold places, threads and buffers; a good client is served all the same."""
    rng = np.random.default_rng(3)
    until = time.monotonic() + 5
    slow = [threading.Thread(target=fq_faults.slow_reader, args=(server.location, rng)) for _ in range(100)]
    for thread in slow:
        thread.start()
    served = 0
    while time.monotonic() < until:
        served += serves(server)
    for thread in slow:
        thread.join()
    assert served > 5
