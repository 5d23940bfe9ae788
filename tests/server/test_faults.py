"""Whatever is raised in a handler, the client gets a typed error and nothing of what was raised."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_flight import check_error, eventually, exchange, fails, sample
from fq_testing import request
from pyarrow import flight

from flightquant.cython_core.engine import Answer, Engine, Session
from flightquant.errors import (
    DeadlineError,
    FlightquantError,
    InternalError,
    InvalidRequestError,
    StreamCutError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from flightquant.server.app import Server, running_server
from flightquant.server.calls import Call
from flightquant.server.faults import MAX_EXTRA_BYTES, Guard, extra_info

SECRET = "s3cr3t"
PATH = f"/work/{SECRET}/file.py"
BATCH = request({"a": np.ones((1, 32), np.float32)})
COMMAND = {"scheme": "int8"}


class RudeError(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise ValueError(SECRET)

    __repr__ = __str__


def chained() -> Exception:
    """An error with a cause and a context."""
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(PATH) from error
    except ValueError as error:
        return error


UNEXPECTED: list[BaseException] = [
    Exception(SECRET),
    ValueError(PATH),
    TypeError(SECRET),
    KeyError(SECRET),
    IndexError(SECRET),
    AttributeError(SECRET),
    NameError(SECRET),
    AssertionError(SECRET),
    ZeroDivisionError(SECRET),
    OverflowError(SECRET),
    FloatingPointError(SECRET),
    RuntimeError(PATH),
    RecursionError(SECRET),
    NotImplementedError(SECRET),
    MemoryError(SECRET),
    OSError(2, SECRET, PATH),
    FileNotFoundError(2, SECRET, PATH),
    PermissionError(13, SECRET, PATH),
    ConnectionResetError(SECRET),
    BrokenPipeError(SECRET),
    TimeoutError(SECRET),
    EOFError(SECRET),
    ImportError(SECRET, name=SECRET, path=PATH),
    SyntaxError(SECRET, (PATH, 1, 1, SECRET)),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    StopIteration(SECRET),
    StopAsyncIteration(SECRET),
    GeneratorExit(SECRET),
    KeyboardInterrupt(SECRET),
    SystemExit(SECRET),
    BaseException(SECRET),
    ExceptionGroup(SECRET, [ValueError(PATH)]),
    asyncio.CancelledError(SECRET),
    concurrent.futures.BrokenExecutor(SECRET),
    subprocess.CalledProcessError(1, PATH, SECRET, SECRET),
    json.JSONDecodeError(SECRET, PATH, 0),
    np.exceptions.AxisError(SECRET),
    pa.ArrowInvalid(SECRET),
    pa.ArrowKeyError(SECRET),
    pa.ArrowTypeError(SECRET),
    pa.ArrowIndexError(SECRET),
    pa.ArrowNotImplementedError(SECRET),
    pa.ArrowMemoryError(SECRET),
    pa.ArrowCapacityError(SECRET),
    pa.ArrowSerializationError(SECRET),
    flight.FlightError(PATH),
    flight.FlightServerError(PATH, SECRET.encode()),
    flight.FlightInternalError(PATH, SECRET.encode()),
    flight.FlightUnavailableError(PATH, SECRET.encode()),
    InternalError(PATH, got=SECRET),
    StreamCutError(PATH),
    UnavailableError(SECRET),
    FlightquantError(SECRET),
    RudeError(),
    chained(),
]


class FaultySession:
    """A session that raises in the middle of a batch."""

    def __init__(self, session: Session, fault: BaseException) -> None:
        self.schema, self.end, self._fault = session.schema, session.end, fault

    def quantize(self, batch: pa.RecordBatch, should_stop: Any = None) -> Answer:
        raise self._fault


class FaultyEngine(Engine):
    """The real engine, which on demand raises where a call begins or in the middle of it."""

    fault: BaseException | None = None
    at_start = False

    def session(self, schema: pa.Schema, command: Any, limits: Any = None) -> Any:
        session = super().session(schema, command, limits)
        if self.fault is None:
            return session
        if self.at_start:
            raise self.fault
        return FaultySession(session, self.fault)


@pytest.fixture(scope="module")
def faulty() -> Iterator[tuple[Server, FaultyEngine, flight.FlightClient]]:
    engine = FaultyEngine(n_threads=1)
    with running_server(engine=engine) as server, flight.connect(server.location) as client:
        yield server, engine, client
    engine.close()


@pytest.mark.parametrize("at_start", [True, False], ids=["start", "batch"])
@pytest.mark.parametrize("fault", UNEXPECTED, ids=lambda fault: type(fault).__name__)
def test_an_unexpected_error_tells_nothing(
    faulty: Any, fault: BaseException, at_start: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server, engine, client = faulty
    before = sample(server, "exchanges_total", op="quantize", scheme="int8", outcome="internal")
    engine.fault, engine.at_start = fault, at_start
    try:
        failure = fails(client, COMMAND, [BATCH])
    finally:
        engine.fault = None
    assert failure.extra["code"] == "internal"
    assert SECRET not in str(failure.error)
    assert SECRET.encode() not in failure.error.extra_info
    # The log has what the client has not, under the id that the client has.
    assert failure.extra["request_id"] in str(failure.error)
    logged = [record for record in caplog.records if record.getMessage() == "unexpected error"]
    assert [record.fields["request_id"] for record in logged] == [failure.extra["request_id"]]  # type: ignore[attr-defined]
    assert logged[0].exc_info is not None
    assert logged[0].exc_info[1] is fault
    eventually(
        lambda: sample(server, "exchanges_total", op="quantize", scheme="int8", outcome="internal") == before + 1
    )
    assert exchange(client, COMMAND, [BATCH]).end["rows"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        InvalidRequestError("no", field="f", got=1, expected=(1, 2)),
        TooLargeError("no", field="f", got=2, expected=1),
        DeadlineError("no", field="f"),
    ],
    ids=lambda fault: fault.code,
)
def test_an_error_of_ours_arrives_as_it_is(faulty: Any, fault: FlightquantError) -> None:
    _, engine, client = faulty
    engine.fault, engine.at_start = fault, False
    try:
        failure = fails(client, COMMAND, [BATCH], headers={"x-request-id": "my-id-1"})
    finally:
        engine.fault = None
    expected = list(fault.expected) if isinstance(fault.expected, tuple) else fault.expected
    assert failure.extra == {
        "code": fault.code,
        "field": "f",
        "got": fault.got,
        "expected": expected,
        "request_id": "my-id-1",
        "retry_after_s": None,
    }


@pytest.mark.parametrize(
    "text", ["x" * 20_000, "\u20ac" * 20_000, "\n\x00\x1b" * 7000], ids=["ascii", "euro", "control"]
)
def test_a_long_text_is_cut_and_keeps_its_class(faulty: Any, text: str) -> None:
    _, engine, client = faulty
    engine.fault, engine.at_start = InvalidRequestError(text, field=text, got=text, expected=[text] * 100), False
    try:
        failure = fails(client, COMMAND, [BATCH])
    finally:
        engine.fault = None
    assert failure.extra["code"] == "invalid_request"
    assert len(failure.error.extra_info) <= MAX_EXTRA_BYTES


@pytest.mark.parametrize("got", [float("nan"), float("inf"), 10**4000, "x" * 10_000, {"a": 1}, b"\xff"], ids=repr)
def test_extra_info_is_strict_json_and_short(got: Any) -> None:
    raw = extra_info(InvalidRequestError("no", field="f", got=got, expected=["y" * 500] * 200))
    assert len(raw) <= MAX_EXTRA_BYTES
    facts = json.loads(raw, parse_constant=pytest.fail)
    assert facts["code"] == "invalid_request"
    assert facts["field"] == "f"


def test_a_guard_leaves_what_went_well_alone() -> None:
    call = Call("id", "DoExchange")
    with Guard(call) as inner:
        assert inner is call
    assert call.outcome == "ok"


def test_no_trace_of_the_cause_stays_on_what_is_sent() -> None:
    call = Call("id", "DoExchange")
    with pytest.raises(flight.FlightUnauthenticatedError) as caught, Guard(call):
        raise UnauthenticatedError("no identity")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert (call.outcome, call.error) == ("unauthenticated", "no identity")


def test_errors_in_middleware_are_typed_too(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _, client = faulty

    def fail(call: Call) -> None:
        raise KeyError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(server.admission, "enter", fail)
        logging.getLogger("flightquant.server").info("the next error is meant")
        with pytest.raises(flight.FlightInternalError) as caught:
            list(client.list_actions())
    assert check_error(caught.value)["code"] == "internal"
    assert SECRET not in str(caught.value)
