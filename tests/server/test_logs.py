"""The log: one line an event, whatever a client puts into its texts."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest
from fq_process import command
from pyarrow import flight

from flightquant.server import heap, logs
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
    package_logger.handlers[0].flush()
    (line,) = stream.getvalue().splitlines()
    if form == "json":
        facts = json.loads(line)
        assert facts["error"] == 'a\nb "c" \x1b[31m'
        assert (facts["level"], facts["event"], facts["rows"], facts["bytes_in"]) == ("info", "call", 3, 12)
    else:
        assert ' info call request_id="id-1" ' in line
        assert "rows=3" in line
        assert "\x1b" not in line


def test_what_the_span_sender_says_is_in_the_same_form(package_logger: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logger = logging.getLogger("opentelemetry")
    logger.getChild("sdk").warning("not sent")
    handler = logger.handlers.pop()
    handler.flush()
    assert json.loads(stream.getvalue())["event"] == "not sent"


def test_the_text_form_keeps_to_one_line_too(package_logger: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("error", "text", stream)
    try:
        raise KeyError("x\n2026-11-22 info call forged")
    except KeyError:
        logs.log.exception("a\nb", extra={"fields": {"request_id": "id-1"}})
    package_logger.handlers[0].flush()
    (line,) = stream.getvalue().splitlines()
    assert ' error a b request_id="id-1" traceback="Traceback' in line


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
    package_logger.handlers[0].flush()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["outcome"]) == ("call", "internal")
    assert second["request_id"] == "id-1"
    assert "KeyError" in second["traceback"]


def test_nobody_waits_for_a_log_that_nobody_reads(package_logger: logging.Logger) -> None:
    """Lines beyond what may be kept are dropped, and their number is logged once somebody reads."""

    class Stuck(io.StringIO):
        reads = threading.Event()

        def write(self, text: str) -> int:
            self.reads.wait()
            return super().write(text)

    stream = Stuck()
    writer = logs.Writer(stream, max_lines=5)
    writer.setFormatter(logs.JsonFormatter())
    package_logger.handlers[:] = [writer]
    package_logger.setLevel("INFO")
    for _ in range(20):
        logs.log_call(call())
    stream.reads.set()
    writer.flush()
    logs.log_call(call())
    writer.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    kept = sum(line["event"] == "call" for line in lines)
    (lost,) = [line["lines"] for line in lines if line["event"] == "log lines lost"]
    assert 5 <= kept - 1 <= 6
    assert kept + lost == 21


def test_a_server_whose_log_nobody_reads_serves_and_ends() -> None:
    with subprocess.Popen(
        command("--location", "grpc://127.0.0.1:0", "--metrics-port", "0", "--health-port", "0", "--grace-s", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, heap.VARIABLE: heap.TUNABLES},
    ) as server:
        try:
            assert server.stdout is not None
            location = json.loads(server.stdout.readline())["flight"]
            with flight.connect(location) as client:
                options = flight.FlightCallOptions(timeout=60)
                for _ in range(500):  # 200 KB of lines; a pipe takes 64 KiB
                    assert len(list(client.do_action("version", options))) == 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
