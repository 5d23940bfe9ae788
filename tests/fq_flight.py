"""What the server's tests share: a stock Arrow Flight client, nothing of ours, that reports all it was sent."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from flightquant.server.app import Server

FLIGHT_ERRORS = {
    "invalid_request": flight.FlightServerError,
    "too_large": flight.FlightServerError,
    "overloaded": flight.FlightUnavailableError,
    "draining": flight.FlightUnavailableError,
    "deadline": flight.FlightTimedOutError,
    "internal": flight.FlightInternalError,
}
"""The contract's table "Errors", written down a second time."""

EXTRA_KEYS = {"code", "field", "got", "expected", "request_id", "retry_after_s"}
NEVER_SENT = ("Traceback", "traceback", "File ", ".py", ".pyx", "/work", "/usr", "/tmp", "/home", "site-packages")


@dataclass
class Reply:
    """All that one exchange sent: answer batches, the metadata beside them, the end message."""

    schema: pa.Schema | None = None
    batches: list[pa.RecordBatch] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    end: dict[str, Any] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Every answer row, in order."""
        return [row for batch in self.batches for row in batch.to_pylist()]

    def take(self, chunk: Any) -> None:
        """Count one chunk in; nothing may follow the end message."""
        assert self.end is None
        if chunk.data is None:
            self.end = json.loads(chunk.app_metadata.to_pybytes())
            return
        self.batches.append(chunk.data)
        if chunk.app_metadata is not None:
            self.metadata.append(chunk.app_metadata.to_pybytes())


def descriptor(command: Mapping[str, Any] | bytes) -> flight.FlightDescriptor:
    """A command descriptor of this JSON object, or of these bytes as they are."""
    return flight.FlightDescriptor.for_command(command if isinstance(command, bytes) else json.dumps(command))


def options(headers: Mapping[str, str] | None = None, timeout: float = 60.0) -> flight.FlightCallOptions:
    """Call options with these headers and a deadline, so that no test hangs."""
    return flight.FlightCallOptions(
        timeout=timeout, headers=[(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    )


@contextmanager
def open_exchange(
    client: flight.FlightClient, what: Any, schema: pa.Schema | None, headers: Mapping[str, str] | None = None
) -> Any:
    """An exchange whose schema is sent; its close never raises."""
    chosen = what if isinstance(what, flight.FlightDescriptor) else descriptor(what)
    writer, reader = client.do_exchange(chosen, options(headers))
    try:
        if schema is not None:
            with suppress(pa.ArrowException):
                writer.begin(schema)
        yield writer, reader
    finally:
        with suppress(pa.ArrowException, OSError):
            writer.close()


def exchange(
    client: flight.FlightClient,
    command: Any,
    batches: Iterable[pa.RecordBatch],
    *,
    schema: pa.Schema | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One whole exchange on one thread with a window of one batch: write one, read one."""
    sent = list(batches)
    reply = Reply()
    with open_exchange(client, command, schema or sent[0].schema, headers) as (writer, reader):
        with suppress(StopIteration):
            _run(writer, reader, sent, reply)
        reply.schema = reader.schema
    return reply


def _run(writer: Any, reader: Any, batches: Iterable[pa.RecordBatch], reply: Reply) -> None:
    for batch in batches:
        writer.write_batch(batch)
        reply.take(reader.read_chunk())
    writer.done_writing()
    while True:
        reply.take(reader.read_chunk())


@dataclass
class Failure:
    """What a failed call gave its client, and what came before."""

    error: flight.FlightError
    extra: dict[str, Any]
    reply: Reply


def fails(
    client: flight.FlightClient,
    command: Any,
    batches: Iterable[pa.RecordBatch] = (),
    *,
    schema: pa.Schema | None = None,
    headers: Mapping[str, str] | None = None,
) -> Failure:
    """Run an exchange that must fail, and check what holds for every failure."""
    reply = Reply()
    if schema is None:
        first = list(itertools.islice(batches, 1))
        schema = first[0].schema if first else None
        batches = batches if isinstance(batches, list) else itertools.chain(first, batches)
    # A refusal on the headers may arrive before the call is open.
    with (
        pytest.raises(pa.ArrowException) as caught,
        open_exchange(client, command, schema, headers) as (writer, reader),
    ):
        _run(writer, reader, batches, reply)
    assert reply.end is None
    return Failure(caught.value, check_error(caught.value), reply)


def check_error(error: Exception) -> dict[str, Any]:
    """What the contract says of every error: class, text, ``extra_info``; and that it gives nothing away."""
    assert isinstance(error, flight.FlightError), f"{type(error).__name__}: {error}"
    extra = json.loads(error.extra_info)
    assert set(extra) == EXTRA_KEYS
    assert type(error) is FLIGHT_ERRORS[extra["code"]]
    text = str(error)
    assert text.startswith(extra["code"] + ": "), text
    assert len(text.split(". Detail: ")[0].encode()) < 1024
    assert extra["request_id"]
    for word in NEVER_SENT:
        assert word not in text
        assert word.encode() not in error.extra_info
    return extra


def eventually(holds: Callable[[], Any], what: str = "", timeout_s: float = 20.0) -> None:
    """Wait for something that another thread does."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, what or "it did not happen"
        time.sleep(0.01)


def sample(server: Server, name: str, **labels: str) -> float:
    """A metric's value in the server's registry; it must exist."""
    value = server.registry.get_sample_value(f"flightquant_{name}", labels)
    assert value is not None, f"{name} {labels} does not exist"
    return value
