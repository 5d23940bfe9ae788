"""The end of the writing never meets a read: gRPC aborts the process if the stream breaks just then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fq_aborts
import numpy as np
import pyarrow.flight as flight
import pytest

from flightquant.client import exchange
from flightquant.client.batching import Request, pack
from flightquant.client.exchange import SOON_SECONDS, Exchange, Window
from flightquant.errors import FlightquantError, InternalError
from flightquant.layers import named_layers
from flightquant.spec import Command

COMMAND = Command.build(scheme="int4")
OPTIONS = flight.FlightCallOptions(timeout=60)


def requests(count: int, pause_s: float = 0.0) -> Iterator[Request]:
    (request,) = pack(named_layers({"w": np.ones((4, 128), np.float32)}), COMMAND)
    for _ in range(count):
        yield request
        time.sleep(pause_s)


class Watched:
    """A Flight client, and its stream, that note whether the writing was ended beside a read."""

    def __init__(self, uri: str) -> None:
        self.client = flight.connect(uri)
        self.writer: Any = None
        self.reader: Any = None
        self.reading = False
        self.ended: list[str] = []

    def do_exchange(self, descriptor: Any, options: Any) -> tuple[Any, Any]:
        self.writer, self.reader = self.client.do_exchange(descriptor, options)
        return self, self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader if name == "cancel" else self.writer, name)

    def read_chunk(self) -> Any:
        self.reading = True
        try:
            return self.reader.read_chunk()
        finally:
            self.reading = False

    def done_writing(self) -> None:
        self.ended.append("beside a read" if self.reading else "alone")
        self.writer.done_writing()


@pytest.mark.parametrize("pause_s", [0.0, 3 * SOON_SECONDS])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_writing_is_ended_between_two_reads(serve: Any, count: int, pause_s: float) -> None:
    client: Any = Watched(serve().uri)
    call = Exchange(client, COMMAND.to_json(), OPTIONS, requests(count, pause_s), Window(1 << 20, 4))
    assert sum(answer.batch.num_rows for answer in call) == count
    assert client.ended == ["alone"]
    client.client.close()


class Refusing:
    """A server that refuses a request before it has read it whole."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def do_exchange(self, descriptor: Any, options: Any) -> tuple[Any, Any]:
        return self, self

    def begin(self, schema: Any) -> None:
        pass

    def write_batch(self, batch: Any) -> None:
        self.cancelled.wait(60)
        raise flight.FlightCancelledError("cancelled")

    def read_chunk(self) -> Any:
        raise flight.FlightServerError("internal: no")

    def cancel(self) -> None:
        self.cancelled.set()

    done_writing: Callable[[], None] = cancel
    close = cancel


def test_a_refusal_is_heard_while_its_request_is_written() -> None:
    client: Any = Refusing()
    with pytest.raises(InternalError, match="no"):
        list(Exchange(client, b"", OPTIONS, requests(1), Window(1 << 20, 4)))


@pytest.mark.parametrize("situation", ["fails", "closes", "reads, then fails"])
def test_a_process_lives_through_servers_that_fail_at_bad_times(situation: str) -> None:
    with fq_aborts.server(situation, 1) as (_, port):
        code, told = fq_aborts.ended(fq_aborts.client(port, 1, 10, 2.0))
    assert code == 0, told


def test_the_end_of_the_interpreter_ends_calls(serve: Any, faults: Any) -> None:
    server = serve(faults(hang_after=0))
    call = Exchange(flight.connect(server.uri), COMMAND.to_json(), OPTIONS, requests(1), Window(1 << 20, 4))
    ended: list[BaseException] = []

    def run() -> None:
        try:
            list(call)
        except FlightquantError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not server.faults.seen:
        time.sleep(0.01)
    Exchange.end_all()
    thread.join(20)
    assert ended, "the call goes on"


def test_a_call_left_before_its_threads_end_is_known_at_the_end(serve: Any, faults: Any) -> None:
    released = threading.Event()

    def blocked() -> Iterator[Request]:
        yield from requests(1)
        released.wait(60)

    client = flight.connect(serve(faults(fail_after=(1, flight.FlightServerError("internal: no")))).uri)
    call = Exchange(client, COMMAND.to_json(), OPTIONS, blocked(), Window(1 << 20, 4))
    with pytest.raises(InternalError):
        list(call)
    assert call in exchange.live
    released.set()
