"""Streams that break: never a success, never a hang, always one of our errors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from flightquant.client import AsyncQuantClient, QuantClient
from flightquant.client.exchange import Window, our_error
from flightquant.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    StreamCutError,
    UnauthenticatedError,
    UnavailableError,
)
from flightquant.layers import as_layer, layers_batch

Serve = Callable[..., Any]


def batches(n: int, cols: int = 128) -> Iterator[pa.RecordBatch]:
    for i in range(n):
        yield layers_batch([as_layer(f"w{i}.{j}", np.ones((2, cols), np.float32)) for j in range(3)])


def no_thread_left() -> bool:
    return not [t for t in threading.enumerate() if t.name in ("flightquant-writer", "flightquant-reader")]


@pytest.mark.parametrize(
    "fault",
    [
        {"close_after": 0},
        {"close_after": 3},
        {"no_end": True},
        {"end_rows": -1},
        {"end_rows": 1},
        {"drop_row": True},
        {"extra_batch": True},
        {"unknown_message": True},
        {"close_after": 20},
    ],
    ids=str,
)
def test_a_stream_that_is_not_whole_is_a_failed_call(serve: Serve, faults: Any, fault: dict[str, Any]) -> None:
    server = serve(faults(**fault))
    with QuantClient(server.uri, timeout_s=60, retry=None) as client, pytest.raises(StreamCutError):
        client.quantize(batches(20), "int4")
    assert no_thread_left()


def test_another_contract_is_refused(serve: Serve, faults: Any) -> None:
    with QuantClient(serve(faults(contract="2")).uri) as client, pytest.raises(InternalError, match="contract 2"):
        client.quantize(batches(1), "int4")


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (flight.FlightUnavailableError("overloaded: full", extra_info=b'{"code": "overloaded"}'), OverloadedError),
        (flight.FlightUnavailableError("no route"), UnavailableError),
        (flight.FlightServerError("invalid_request: no"), InvalidRequestError),
        (flight.FlightServerError("something"), InternalError),
        (flight.FlightUnauthenticatedError("who"), UnauthenticatedError),
        (flight.FlightUnauthorizedError("not you"), PermissionDeniedError),
        (flight.FlightTimedOutError("deadline: enough"), DeadlineError),
    ],
    ids=repr,
)
@pytest.mark.parametrize("after", [0, 2])
def test_what_the_server_says_becomes_our_error(
    serve: Serve, faults: Any, sent: Exception, wanted: type[Exception], after: int
) -> None:
    with QuantClient(serve(faults(fail_after=(after, sent))).uri, retry=None) as client:
        with pytest.raises(wanted) as caught:
            client.quantize(batches(20), "int4")
        assert "gRPC" not in str(caught.value)
        assert "Detail" not in str(caught.value)
    assert no_thread_left()


def test_facts_that_the_server_sends_arrive(serve: Serve, faults: Any) -> None:
    facts = b'{"code": "overloaded", "retry_after_s": 1.5, "request_id": "abc"}'
    sent = flight.FlightUnavailableError("overloaded: 8 calls are running", extra_info=facts)
    with (
        QuantClient(serve(faults(fail_after=(0, sent))).uri, retry=None) as client,
        pytest.raises(OverloadedError) as caught,
    ):
        client.quantize(batches(1), "int4")
    assert (caught.value.retry_after_s, caught.value.request_id) == (1.5, "abc")
    assert caught.value.message == "8 calls are running"


def test_nobody_listens(serve: Serve) -> None:
    server = serve()
    server.shutdown()
    with QuantClient(server.uri, timeout_s=20, retry=None) as client, pytest.raises(UnavailableError):
        client.quantize(batches(1), "int4")


def test_an_address_that_is_none() -> None:
    with pytest.raises(InvalidRequestError, match="nonsense"):
        QuantClient("nonsense")


@pytest.mark.parametrize("after", [0, 2])
def test_a_server_that_hangs_meets_the_deadline(serve: Serve, faults: Any, after: int) -> None:
    with QuantClient(serve(faults(hang_after=after)).uri, timeout_s=1) as client, pytest.raises(DeadlineError):
        client.quantize(batches(20), "int4")
    assert no_thread_left()


def test_the_deadline_is_that_of_the_whole_call(serve: Serve) -> None:
    with QuantClient(serve().uri, timeout_s=0) as client, pytest.raises(DeadlineError):
        client.quantize({"a": np.ones(128, np.float32)}, "int4")


@pytest.mark.parametrize("taken", [0, 1])
def test_leaving_early_cancels_at_once(serve: Serve, faults: Any, taken: int) -> None:
    server = serve(faults(hang_after=taken))
    with QuantClient(server.uri) as client:
        stream = client.stream(batches(1000), "int4")
        if taken:
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert no_thread_left()


def test_leaving_while_a_large_message_is_stuck(serve: Serve, faults: Any) -> None:
    server = serve(faults(hang_after=1))
    large = layers_batch([as_layer("w", np.zeros((16, 1 << 18), np.float32))])
    with QuantClient(server.uri) as client:
        stream = client.stream([large] * 20, "q8_0", metrics=False)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert no_thread_left()


def test_an_error_of_the_callers_own_comes_back_as_it_is(serve: Serve) -> None:
    def broken() -> Iterator[pa.RecordBatch]:
        yield from batches(3)
        raise OSError("the disk is gone")

    with QuantClient(serve().uri, timeout_s=30) as client, pytest.raises(OSError, match="the disk is gone"):
        client.quantize(broken(), "int4")
    assert no_thread_left()


def test_a_failed_call_does_not_wait_for_the_callers_iterator(serve: Serve, faults: Any) -> None:
    released = threading.Event()

    def blocked() -> Iterator[pa.RecordBatch]:
        yield from batches(1)
        released.wait(60)

    sent = flight.FlightServerError("internal: no")
    with QuantClient(serve(faults(fail_after=(1, sent))).uri) as client, pytest.raises(InternalError):
        client.quantize(blocked(), "int4")
    assert not released.is_set()
    assert not no_thread_left()
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("flightquant-"):
            thread.join(10)
    assert no_thread_left()


def test_an_error_in_the_progress_callback_ends_the_call(serve: Serve) -> None:
    def progress(name: str, fraction: float) -> None:
        raise RuntimeError("no screen")

    with QuantClient(serve().uri) as client, pytest.raises(RuntimeError, match="no screen"):
        client.quantize(batches(10), "int4", progress=progress)
    assert no_thread_left()


def test_a_schema_that_changes_is_an_error_not_a_hang(serve: Serve) -> None:
    other = layers_batch([as_layer("w", np.ones((1, 128), np.float16))])
    with QuantClient(serve().uri, timeout_s=30) as client, pytest.raises(InvalidRequestError, match="changes"):
        client.quantize([*batches(1), other], "int4")
    assert no_thread_left()


def test_a_slow_reader_holds_no_more_than_the_window(serve: Serve) -> None:
    given = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal given
        for batch in batches(200):
            given += 1
            yield batch

    with QuantClient(serve().uri, window_batches=4, timeout_s=60) as client:
        for taken, _ in enumerate(client.stream(counted(), "int4"), 1):
            if taken % 20 == 0:
                time.sleep(0.05)
            # The window, the batch that waits for it, and the one that was just taken.
            assert given <= taken + 4 + 2
    assert given == 200


class TestWindow:
    def test_a_request_larger_than_the_window_goes_alone(self) -> None:
        window = Window(10, 2)
        assert window.enter(100)
        entered = threading.Event()
        thread = threading.Thread(target=lambda: window.enter(1) and entered.set())
        thread.start()
        assert not entered.wait(0.1)
        window.leave(100)
        assert entered.wait(10)
        thread.join()

    def test_close_wakes_the_writer(self) -> None:
        window = Window(10, 1)
        assert window.enter(10)
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(window.enter(1)))
        thread.start()
        window.close()
        thread.join(10)
        assert results == [False]


SERVER = """
import sys, time
sys.path.insert(0, {folder!r})
import conftest
server = conftest.ReferenceServer(conftest.Faults(hang_after=3))
print(server.uri, flush=True)
time.sleep(60)
"""


def test_a_killed_server_is_an_error_within_the_deadline() -> None:
    code = SERVER.format(folder=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().strip()
        with QuantClient(uri, timeout_s=30, retry=None) as client:
            stream = client.stream(batches(100), "int4")
            for _ in range(3):
                next(stream)
            process.kill()
            with pytest.raises(UnavailableError):
                list(stream)
    assert no_thread_left()


CLIENT = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it
sys.path.insert(0, {folder!r})
import conftest, numpy as np
from flightquant.client import QuantClient
server = conftest.ReferenceServer(conftest.Faults(hang_after=0))
print("ready", flush=True)
try:
    QuantClient(server.uri).quantize({{"w": np.ones((4, 128), np.float32)}}, "int4")
except KeyboardInterrupt:
    left = [t.name for t in threading.enumerate() if t.name.startswith("flightquant-")]
    print("interrupted", left, flush=True)
    server.faults.released.set()
"""


def test_ctrl_c_ends_a_call_that_waits() -> None:
    code = CLIENT.format(folder=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert out.strip() == "interrupted []"


def test_our_error_keeps_the_sentence_alone() -> None:
    text = "Flight returned unavailable error, with message: full. Detail: Unavailable. gRPC client debug context: x"
    assert str(our_error(flight.FlightUnavailableError(text))) == "the server was lost or cannot be reached: full"


class Unreadable:
    """What a torch tensor on the device ``meta`` does."""

    def __array__(self, *_: Any) -> np.ndarray:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!\nand more")


NO_ARRAYS = {
    "Cannot copy out of meta tensor; no data!": Unreadable(),
    "some of its values are masked": np.ma.masked_less(np.arange(4.0), 2),
    "null": pa.array([1.0, None]),
}


@pytest.mark.parametrize("reason", NO_ARRAYS)
def test_what_gives_no_array_is_told_with_its_layer(reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"layer \"the\.bad\.one\" gives no array: ") as raised:
        as_layer("the.bad.one", NO_ARRAYS[reason])
    assert reason in raised.value.message
    assert "\n" not in raised.value.message


def test_a_torch_dtype_that_numpy_lacks_is_told_with_its_layer() -> None:
    tensor = type("Tensor", (), {"__module__": "torch", "detach": lambda self: self, "cpu": lambda self: self})()
    tensor.dtype = "torch.float8_e4m3fn"
    with pytest.raises(InvalidRequestError, match='layer "w" has dtype float8_e4m3fn; expected float32'):
        as_layer("w", tensor)


@pytest.mark.parametrize("where", ["local", "served"])
def test_what_is_no_batch_is_told(serve: Serve, where: str) -> None:
    with QuantClient("local" if where == "local" else serve().uri, retry=None) as client:
        with pytest.raises(InvalidRequestError, match="gives a tuple; expected RecordBatches, or a mapping"):
            client.quantize(iter({"w": np.ones(128, np.float32)}.items()), "int4")
        with pytest.raises(InvalidRequestError, match="a ChunkedArray that gives no stream of batches"):
            client.quantize(pa.chunked_array([[1.0]]), "int4")
        with pytest.raises(InvalidRequestError, match="answers is a dict; expected the Table"):
            client.dequantize({})  # type: ignore[arg-type]
        assert client.quantize([pa.Table.from_batches(batches(3))], "int4").num_rows == 9


def test_a_closed_client_says_so(serve: Serve) -> None:
    client = QuantClient(serve().uri)
    client.close()
    with pytest.raises(InvalidRequestError, match="the client is closed"):
        client.quantize(batches(1), "int4")


def test_an_error_in_the_progress_callback_ends_an_async_call(serve: Serve) -> None:
    told: list[str] = []

    def progress(name: str, fraction: float) -> None:
        told.append(name)
        raise RuntimeError("no screen")

    async def calls(uri: str) -> None:
        async with AsyncQuantClient(uri) as client:
            with pytest.raises(RuntimeError, match="no screen"):
                await client.quantize(batches(10), "int4", progress=progress)
            with pytest.raises(RuntimeError, match="no screen"):
                async for _ in client.stream(batches(10), "int4", progress=progress):
                    pass

    asyncio.run(calls(serve().uri))
    assert len(told) == 2
    assert no_thread_left()
