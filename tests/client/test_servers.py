"""One call over several servers, here, and in asyncio: the local call's rows, whatever dies on the way."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pyarrow.parquet as pq
import pytest

import flightquant
from flightquant.client import AsyncQuantClient, QuantClient, Retry, batching, in_process
from flightquant.client.servers import addresses
from flightquant.errors import InvalidRequestError, UnavailableError
from flightquant.spec import Command

Serve = Callable[..., Any]
RNG = np.random.default_rng(55)
# With small_messages each of the first is a message of its own, and the wide one is cut into parts.
WEIGHTS: dict[str, Any] = {f"layers.{i}": RNG.standard_normal((32, 64)).astype("f2") for i in range(7)}
WEIGHTS["wide"] = RNG.standard_normal((320, 64)).astype("f2")
WEIGHTS["single"] = RNG.standard_normal((4, 64), np.float32)
FREE = ("kernel_ns", "bytes_copied", "bytes_out")
QUICK = Retry(patience_s=20.0, first_s=0.01, longest_s=0.05)


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MIN_BYTES", 4 << 10)
    monkeypatch.setattr(batching, "TARGET_BYTES", 8 << 10)
    monkeypatch.setattr(batching, "MAX_BYTES", 16 << 10)
    monkeypatch.setattr(in_process, "RUN_BYTES", 16 << 10)


def check_same(table: pa.Table, expected: pa.Table) -> None:
    assert table["layer_name"].to_pylist() == expected["layer_name"].to_pylist()
    for name in expected.schema.names:
        if name not in FREE:
            assert table[name].combine_chunks().equals(expected[name].combine_chunks()), name


@pytest.fixture(scope="module")
def expected() -> pa.Table:
    return flightquant.quantize(WEIGHTS, "int8")


def wait_for_threads() -> None:
    """Until no thread of a call lives."""
    names = tuple(f"flightquant-{role}" for role in ("lane", "reader", "writer", "call"))
    while any(thread.name.startswith(names) for thread in threading.enumerate()):
        time.sleep(0.05)


def dead_uri() -> str:
    """An address at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"grpc://127.0.0.1:{held.getsockname()[1]}"


def test_layers_are_spread_and_come_back_whole_and_in_order(serve: Serve, expected: pa.Table) -> None:
    servers = [serve(), serve()]
    told: list[tuple[str, float]] = []
    with QuantClient(",".join(server.uri for server in servers), window_batches=4) as client:
        table = client.quantize(WEIGHTS, "int8", progress=lambda name, share: told.append((name, share)))
        check_same(table, expected)
        assert sorted(told) == sorted((name, 1.0) for name in WEIGHTS)
        seen = sum(len(server.faults.received) for server in servers)
        assert all(server.faults.received for server in servers)
        parts = batching.cut((320, 64), 2, Command.build(scheme="int8").layer_spec())
        assert len(parts) > 1
        # A lane that waits for the other's answers before it ends may ask a row twice.
        assert 0 <= seen - (7 + len(parts) + 1) <= len(servers)


def test_calls_of_one_message_take_turns(serve: Serve) -> None:
    servers = [serve(), serve()]
    with QuantClient(",".join(server.uri for server in servers)) as client:
        for _ in range(12):
            client.quantize({"single": WEIGHTS["single"]}, "int8")
    assert all(len(server.faults.received) >= 2 for server in servers)


def test_rows_of_a_table_keep_their_order_even_with_one_name(serve: Serve) -> None:
    batches = [
        pa.record_batch({"layer_name": ["same"], "weights": pa.array([[float(i)] * 64], pa.list_(pa.float32()))})
        for i in range(40)
    ]
    with QuantClient(f"{serve().uri}, {serve().uri}") as client:
        table = client.quantize(pa.Table.from_batches(batches), "int8")
    assert [scales[0] for scales in table["scales"].to_pylist()] == sorted(s[0] for s in table["scales"].to_pylist())


@pytest.mark.parametrize("retry", [QUICK, None], ids=["retry", "no retry"])
def test_a_server_that_is_not_there_is_survived(serve: Serve, expected: pa.Table, retry: Retry | None) -> None:
    with QuantClient(f"{dead_uri()},{serve().uri}", retry=retry) as client:
        check_same(client.quantize(WEIGHTS, "int8"), expected)


@pytest.mark.parametrize(
    "fault",
    [
        {"close_after": 0},
        {"close_after": 2},
        {"no_end": True},
        {"extra_batch": True},
        {"end_rows": 1},
        {"fail_after": (1, flight.FlightUnavailableError("overloaded: full"))},
    ],
    ids=str,
)
@pytest.mark.parametrize("retry", [QUICK, None], ids=["retry", "no retry"])
def test_a_server_that_dies_is_survived(
    serve: Serve, faults: Any, expected: pa.Table, fault: dict[str, Any], retry: Retry | None
) -> None:
    servers = [serve(faults(**fault)), serve()]
    with QuantClient(",".join(server.uri for server in servers), retry=retry, window_batches=4) as client:
        check_same(client.quantize(WEIGHTS, "int8"), expected)


def test_when_all_are_gone_the_call_fails() -> None:
    retry = Retry(patience_s=0.3, first_s=0.01, longest_s=0.05)
    with QuantClient(f"{dead_uri()},{dead_uri()}", retry=retry) as client, pytest.raises(UnavailableError):
        client.quantize(WEIGHTS, "int8")
    with QuantClient(f"{dead_uri()},{dead_uri()}", retry=None) as client, pytest.raises(UnavailableError):
        client.quantize(WEIGHTS, "int8")


def test_the_caller_s_own_mistakes_and_errors_end_the_call(serve: Serve) -> None:
    with QuantClient(f"{serve().uri},{serve().uri}") as client:

        def batches(error: BaseException) -> Iterator[pa.RecordBatch]:
            yield pa.record_batch({"layer_name": ["a"], "weights": pa.array([[1.0] * 64], pa.list_(pa.float32()))})
            raise error

        for error in (ZeroDivisionError("mine"), UnavailableError("mine too")):
            with pytest.raises(type(error), match="mine"):
                list(client.stream(batches(error), "int8"))
        with pytest.raises(InvalidRequestError):
            client.quantize({"a": np.ones(3, np.int32)}, "int8")


def test_leaving_early_ends_every_lane(serve: Serve, faults: Any) -> None:
    servers = [serve(faults(hang_after=1)), serve(faults(hang_after=1))]
    with QuantClient(",".join(server.uri for server in servers)) as client:
        stream = client.stream(WEIGHTS, "int8")
        next(stream)
        stream.close()
    for server in servers:
        server.faults.released.set()
    wait_for_threads()


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"several": ["10.0.0.2", "10.0.0.1"], "one": ["10.0.0.1"], "six": ["fd00::1", "fd00::2"]}
    hosts["both"] = ["10.0.0.9", "fd00::9"]

    def lookup(host: str, port: int, **_: Any) -> list[Any]:
        if host not in hosts:
            raise socket.gaierror(host)
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, None, 0, "", (address, port))
            for address in hosts[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert addresses("grpc://several:1") == ["grpc://10.0.0.1:1", "grpc://10.0.0.2:1"]
    assert addresses("grpc://six:1") == ["grpc://[fd00::1]:1", "grpc://[fd00::2]:1"]
    for single in ("grpc://one:1", "grpc://both:1", "grpc+tls://several:1", "grpc://10.1.1.1:1", "grpc://nowhere:1"):
        assert addresses(single) == [single]
    assert addresses("grpc://a:1, grpc://b:2,grpc://a:1") == ["grpc://a:1", "grpc://b:2"]


class TestHere:
    def test_the_same_call_needs_no_server(self, expected: pa.Table) -> None:
        told: list[str] = []
        with QuantClient("local") as client:
            check_same(client.quantize(WEIGHTS, "int8", progress=lambda name, share: told.append(name)), expected)
            assert sorted(told) == sorted(WEIGHTS)
            batches = list(client.stream(WEIGHTS, "int8"))
            assert pa.Table.from_batches(batches)["layer_name"].to_pylist() == list(WEIGHTS)
            assert len(batches) > 1
            assert client.quantize({}, "int8").num_rows == 0

    @pytest.mark.parametrize("where", ["local", "server"])
    def test_paths_tables_readers_and_modules_go_in(self, where: str, serve: Serve, tmp_path: Path) -> None:
        table = pa.table(
            {
                "layer_name": ["a", "b"],
                "weights": pa.array([[1.0] * 64, [2.0] * 64], pa.list_(pa.float32())),
                "shape": [[2, 32], [64]],
            }
        )
        path = tmp_path / "layers.parquet"
        pq.write_table(table, path)
        expected = flightquant.quantize(table, "int8")

        class Module:
            def state_dict(self) -> dict[str, Any]:
                return {
                    "a": np.ones((2, 32), np.float32),
                    "b": np.full(64, 2, np.float32),
                    "steps": np.ones(1, np.int64),
                }

        with QuantClient("local" if where == "local" else serve().uri) as client:
            for weights in (table, table.to_reader(), path, str(path), Module(), iter(table.to_batches())):
                check_same(client.quantize(weights, "int8"), expected)
            with pytest.raises(InvalidRequestError, match="expected"):
                client.quantize(42, "int8")


class TestAsync:
    def test_calls_run_beside_one_another(self, serve: Serve, expected: pa.Table) -> None:
        told: list[tuple[str, int]] = []

        def progress(name: str, share: float) -> None:
            told.append((name, threading.get_ident()))

        async def run(uri: str) -> None:
            async with AsyncQuantClient(uri) as client:
                first, second = await asyncio.gather(
                    client.quantize(WEIGHTS, "int8", progress=progress), client.quantize(WEIGHTS, "int8")
                )
                check_same(first, expected)
                check_same(second, expected)
                names = [n async for batch in client.stream(WEIGHTS, "int8") for n in batch["layer_name"].to_pylist()]
                assert sorted(names) == sorted(WEIGHTS)
                with pytest.raises(InvalidRequestError):
                    await client.quantize(WEIGHTS, "int99")

        for uri in (serve().uri, f"{serve().uri},{serve().uri}", "local"):
            told.clear()
            asyncio.run(run(uri))
            assert {name for name, _ in told} == set(WEIGHTS)
            assert {ident for _, ident in told} == {threading.get_ident()}

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_cancelled_task_ends_its_call(self, serve: Serve, faults: Any, count: int) -> None:
        servers = [serve(faults(hang_after=1)) for _ in range(count)]

        async def run() -> None:
            async with AsyncQuantClient(",".join(server.uri for server in servers)) as client:
                got = asyncio.Event()
                task = asyncio.create_task(client.quantize(WEIGHTS, "int8", progress=lambda name, share: got.set()))
                await got.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                stream = client.stream(WEIGHTS, "int8")
                await anext(stream)
                await stream.aclose()

        asyncio.run(run())
        for server in servers:
            server.faults.released.set()
        wait_for_threads()

    @pytest.mark.parametrize("call", ["__init__", "quantize", "stream"])
    def test_the_arguments_are_the_sync_client_s(self, call: str) -> None:
        ours, theirs = (inspect.signature(getattr(kind, call)).parameters for kind in (AsyncQuantClient, QuantClient))
        assert dict(ours) == dict(theirs)
