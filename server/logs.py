"""The server's log: one line per event on standard error, as JSON or as text; never weights, never a second line."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from typing import TextIO

from flightquant.server.calls import Call

log = logging.getLogger("flightquant.server")

MAX_LINES = 10_000
FLUSH_S = 1.0


def _record(record: logging.LogRecord) -> dict[str, object]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    line: dict[str, object] = {
        "time": f"{moment}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "event": record.getMessage(),
    }
    line.update(getattr(record, "fields", {}))
    return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a traceback is a string in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = _record(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """``time level event key=value ...``; text values are quoted, so that no client's text can start a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; a traceback is a quoted text in it."""
        line = _record(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        # The event is our own word, or the span sender's, which quotes what a collector answered.
        head = f"{line.pop('time')} {line.pop('level')} {' '.join(str(line.pop('event')).split())}"
        facts = [f"{key}={json.dumps(value, default=str)}" for key, value in line.items() if value is not None]
        return " ".join([head, *facts])


class Writer(logging.Handler):
    """Takes lines from any thread without a wait; one thread of its own writes them.

    A call must wait neither for who reads the log (a pipe that nobody reads would stop the service) nor for the lines
    of others: thousands of threads that wait for one lock, as a flood of calls makes them, cost minutes.

    Parameters
    ----------
    stream : text stream
        Written to and flushed; never closed.
    max_lines : int
        Lines kept for a stream that takes none; what comes then is dropped, and their number logged later.
    """

    def __init__(self, stream: TextIO, max_lines: int = MAX_LINES) -> None:
        super().__init__()
        self._stream = stream
        self._max_lines = max_lines
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def handle(self, record: logging.LogRecord) -> bool:
        """Take the record, without the lock of :class:`logging.Handler`."""
        if self._lines.qsize() >= self._max_lines:
            self._lost += 1
        else:
            self._lines.put(self.format(record))
        return True

    def flush(self) -> None:
        """Return when all that was taken so far is written, or after :data:`FLUSH_S`."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(FLUSH_S)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            lost, self._lost = self._lost, 0
            try:
                self._stream.write(line + "\n")
                if lost:
                    facts = {"msg": "log lines lost", "levelname": "WARNING", "fields": {"lines": lost}}
                    record = logging.makeLogRecord(facts)
                    self._stream.write(self.format(record) + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more, or the stream was closed: the service goes on
                pass


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send the log of this package, from ``level`` on, to ``stream`` (standard error); for a process of its own.

    What OpenTelemetry says of spans that it cannot send comes in the same form.
    """
    # No line names its thread, and to ask for the name of one of gRPC's threads makes an object that stays.
    logging.logThreads = False
    handler = Writer(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name in ("flightquant", "opentelemetry"):
        root = logging.getLogger(name)
        root.handlers[:] = [handler]
        root.setLevel(level.upper())
        root.propagate = False


def log_call(call: Call) -> None:
    """The one line of a call."""
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "trace_id": call.trace_id,
        "method": call.method,
        "op": call.op,
        "scheme": call.scheme,
        "outcome": call.outcome,
        "seconds": round(call.seconds, 6),
        "peer": call.peer,
        "identity": call.identity.name or None,
        "error": call.error,
    }
    if call.totals is not None:
        for name in ("rows", "failed_rows", "batches", "bytes_in", "bytes_out", "bytes_copied", "kernel_ns"):
            fields[name] = getattr(call.totals, name)
    level = logging.ERROR if call.outcome == "internal" else logging.INFO
    log.log(level, "call", extra={"fields": fields})
