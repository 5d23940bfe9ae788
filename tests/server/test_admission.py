"""Who is let in: decided on the headers, before a body costs anything."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from fq_flight import check_error, eventually, exchange, fails, open_exchange, sample
from fq_testing import request
from pyarrow import flight

from flightquant.errors import DrainingError, OverloadedError
from flightquant.server import admission as admission_module
from flightquant.server import crowd
from flightquant.server.admission import OPEN_FACTOR, Admission
from flightquant.server.app import Server, running_server
from flightquant.server.auth import Identity
from flightquant.server.calls import Call
from flightquant.server.config import ServerConfig

BATCH = request({"a": np.ones((1, 32), np.float32)})
COMMAND = {"scheme": "int8"}


@contextmanager
def serving(**options: Any) -> Iterator[tuple[Server, flight.FlightClient]]:
    """A server with options of its own, and a client of it."""
    config = ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=5.0, **options)
    with running_server(config) as server, flight.connect(server.location) as client:
        yield server, client


def test_one_call_too_many_is_refused_and_may_come_again() -> None:
    with serving(max_calls=2) as (server, client):
        with ExitStack() as stack:
            for _ in range(2):
                writer, reader = stack.enter_context(open_exchange(client, COMMAND, BATCH.schema))
                writer.write_batch(BATCH)
                reader.read_chunk()
            assert server.admission.calls == 2
            failure = fails(client, COMMAND, schema=BATCH.schema)
            assert failure.extra["code"] == "overloaded"
            assert failure.extra["retry_after_s"] > 0
            assert (failure.extra["got"], failure.extra["expected"]) == (2, 2)
            assert sample(server, "refusals_total", code="overloaded") == 1
            assert sample(server, "exchanges_total", op="none", scheme="none", outcome="overloaded") == 1
        eventually(lambda: server.admission.calls == 0)
        assert exchange(client, COMMAND, [BATCH]).end["rows"] == 1
        assert server.admission.peak_calls == 2


def test_a_refused_body_is_not_read() -> None:
    body = request({"big": np.zeros((64, 1 << 20), np.float32)})
    with serving(max_calls=1) as (_, client), open_exchange(client, COMMAND, BATCH.schema) as (writer, reader):
        writer.write_batch(BATCH)
        reader.read_chunk()
        process = psutil.Process()
        before = process.memory_info().rss
        assert fails(client, COMMAND, [body]).extra["code"] == "overloaded"
        # Client and server are one process here: the client's own copies in gRPC count too, and are given back.
        assert process.memory_info().rss - before < 200 << 20


def test_a_draining_server_refuses_new_calls_and_lets_running_ones_end() -> None:
    with serving() as (server, client), open_exchange(client, COMMAND, BATCH.schema) as (writer, reader):
        writer.write_batch(BATCH)
        reader.read_chunk()
        server.admission.drain()
        failure = fails(client, COMMAND, schema=BATCH.schema)
        assert failure.extra["code"] == "draining"
        assert failure.extra["retry_after_s"] > 0
        with pytest.raises(flight.FlightUnavailableError) as caught:
            list(client.do_action("version"))
        assert check_error(caught.value)["code"] == "draining"
        writer.write_batch(BATCH)
        assert reader.read_chunk().data.num_rows == 1
        writer.done_writing()
        assert reader.read_chunk().app_metadata.to_pybytes().startswith(b'{"complete": true, "rows": 2,')
        assert sample(server, "refusals_total", code="draining") == 2


def test_running_calls_are_told_when_the_grace_period_ends() -> None:
    with serving() as (server, client), open_exchange(client, COMMAND, BATCH.schema) as (writer, reader):
        writer.write_batch(BATCH)
        reader.read_chunk()
        server.admission.end_calls()
        writer.write_batch(BATCH)
        with pytest.raises(flight.FlightUnavailableError) as caught:
            reader.read_chunk()
        assert check_error(caught.value)["code"] == "draining"


def test_a_call_has_a_longest_time() -> None:
    with (
        serving(call_timeout_s=0.3) as (server, client),
        open_exchange(client, COMMAND, BATCH.schema) as (writer, reader),
    ):
        with pytest.raises(flight.FlightTimedOutError) as caught:
            while True:
                writer.write_batch(BATCH)
                reader.read_chunk()
        extra = check_error(caught.value)
        assert (extra["code"], extra["field"], extra["expected"]) == ("deadline", "call_timeout_s", 0.3)
        eventually(lambda: sample(server, "exchanges_total", op="quantize", scheme="int8", outcome="deadline") == 1)


def test_bytes_in_flight_hold_back_running_calls_and_refuse_new_ones() -> None:
    with (
        serving(max_bytes_in_flight=1000) as (server, client),
        open_exchange(client, COMMAND, BATCH.schema) as (
            writer,
            reader,
        ),
    ):
        writer.write_batch(BATCH)
        reader.read_chunk()
        hog = Call("hog", "DoExchange")
        server.admission.hold(hog, 1000)
        assert fails(client, COMMAND, schema=BATCH.schema).extra["field"] == "max_bytes_in_flight"
        # The running call may have one read under way; the next one waits until there is room.
        answers: list[Any] = []
        reading = threading.Thread(target=lambda: answers.extend(reader.read_chunk() for _ in range(3)))
        reading.start()
        for _ in range(3):
            writer.write_batch(BATCH)
        reading.join(0.3)
        held_back = len(answers)
        server.admission.leave(hog)
        reading.join()
        assert held_back < 3
        assert len(answers) == 3
        writer.done_writing()
        assert reader.read_chunk().data is None
        eventually(lambda: server.admission.bytes_held == 0)


def test_what_was_counted_is_given_back() -> None:
    admission = Admission(max_calls=1, max_bytes=100)
    call = Call("a", "DoExchange")
    admission.enter(call)
    admission.hold(call, 70)
    admission.hold(call, 30)
    assert (admission.calls, admission.bytes_held) == (1, 30)
    admission.leave(call)
    admission.leave(call)
    assert (admission.calls, admission.bytes_held, admission.peak_calls) == (0, 0, 1)
    admission.hold(call, 100)
    with pytest.raises(OverloadedError):
        admission.enter(Call("b", "DoExchange"))
    admission.drain()
    with pytest.raises(DrainingError):
        admission.enter(Call("c", "DoExchange"))


def test_a_call_waits_in_the_queue_until_there_is_room() -> None:
    with serving(max_calls=1, max_queued=1, queue_timeout_s=60) as (server, client):
        with open_exchange(client, COMMAND, BATCH.schema) as (writer, reader):
            writer.write_batch(BATCH)
            reader.read_chunk()
            got: list[Any] = []
            waiting = threading.Thread(target=lambda: got.append(exchange(client, COMMAND, [BATCH]).end["rows"]))
            waiting.start()
            eventually(lambda: sample(server, "calls_queued") == 1)
            assert fails(client, COMMAND, schema=BATCH.schema).extra["code"] == "overloaded"
            assert got == []
        waiting.join()
        assert got == [1]
        assert sample(server, "calls_queued") == 0


def test_a_draining_server_empties_its_queue() -> None:
    admission = Admission(1, 100, max_queued=5, queue_s=60)
    admission.enter(Call("running", "DoExchange"))
    errors: list[Exception] = []

    def wait() -> None:
        try:
            admission.enter(Call("queued", "DoExchange"))
        except DrainingError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: admission.queued == 1)
    admission.drain()
    thread.join(30)
    assert len(errors) == 1
    assert admission.queued == 0


def test_the_queue_is_fair_between_identities() -> None:
    """One identity has all places and most of the queue; another that comes last gets the first place."""
    admission = Admission(3, 100, max_queued=10, queue_s=60)
    entered: list[Call] = []

    def call(name: str, number: int) -> Call:
        return Call(f"{name}{number}", "DoExchange", identity=Identity(name, frozenset()))

    def enter(one: Call) -> None:
        admission.enter(one)
        entered.append(one)

    def wait_for(count: int) -> None:
        eventually(lambda: len(entered) == count)

    running = [call("greedy", i) for i in range(3)]
    for one in running:
        admission.enter(one)
    threads = []
    for place, one in enumerate([call("greedy", 3), call("greedy", 4), call("modest", 0), call("modest", 1)]):
        threads.append(threading.Thread(target=enter, args=(one,)))
        threads[-1].start()
        eventually(lambda wanted=place + 1: admission.queued == wanted)
    for count, one in enumerate(running, 1):
        admission.leave(one)
        wait_for(count)
    # Then both have one place, and who came first is first.
    assert [one.request_id for one in entered] == ["modest0", "greedy3", "greedy4"]
    admission.leave(entered[1])
    for thread in threads:
        thread.join(60)
    assert entered[-1].request_id == "modest1"


def test_one_place_wakes_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood's calls would spend the processor on waking each other; and nobody needs the poll to come in."""
    looks = 0

    class Counting(Admission):
        def _reached(self) -> tuple[str, int, int] | None:
            nonlocal looks
            looks += 1
            return super()._reached()

    monkeypatch.setattr(admission_module, "POLL_S", 600.0)
    admission = Counting(1, 100, max_queued=20, queue_s=600)
    entered: list[Call] = []

    def enter(one: Call) -> None:
        admission.enter(one)
        entered.append(one)

    first = Call("first", "DoExchange")
    admission.enter(first)
    threads = []
    for i in range(20):
        threads.append(threading.Thread(target=enter, args=(Call(str(i), "DoExchange"),), daemon=True))
        threads[-1].start()
        eventually(lambda wanted=i + 1: admission.queued == wanted)
    looks = 0
    for i in range(20):
        admission.leave(entered[-1] if entered else first)
        eventually(lambda wanted=i + 1: len(entered) == wanted)
    assert [one.request_id for one in entered] == [str(i) for i in range(20)]
    assert looks <= 3 * 20
    for thread in threads:
        thread.join(60)


def test_a_crowd_before_the_door_asks_for_pythons_lock_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of threads that wait for it and wake every 5 ms cost more than the calls that they are refused."""
    usual, now = sys.getswitchinterval(), 100.0
    monkeypatch.setattr(crowd.time, "monotonic", lambda: now)
    admission = Admission(max_calls=1, max_bytes=100)
    first, second = (Call(str(i), "DoExchange") for i in range(2))
    try:
        admission.enter(first)
        for _ in range(2):
            with pytest.raises(OverloadedError):
                admission.enter(second)
        assert sys.getswitchinterval() == pytest.approx(crowd.CROWDED_SWITCH_S)
        admission.leave(first)
        admission.enter(second)
        assert sys.getswitchinterval() == pytest.approx(crowd.CROWDED_SWITCH_S), "others are refused in these moments"
        admission.leave(second)
        now += 2 * crowd.CALM_S
        admission.enter(first)
        assert sys.getswitchinterval() == pytest.approx(usual)
        with pytest.raises(OverloadedError):
            admission.enter(second)
        admission.drain()
        assert sys.getswitchinterval() == pytest.approx(usual)
    finally:
        sys.setswitchinterval(usual)


def test_a_flood_asks_for_pythons_lock_least_often_until_its_threads_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most threads of a flood wait for the lock without being refused, which must not count as calm."""
    usual, now, there = sys.getswitchinterval(), 100.0, crowd.FLOOD - 1
    monkeypatch.setattr(crowd.time, "monotonic", lambda: now)
    monkeypatch.setattr(crowd, "threads", lambda: there)
    met = crowd.Crowd()
    try:
        met.came()
        assert sys.getswitchinterval() == pytest.approx(usual)
        met.refused()
        assert sys.getswitchinterval() == pytest.approx(crowd.CROWDED_SWITCH_S)
        there = crowd.FLOOD
        met.came()
        assert sys.getswitchinterval() == pytest.approx(crowd.CROWDED_SWITCH_S), "it was looked a moment ago"
        for _ in range(3):
            now += 2 * crowd.CALM_S
            met.came()
            met.found_room()
            assert sys.getswitchinterval() == pytest.approx(crowd.FLOODED_SWITCH_S)
        now += 2 * crowd.CALM_S
        met.found_room()
        assert sys.getswitchinterval() == pytest.approx(crowd.FLOODED_SWITCH_S), "no more come, many are there"
        there = crowd.FLOOD - 1
        now += 2 * crowd.LOOK_S
        met.came()
        assert sys.getswitchinterval() == pytest.approx(crowd.CROWDED_SWITCH_S), "it was here a moment ago"
        now += 1.5 * crowd.CALM_S
        met.found_room()
        assert sys.getswitchinterval() == pytest.approx(usual)
    finally:
        sys.setswitchinterval(usual)


def test_threads_are_counted_as_the_kernel_does() -> None:
    before, end = crowd.threads(), threading.Event()
    waiting = [threading.Thread(target=end.wait) for _ in range(5)]
    for thread in waiting:
        thread.start()
    try:
        assert crowd.threads() >= before + 1  # others may have ended
        assert abs(crowd.threads() - len(os.listdir("/proc/self/task"))) <= 5
    finally:
        end.set()
        for thread in waiting:
            thread.join(60)


def test_every_call_is_told_before_it_is_known_whose_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A flood of calls that no token lets in is a flood too."""
    (tmp_path / "tokens").write_text("# nobody\n")
    came: list[Admission] = []
    monkeypatch.setattr(Admission, "came", lambda self: came.append(self))
    with serving(token_file=tmp_path / "tokens") as (_, client), pytest.raises(flight.FlightUnauthenticatedError):
        list(client.do_action(flight.Action("version", b"")))
    assert came


def test_an_idle_call_gives_its_place_away_and_is_told() -> None:
    with (
        serving(max_calls=1, max_queued=0, idle_timeout_s=0.2) as (server, client),
        open_exchange(client, COMMAND, BATCH.schema) as (writer, reader),
    ):
        writer.write_batch(BATCH)
        reader.read_chunk()
        eventually(lambda: _is_served(client))
        assert (server.admission.calls, sample(server, "calls_silent")) == (0, 1)
        writer.write_batch(BATCH)
        with pytest.raises(flight.FlightTimedOutError) as caught:
            reader.read_chunk()
        extra = check_error(caught.value)
        assert (extra["code"], extra["field"]) == ("deadline", "idle_timeout_s")
        eventually(lambda: sample(server, "calls_silent") == 0)


def _is_served(client: flight.FlightClient) -> bool:
    try:
        return exchange(client, COMMAND, [BATCH]).end["rows"] == 1
    except (flight.FlightUnavailableError, pa.ArrowInvalid):  # a refusal may come before the schema could be written
        return False


def test_silent_calls_are_bounded_too() -> None:
    admission = Admission(1, 100, idle_s=-1.0)
    for i in range(OPEN_FACTOR):
        call = Call(str(i), "DoExchange")
        admission.enter(call)
        call.silent_since = 0.0
    assert admission.silent == OPEN_FACTOR - 1
    with pytest.raises(OverloadedError):
        admission.enter(Call("one more", "DoExchange"))
    admission.leave(call)


def test_ids_and_traces_come_from_the_headers() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    call = Call.from_headers(
        "DoExchange", {"x-request-id": ["a-1"], "traceparent": [f"00-{trace}-b7ad6b7169203331-01"]}
    )
    assert (call.request_id, call.trace_id, call.sums) == ("a-1", trace, False)


@pytest.mark.parametrize(
    "value",
    [
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{'a' * 32}-{'0' * 16}-01",
        f"ff-{'a' * 32}-b7ad6b7169203331-01",
        f"00-{'A' * 32}-b7ad6b7169203331-01",
    ],
)
def test_a_trace_that_w3c_calls_invalid_is_none(value: str) -> None:
    assert Call.from_headers("DoExchange", {"traceparent": [value]}).trace_id is None


@pytest.mark.parametrize(
    "values", [[], ["a", "b"], [""], ["a b"], ["a\nb"], ["x" * 129], [b"raw"], ["\u00e9"]], ids=repr
)
def test_an_id_that_is_not_fit_to_be_logged_is_replaced(values: list[Any]) -> None:
    call = Call.from_headers("DoExchange", {"x-request-id": values, "traceparent": ["00-zz"]})
    assert len(call.request_id) == 32
    assert call.trace_id is None


def test_the_id_is_told_to_the_client_and_to_nobody_else(client: flight.FlightClient) -> None:
    first = fails(client, {}, schema=BATCH.schema).extra["request_id"]
    second = fails(client, {}, schema=BATCH.schema).extra["request_id"]
    assert first != second
    named = fails(client, {}, schema=BATCH.schema, headers={"x-request-id": "abc.1"})
    assert named.extra["request_id"] == "abc.1"


def test_the_answer_names_the_call(server: Server) -> None:
    seen: dict[str, Any] = {}

    class Watch(flight.ClientMiddleware):  # type: ignore[misc]
        def received_headers(self, headers: dict[str, Any]) -> None:
            seen.update(headers)

    class Factory(flight.ClientMiddlewareFactory):  # type: ignore[misc]
        def start_call(self, info: Any) -> Watch:
            return Watch()

    with flight.FlightClient(server.location, middleware=[Factory()]) as client:
        exchange(client, COMMAND, [BATCH], headers={"x-request-id": "abc.2"})
    assert seen["x-request-id"] == ["abc.2"]


def test_pool_and_batches_are_given_back(client: flight.FlightClient) -> None:
    batch = request({"a": np.ones((256, 1024), np.float32)})
    exchange(client, COMMAND, [batch])
    before = pa.total_allocated_bytes()
    for _ in range(5):
        exchange(client, COMMAND, [batch] * 4)
    eventually(lambda: pa.total_allocated_bytes() <= before + (64 << 10))
