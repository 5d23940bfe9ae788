"""The server as a process: its ready line, its log, and every way that it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from fq_flight import Reply, check_error, eventually, exchange, fails, open_exchange
from fq_process import ServerProcess, command, server_process
from fq_signals import ENDS, start_and_stop
from fq_testing import request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pyarrow import flight

from flightquant.server import heap
from flightquant.server.app import running_server
from flightquant.server.config import ServerConfig

BATCH = request({"a": np.ones((1, 32), np.float32)})
COMMAND = {"scheme": "int8"}


def health(address: str) -> int | None:
    """The state of the server, None if it does not answer."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            return int(stub.Check(health_pb2.HealthCheckRequest(service="flightquant"), timeout=5).status)
        except grpc.RpcError:
            return None


def events(log: list[str]) -> list[dict[str, Any]]:
    """The log's lines, each of which must be one JSON object; gRPC's own lines aside."""
    return [json.loads(line) for line in log if line.startswith("{")]


@contextmanager
def streaming_server(*options: str) -> Iterator[tuple[ServerProcess, Any]]:
    """A server with one stream that is half way, and the stream's reader."""
    with (
        server_process(*options) as server,
        flight.connect(server.location) as client,
        open_exchange(client, COMMAND, BATCH.schema) as (writer, reader),
    ):
        writer.write_batch(BATCH)
        reader.read_chunk()
        yield server, reader


def test_ready_serve_end() -> None:
    with server_process() as server:
        assert set(server.ready) == {"event", "flight", "metrics", "health"}
        assert server.ready["event"] == "ready"
        assert re.fullmatch(r"grpc://127\.0\.0\.1:[1-9][0-9]*", server.location)
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*/metrics", server.ready["metrics"])
        assert re.fullmatch(r"127\.0\.0\.1:[1-9][0-9]*", server.ready["health"])
        assert health(server.ready["health"]) == health_pb2.HealthCheckResponse.SERVING
        with urllib.request.urlopen(server.ready["metrics"], timeout=10) as page:
            assert b"flightquant_exchanges_total" in page.read()
        with flight.connect(server.location) as client:
            assert exchange(client, COMMAND, [BATCH], headers={"x-request-id": "call-1"}).end["rows"] == 1
            fails(client, {"scheme": "int9"}, schema=BATCH.schema, headers={"x-request-id": "call-2"})
        server.signal(signal.SIGTERM)
        code, out, log = server.end()
    assert code == 0
    assert out == ""
    assert len(events(log)) == len(log)
    calls = {event["request_id"]: event for event in events(log) if event["event"] == "call"}
    assert set(calls) == {"call-1", "call-2"}
    good, bad = calls["call-1"], calls["call-2"]
    assert (good["outcome"], good["op"], good["scheme"], good["rows"]) == ("ok", "quantize", "int8", 1)
    assert good["bytes_in"] == 128
    assert good["peer"].startswith("ipv4:127.0.0.1:")
    assert (bad["outcome"], bad["op"]) == ("invalid_request", "none")
    assert [event["event"] for event in events(log) if event["event"] != "call"] == ["ready", "draining", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_may_end(number: int) -> None:
    with server_process() as server, flight.connect(server.location) as client:
        reply = Reply()
        with open_exchange(client, COMMAND, BATCH.schema) as (writer, reader):
            writer.write_batch(BATCH)
            reply.take(reader.read_chunk())
            server.signal(number)
            eventually(lambda: health(server.ready["health"]) != health_pb2.HealthCheckResponse.SERVING)
            for _ in range(5):
                writer.write_batch(BATCH)
                reply.take(reader.read_chunk())
            writer.done_writing()
            reply.take(reader.read_chunk())
        assert reply.end is not None
        assert reply.end["rows"] == 6
        code, _, log = server.end()
    assert code == 0
    assert events(log)[-1]["cut_calls"] == 0


def test_an_idle_stream_is_cut_when_the_grace_period_ends() -> None:
    with streaming_server("--grace-s", "1") as (server, reader):
        server.signal(signal.SIGTERM)
        code, _, log = server.end()
        assert code == 0
        assert events(log)[-1] == events(log)[-1] | {"event": "stopped", "cut_calls": 1}
        with pytest.raises(flight.FlightUnavailableError):
            reader.read_chunk()


def test_a_stream_that_gave_its_place_away_is_cut_and_counted_too() -> None:
    with streaming_server("--grace-s", "1", "--max-calls", "1", "--idle-timeout-s", "0.1") as (server, _):
        with flight.connect(server.location) as other:
            eventually(lambda: _answers(other))
        server.signal(signal.SIGTERM)
        code, _, log = server.end()
        assert code == 0
        assert events(log)[-1]["cut_calls"] == 1


def _answers(client: flight.FlightClient) -> bool:
    with suppress(flight.FlightUnavailableError):
        return bool(list(client.do_action(flight.Action("version", b""))))
    return False


def test_a_stream_whose_client_does_not_read_is_cut_when_the_grace_period_ends() -> None:
    """The call's thread waits in a write that nothing can wake."""
    large = request({"a": np.ones((1024, 1024), np.float32)})
    with server_process("--grace-s", "2") as server, flight.connect(server.location) as client:
        options = flight.FlightCallOptions(timeout=120)
        writer, _ = client.do_exchange(flight.FlightDescriptor.for_command(json.dumps({"scheme": "int8"})), options)
        writer.begin(large.schema)
        written: list[float] = []

        def write() -> None:
            with suppress(pa.ArrowException, OSError):
                for _ in range(1000):
                    writer.write_batch(large)
                    written.append(time.monotonic())

        thread = threading.Thread(target=write)
        thread.start()
        eventually(lambda: written and time.monotonic() - written[-1] > 1, "the client is never held back", 60)
        server.signal(signal.SIGTERM)
        code, _, log = server.end()
        thread.join()
    assert code == 0
    assert len(written) < 1000
    assert events(log)[-1] == events(log)[-1] | {"event": "stopped", "cut_calls": 1}


def test_a_stream_that_does_not_end_in_time_is_told() -> None:
    with server_process("--grace-s", "2") as server, flight.connect(server.location) as client:

        def slowly() -> Any:
            for i in count():
                if i == 1:
                    eventually(lambda: metric(server, "calls_in_flight") == 1, "the call does not come in", 60)
                    server.signal(signal.SIGTERM)
                time.sleep(0.02)
                yield BATCH

        failure = fails(client, COMMAND, slowly(), schema=BATCH.schema)
        assert failure.extra["code"] == "draining"
        assert failure.extra["retry_after_s"] > 0
        code, _, log = server.end()
    assert code == 0
    (call,) = [event for event in events(log) if event["event"] == "call"]
    assert call["outcome"] == "draining"
    assert call["rows"] == len(failure.reply.batches)


def test_new_calls_are_served_during_the_drain_delay_and_not_after() -> None:
    with server_process("--drain-delay-s", "1.5") as server, flight.connect(server.location) as client:
        exchange(client, COMMAND, [BATCH])
        server.signal(signal.SIGTERM)
        eventually(lambda: health(server.ready["health"]) == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert exchange(client, COMMAND, [BATCH]).end["rows"] == 1
        assert server.end()[0] == 0
        with pytest.raises(flight.FlightUnavailableError):
            list(client.list_actions())


def test_a_second_signal_ends_it_at_once() -> None:
    with streaming_server("--grace-s", "600") as (server, _):
        server.signal(signal.SIGTERM)
        eventually(lambda: health(server.ready["health"]) == health_pb2.HealthCheckResponse.NOT_SERVING)
        server.signal(signal.SIGTERM)
        assert server.end()[0] == 128 + signal.SIGTERM


KILLED = """
import sys, time, pyarrow as pa, pyarrow.flight as flight
client = flight.connect(sys.argv[1])
writer, reader = client.do_exchange(flight.FlightDescriptor.for_command('{"scheme": "int8"}'))
batch = pa.record_batch({"layer_name": ["a"], "weights": pa.array([[1.0] * 32], pa.list_(pa.float32()))})
writer.begin(batch.schema)
writer.write_batch(batch)
reader.read_chunk()
print("half way", flush=True)
time.sleep(600)
"""


def test_a_killed_client_is_a_cancelled_call() -> None:
    with server_process() as server:
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, server.location], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "half way\n"
            client.kill()
        with flight.connect(server.location) as other:
            eventually(
                lambda: metric(server, "exchanges_total", 'op="quantize",outcome="cancelled",scheme="int8"') == 1
            )
            assert metric(server, "calls_in_flight") == 0
            assert exchange(other, COMMAND, [BATCH]).end["rows"] == 1
        server.signal(signal.SIGTERM)
        _, _, log = server.end()
    outcomes = [event["outcome"] for event in events(log) if event["event"] == "call"]
    assert outcomes == ["cancelled", "ok"]


def metric(server: ServerProcess, name: str, labels: str = "") -> float:
    """A sample of the server's page; ``labels`` in alphabetical order."""
    with urllib.request.urlopen(server.ready["metrics"], timeout=10) as page:
        text = page.read().decode()
    wanted = f"flightquant_{name}{{{labels}}}" if labels else f"flightquant_{name}"
    (value,) = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.rsplit(" ", 1)[0] == wanted]
    return float(value)


HANGS = """
import time
from flightquant.server import app
app.Server.shutdown = lambda self: time.sleep(600)
app.LAST_RESORT_S = 0.2
app.run(app.ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=0.3))
"""


def test_a_shutdown_that_hangs_ends_all_the_same() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert json.loads(server.stdout.readline())["event"] == "ready"
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


@pytest.mark.parametrize("option", ["--location", "--metrics-port", "--health-port"])
def test_a_port_that_is_taken_is_said_in_one_line(option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--location": "grpc://127.0.0.1:0", "--metrics-port": "0", "--health-port": "0"}
        ports[option] = f"grpc://127.0.0.1:{port}" if option == "--location" else str(port)
        done = subprocess.run(
            command(*[word for pair in ports.items() for word in pair]), capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("flightquant serve: cannot listen on ")
    assert f"127.0.0.1:{port}" in last
    assert "Traceback" not in done.stderr


def test_two_servers_never_share_a_port_in_silence() -> None:
    with running_server() as server:
        config = ServerConfig(location=server.location, metrics_port=0, health_port=0)
        with pytest.raises(OSError, match="cannot listen on"), running_server(config):
            pass


def test_an_embedded_server_ends_and_gives_its_ports_back() -> None:
    with running_server() as server:
        location, address = server.location, server.health_address
        with flight.connect(location) as client:
            exchange(client, COMMAND, [BATCH])
    assert health(address) is None
    with flight.connect(location) as client, pytest.raises(flight.FlightUnavailableError):
        list(client.list_actions())
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.metrics_url, timeout=5)
    with running_server(ServerConfig(location=location, metrics_port=0, health_port=0, grace_s=5)) as again:
        assert again.location == location


def test_a_draining_embedded_server_tells_calls_that_stay() -> None:
    config = ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=1.0)
    errors: list[pa.ArrowException] = []
    started = threading.Event()

    def stay(location: str) -> None:
        with flight.connect(location) as client, open_exchange(client, COMMAND, BATCH.schema) as (writer, reader):
            try:
                while True:
                    writer.write_batch(BATCH)
                    reader.read_chunk()
                    started.set()
            except pa.ArrowException as error:
                errors.append(error)

    with running_server(config) as server:
        thread = threading.Thread(target=stay, args=(server.location,))
        thread.start()
        started.wait(20)
    thread.join()
    assert check_error(errors[0])["code"] == "draining"


LOADS = """
import sys, time, types
loading = types.ModuleType("flightquant.client.cli")
loading.main = lambda: print("loading", flush=True) or time.sleep(600)
sys.modules["flightquant.client"] = types.ModuleType("flightquant.client")
sys.modules["flightquant.client.cli"] = loading
from flightquant.__main__ import main
sys.argv = ["flightquant", "serve"]
main()
"""


def test_a_signal_ends_it_while_it_loads() -> None:
    """Also as process 1, for which an unhandled signal is ignored, as here."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server = subprocess.Popen([sys.executable, "-c", LOADS], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "loading\n"
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(60) == 128 + signal.SIGTERM
        finally:
            server.kill()


HOLDS = """
import os, signal, threading
from flightquant.server import cli
def execv(path, words):
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    execute(path, [path, "-m", "flightquant", "serve"])
execute, os.execv = os.execv, execv
cli.serve()
"""


def test_a_signal_is_kept_while_it_starts_itself_again() -> None:
    variables = {name: value for name, value in os.environ.items() if name != heap.VARIABLE}
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        done = subprocess.run([sys.executable, "-c", HOLDS], env=variables, capture_output=True, timeout=60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize("number", range(3))
def test_a_signal_at_any_moment_ends_it(number: int) -> None:
    """``python tests/fq_signals.py`` does this some hundred times."""
    how, _ = start_and_stop(np.random.default_rng([3, number]), latest_s=1.5, hangs_s=60)
    assert how in ENDS.values()
