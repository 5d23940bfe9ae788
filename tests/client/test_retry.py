"""Calls that are refused or lost: repeated from the first unanswered layer, the same bytes, one answer each."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from fq_process import server_process

import flightquant
from flightquant.client import QuantClient, Retry
from flightquant.client.batching import Request
from flightquant.client.joining import Answer
from flightquant.client.retry import Replay, answers
from flightquant.errors import (
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    StreamCutError,
    UnavailableError,
)
from flightquant.layers import as_layer, layers_batch

Serve = Callable[..., Any]

AT_ONCE = Retry(patience_s=20, first_s=0.001, longest_s=0.01)
LOST = (
    flight.FlightUnavailableError("the connection is gone"),
    flight.FlightInternalError("RST_STREAM"),
    flight.FlightUnavailableError("overloaded: full", extra_info=b'{"code": "overloaded", "retry_after_s": 0.01}'),
    flight.FlightUnavailableError("draining: bye", extra_info=b'{"code": "draining"}'),
)


def layers(count: int = 20) -> list[pa.RecordBatch]:
    rng = np.random.default_rng(4)
    return [layers_batch([as_layer(f"w{i}", rng.normal(size=(4, 128)).astype(np.float32))]) for i in range(count)]


def check_whole(table: pa.Table, given: list[pa.RecordBatch], scheme: str = "int4") -> None:
    """Every layer once, and the bytes of the local call."""
    local = flightquant.quantize(pa.Table.from_batches(given), scheme)
    for name in set(local.schema.names) - {"kernel_ns", "sqnr_db", "cosine", "max_abs_error"}:
        assert table.column(name).combine_chunks().equals(local.column(name).combine_chunks()), name


@pytest.mark.parametrize("sent", LOST, ids=repr)
@pytest.mark.parametrize("after", [0, 1, 7, 19])
def test_a_call_goes_on_at_the_first_unanswered_layer(serve: Serve, faults: Any, sent: Exception, after: int) -> None:
    given, server = layers(), serve(faults(calls=3, fail_after=(after, sent)))
    with QuantClient(server.uri, timeout_s=120, retry=AT_ONCE) as client:
        check_whole(client.quantize(given, "int4"), given)
    assert server.faults.seen >= (2 if after else 4)


def test_a_server_that_limits_the_time_of_a_call_is_called_again_if_there_was_progress(
    serve: Serve, faults: Any
) -> None:
    facts = b'{"code": "deadline", "request_id": "abc"}'
    sent = flight.FlightTimedOutError("deadline: enough", extra_info=facts)
    given = layers()
    # One batch at a time: gRPC may drop answers that an error follows at once, and then there was no progress.
    with QuantClient(serve(faults(fail_after=(3, sent))).uri, window_batches=1, retry=AT_ONCE) as client:
        check_whole(client.quantize(given, "int4"), given)
    with QuantClient(serve(faults(fail_after=(0, sent))).uri, retry=AT_ONCE) as client, pytest.raises(DeadlineError):
        client.quantize(given, "int4")


@pytest.mark.parametrize("after", range(21))
def test_a_stream_cut_at_any_message_is_made_whole(serve: Serve, faults: Any, after: int) -> None:
    given, server = layers(), serve(faults(calls=1, close_after=after, no_end=True))
    with QuantClient(server.uri, timeout_s=120, retry=AT_ONCE) as client:
        check_whole(client.quantize(given, "int4"), given)
    assert server.faults.seen == 2
    # Where only the end message was missing, the last layer alone is sent again.
    assert len(server.faults.received) >= len(given) + (after >= 20)


def test_the_parts_of_one_layer_are_joined_over_attempts(serve: Serve, faults: Any) -> None:
    rng = np.random.default_rng(5)
    weights = {"w": rng.normal(size=(9000, 1024)).astype(np.float32)}
    server = serve(faults(calls=2, fail_after=(2, LOST[0])))
    with QuantClient(server.uri, timeout_s=120, retry=AT_ONCE) as client:
        table = client.quantize(weights, "q8_0")
    assert server.faults.seen == 3
    local = flightquant.quantize(weights, "q8_0")
    assert table.column("quantized_data").combine_chunks().equals(local.column("quantized_data").combine_chunks())


@pytest.mark.parametrize(
    "refused", [flight.FlightServerError("invalid_request: no"), flight.FlightUnauthenticatedError("who")], ids=repr
)
def test_what_would_fail_again_is_not_repeated(serve: Serve, faults: Any, refused: Exception) -> None:
    server = serve(faults(fail_after=(3, refused)))
    with QuantClient(server.uri, timeout_s=60, retry=AT_ONCE) as client, pytest.raises((ValueError, PermissionError)):
        client.quantize(layers(), "int4")
    assert server.faults.seen == 1


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [*zip(LOST, (UnavailableError, UnavailableError, OverloadedError, DrainingError), strict=True)],
)
def test_patience_ends_with_the_last_failure(serve: Serve, faults: Any, sent: Exception, wanted: type) -> None:
    server = serve(faults(fail_after=(0, sent)))
    impatient = Retry(patience_s=0.2, first_s=0.05)
    with QuantClient(server.uri, timeout_s=60, retry=impatient) as client, pytest.raises(wanted):
        client.quantize(layers(), "int4")
    assert server.faults.seen > 1


def test_an_end_message_that_never_comes_is_no_success(serve: Serve, faults: Any) -> None:
    impatient = Retry(patience_s=0.2, first_s=0.05)
    with QuantClient(serve(faults(no_end=True)).uri, retry=impatient) as client, pytest.raises(StreamCutError):
        client.quantize(layers(), "int4")


def test_an_answer_to_another_layer_is_refused(serve: Serve, faults: Any) -> None:
    server = serve(faults(extra_batch=True))
    with (
        QuantClient(server.uri, retry=None) as client,
        pytest.raises(StreamCutError, match=r"other layers|without a request"),
    ):
        client.quantize(layers(), "int4")


def test_a_server_that_goes_silent_counts_as_lost(serve: Serve, faults: Any) -> None:
    given, server = layers(), serve(faults(calls=1, hang_after=3))
    with QuantClient(server.uri, retry=AT_ONCE, stall_s=0.5) as client:
        check_whole(client.quantize(given, "int4"), given)
    assert server.faults.seen == 2


def test_a_caller_that_takes_its_time_is_no_lost_server(serve: Serve) -> None:
    def slow() -> Iterator[pa.RecordBatch]:
        for batch in layers(3):
            yield batch
            time.sleep(0.6)

    server = serve()
    with QuantClient(server.uri, retry=None, stall_s=0.3) as client:
        assert client.quantize(slow(), "int4").num_rows == 3
    assert server.faults.seen == 1


def test_the_deadline_holds_over_all_attempts(serve: Serve, faults: Any) -> None:
    server = serve(faults(fail_after=(0, LOST[0])))
    with QuantClient(server.uri, timeout_s=0.5) as client, pytest.raises(DeadlineError, match="connection is gone"):
        client.quantize(layers(), "int4")


def test_the_callers_own_error_is_its_own_even_after_a_loss(serve: Serve, faults: Any) -> None:
    def broken() -> Iterator[pa.RecordBatch]:
        yield from layers(5)
        raise UnavailableError("the caller's bucket is gone")

    server = serve(faults(calls=1, fail_after=(2, LOST[0])))
    with QuantClient(server.uri, retry=AT_ONCE) as client, pytest.raises(UnavailableError, match="bucket"):
        client.quantize(broken(), "int4")


def test_a_server_killed_and_started_again_loses_nothing() -> None:
    given = layers(200)
    with server_process("--metrics-port", "0") as first:
        port = first.location.rsplit(":", 1)[1]
        with QuantClient(first.location, timeout_s=120, window_batches=2) as client:
            stream = client.stream(given, "int4")
            got = [next(stream) for _ in range(50)]
            first.process.kill()
            first.process.wait()
            with server_process("--location", f"grpc://127.0.0.1:{port}"):
                got += list(stream)
    check_whole(pa.Table.from_batches(got), given)


class TestRetry:
    def test_waits_grow_to_their_limit_and_are_spread(self) -> None:
        random.seed(1)
        retry = Retry(first_s=0.1, longest_s=5.0)
        for failures, longest in [(1, 0.1), (2, 0.2), (4, 0.8), (7, 5.0), (5000, 5.0)]:
            waits = {retry.wait_s(failures, None) for _ in range(50)}
            assert len(waits) > 40
            assert longest / 2 <= min(waits) < max(waits) <= longest

    def test_what_the_server_asks_for_is_never_undercut(self) -> None:
        assert all(3.0 < Retry().wait_s(1, 3.0) <= 3.1 for _ in range(50))


class TestReplay:
    def test_an_abandoned_attempt_loses_no_request(self) -> None:
        """Its thread may still wait for the caller's iterator when the next attempt begins."""
        released, pulling = threading.Event(), threading.Event()

        def caller() -> Iterator[Request]:
            yield requests[0]
            pulling.set()
            released.wait(60)
            yield requests[1]

        requests = [Request(batch, 1) for batch in layers(2)]
        replay = Replay(caller())
        abandoned, _ = replay.attempt()
        assert next(abandoned) is requests[0]
        thread = threading.Thread(target=next, args=(abandoned, None))
        thread.start()
        assert pulling.wait(60)
        again, known = replay.attempt()
        released.set()
        assert list(again) == requests
        assert known == 0
        thread.join()

    def test_an_iterator_that_has_raised_does_not_look_exhausted(self) -> None:
        def caller() -> Iterator[Request]:
            raise InvalidRequestError("no")
            yield

        replay = Replay(caller())
        for _ in range(2):
            with pytest.raises(InvalidRequestError):
                next(replay.attempt()[0])


def test_waiting_can_be_ended_from_outside() -> None:
    def attempt(*_: Any) -> Iterator[Answer]:
        raise UnavailableError("gone")
        yield

    def pause(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(answers(attempt, iter([]), Retry(), None, pause))


def test_a_server_that_never_answered_is_tried_for_a_shorter_time() -> None:
    given = iter([Request(batch, 2048) for batch in layers(2)])
    retry = Retry(patience_s=1000, first_s=1, longest_s=1, connect_s=0.5)
    waited: list[float] = []

    def attempt(requests: Iterator[Request], left: float | None, failure: Any) -> Iterator[Answer]:
        raise UnavailableError("nobody there")
        yield

    with pytest.raises(UnavailableError, match="nobody there") as caught:
        list(answers(attempt, given, retry, None, waited.append))
    assert waited == []
    assert "check the address" in caught.value.__notes__[0]


def test_a_server_that_answered_is_waited_for() -> None:
    retry = Retry(patience_s=1000, connect_s=0.5)
    assert retry.patience(UnavailableError("gone"), answered=True) == 1000
    assert retry.patience(UnavailableError("gone"), answered=False) == 0.5
    assert retry.patience(DrainingError("bye"), answered=False) == 1000
    assert Retry().patience(UnavailableError("gone"), answered=False) == 30
