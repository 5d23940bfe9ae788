"""The log: one line an event, whatever a client puts into its texts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from flightquant.server import logs
from flightquant.server.calls import Call
from flightquant.wire import EndMessage


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("flightquant")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def call() -> Call:
    """A call whose texts try to break the line."""
    made = Call("id-1", "DoExchange", op="quantize", scheme="int4")
    made.totals = EndMessage(rows=3, batches=1, bytes_in=12)
    made.outcome, made.error = "invalid_request", 'a\nb "c" \x1b[31m'
    return made


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_call_is_one_line(package_logger: logging.Logger, form: str) -> None:
    stream = io.StringIO()
    logs.configure("info", form, stream)
    logs.log_call(call())
    (line,) = stream.getvalue().splitlines()
    if form == "json":
        facts = json.loads(line)
        assert facts["error"] == 'a\nb "c" \x1b[31m'
        assert (facts["level"], facts["event"], facts["rows"], facts["bytes_in"]) == ("info", "call", 3, 12)
    else:
        assert ' info call request_id="id-1" ' in line
        assert "rows=3" in line
        assert "\x1b" not in line


def test_a_failure_of_ours_is_an_error_with_its_traceback(package_logger: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("error", "json", stream)
    made = call()
    logs.log_call(made)
    made.outcome = "internal"
    logs.log_call(made)
    try:
        raise KeyError("x")
    except KeyError:
        logs.log.exception("unexpected error", extra={"fields": {"request_id": "id-1"}})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["outcome"]) == ("call", "internal")
    assert second["request_id"] == "id-1"
    assert "KeyError" in second["traceback"]
