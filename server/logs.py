"""The server's log: one line per event on standard error, as JSON or as text; never weights, never a second line."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

from flightquant.server.calls import Call

log = logging.getLogger("flightquant.server")


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
        """The record as one line, its traceback below."""
        line = _record(record)
        head = f"{line.pop('time')} {line.pop('level')} {line.pop('event')}"
        facts = [f"{key}={json.dumps(value, default=str)}" for key, value in line.items() if value is not None]
        text = " ".join([head, *facts])
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send the log of this package, from ``level`` on, to ``stream`` (standard error); for a process of its own.

    What OpenTelemetry says of spans that it cannot send comes in the same form.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
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
