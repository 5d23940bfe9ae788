"""What every call has, wherever it goes: its limits, its end from outside, and its exchanges with one server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event, Lock

import pyarrow as pa
import pyarrow.flight as flight

from flightquant import wire
from flightquant.client.batching import Request
from flightquant.client.connection import Connection, Credentials
from flightquant.client.exchange import WAKE_SECONDS, Exchange, Window
from flightquant.client.joining import Answer
from flightquant.client.retry import Retry
from flightquant.errors import FlightquantError, OverloadedError
from flightquant.spec import Command


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of every call of a client; see :class:`flightquant.client.QuantClient`."""

    timeout_s: float | None
    window_bytes: int
    window_batches: int
    stall_s: float
    retry: Retry | None
    credentials: Credentials
    headers: dict[str, str]

    def shared_by(self, servers: int) -> Settings:
        """The limits of each of so many servers: together they have this window."""
        batches = max(2, self.window_batches // servers)
        return replace(self, window_bytes=self.window_bytes // servers, window_batches=batches)


Progress = Callable[[str, float], None]
"""Called with a layer's name and the share of that layer, above 0 and up to 1, whose answer has arrived."""
Placed = tuple[tuple[int, int], pa.RecordBatch]
"""An answer batch behind its place in the call: the number of its stream, and its number within it."""


class CallCancelledError(Exception):
    """The call was ended from outside; only who ended it sees this."""


class Cancellation:
    """Ends a call from another thread, whatever it waits for."""

    def __init__(self) -> None:
        self._event = Event()
        self._lock = Lock()
        self._callbacks: set[Callable[[BaseException], None]] = set()

    def now(self) -> None:
        """End the call."""
        with self._lock:
            self._event.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback(CallCancelledError())

    def check(self) -> None:
        """Raise if the call is ended."""
        if self._event.is_set():
            raise CallCancelledError

    def pause(self, seconds: float) -> None:
        """Wait; raise as soon as the call is ended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._event.wait(min(left, WAKE_SECONDS)):
                raise CallCancelledError

    @contextmanager
    def telling(self, callback: Callable[[BaseException], None]) -> Iterator[None]:
        """Have ``callback`` called with the error to raise if the call is ended inside the block, or is already."""
        with self._lock:
            self._callbacks.add(callback)
            ended = self._event.is_set()
        try:
            if ended:
                callback(CallCancelledError())
            yield
        finally:
            with self._lock:
                self._callbacks.discard(callback)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: what is asked, until when (:func:`time.monotonic` seconds), who is told, and who may end it."""

    command: Command
    deadline: float | None
    progress: Progress | None
    cancellation: Cancellation


class Attempts:
    """Starts the exchanges of one call with one server, on a new connection after a lost one."""

    def __init__(
        self, connection: Connection, command: Command, settings: Settings, cancellation: Cancellation
    ) -> None:
        self._connection = connection
        self._used = connection.flight
        self._command = command.to_json()
        self._settings = settings
        self._cancellation = cancellation

    def __call__(
        self, requests: Iterator[Request], left_s: float | None, failure: FlightquantError | None
    ) -> Iterator[Answer]:
        """One exchange: answers in the order of the requests; see :data:`flightquant.client.retry.Attempt`."""
        if failure is not None and not isinstance(failure, OverloadedError):
            self._connection.renew(self._used)
        self._used = self._connection.flight
        headers = {**self._settings.headers, **self._settings.credentials.headers(), wire.SUMS_HEADER: "1"}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        options = flight.FlightCallOptions(timeout=left_s, headers=encoded)
        window = Window(self._settings.window_bytes, self._settings.window_batches)
        exchange = Exchange(self._used, self._command, options, requests, window, self._settings.stall_s)
        with self._cancellation.telling(exchange.cancel):
            yield from exchange
