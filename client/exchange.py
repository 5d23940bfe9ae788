"""One ``DoExchange`` with its writer and its reader on two threads, and a bounded window between them.

Flight has no flow control that a single thread could live with: who writes everything and then reads hangs for ever
once some 16 MiB are under way. Here one thread writes while another reads, and the writer waits as soon as a set number
of bytes or batches has been sent whose answers the caller has not taken yet. The caller's own thread only waits on a
queue, so that Ctrl-C and a closed generator end the call at once: to open a stream already takes until the server is
reached, or is found not to be.

Only the reader's thread ends the writing, between two reads. Arrow guards a stream's end by a lock, but not
``done_writing``: a read that finds the stream broken ends the writing too, and when both meet, gRPC is asked for one
operation twice and aborts the process (pyarrow alone does so within a thousand calls, with one thread that reads and
one that ends the writing, when the server fails at about that time). A reader that waits for nothing but the server's
failure, because the caller's own iterator gives nothing, is woken by one row that is asked twice, without its weights.
"""

from __future__ import annotations

import atexit
import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from threading import Condition, Thread
from typing import Any
from weakref import WeakSet

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as flight

from flightquant.client.batching import Request, least_row
from flightquant.client.joining import Answer, read_sums
from flightquant.errors import (
    DeadlineError,
    FlightquantError,
    InternalError,
    InvalidRequestError,
    PermissionDeniedError,
    StreamCutError,
    UnauthenticatedError,
    UnavailableError,
    from_wire,
)
from flightquant.wire import CONTRACT_VERSION, EndMessage

_BROKEN = (flight.FlightError, pa.ArrowException, OSError)
"""What Flight raises for a stream that is broken, refused or ended by the other side."""
JOIN_SECONDS = 10.0
"""How long a call that ended well waits for its threads."""
CANCELLED_SECONDS = 1.0
"""How long a call that failed waits for them: a write into a network that is gone ends with the connection."""
BLOCKED_SECONDS = 0.5
"""How long it waits for a writer that waits for the caller's own iterator, which nothing here can wake."""
SOON_SECONDS = 0.05
"""How long the reader waits for something to read before it reads in any case, to hear that the server failed."""
WAKE_SECONDS = 0.25
"""How long the caller's thread may sleep: Python runs signal handlers there alone, and a signal that another thread
takes, or that comes just before a wait begins, does not end the wait."""
STALL_SECONDS = 120.0
"""How long a request may wait for its answer before the connection counts as lost: packets may vanish in silence."""


class Window:
    """How much may be under way: the writer enters each request, the caller leaves it when its answer is taken."""

    def __init__(self, max_bytes: int, max_batches: int) -> None:
        self._max_bytes = max_bytes
        self._max_batches = max_batches
        self._bytes = 0
        self._batches = 0
        self._closed = False
        self._changed = Condition()

    def enter(self, nbytes: int) -> bool:
        """Wait for room; False once the window is closed. A request larger than the window goes alone."""

        def free() -> bool:
            room = self._bytes + nbytes <= self._max_bytes and self._batches < self._max_batches
            return self._closed or self._batches == 0 or room

        with self._changed:
            self._changed.wait_for(free)
            if self._closed:
                return False
            self._bytes += nbytes
            self._batches += 1
            return True

    def leave(self, nbytes: int) -> None:
        """Give back the room of one request."""
        with self._changed:
            self._bytes -= nbytes
            self._batches -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Exchange:
    """One call: iterate over it once for its answers, in the order of the requests.

    Parameters
    ----------
    stall_s : float
        Seconds without an answer, while one is due, after which the server counts as lost.

    Raises
    ------
    StreamCutError
        While iterating: an answer too few or too many, a row count that differs, no end message.
    FlightquantError
        While iterating: what the server or the connection said, as one of our errors.
    """

    def __init__(
        self,
        client: flight.FlightClient,
        command: bytes,
        options: flight.FlightCallOptions,
        requests: Iterator[Request],
        window: Window,
        stall_s: float = STALL_SECONDS,
    ) -> None:
        self._stall_s = stall_s
        self._client = client
        self._command = command
        self._options = options
        self._requests = requests
        self._window = window
        self._sent: deque[Request] = deque()
        self._events: SimpleQueue[Answer | BaseException | None] = SimpleQueue()
        self._rows = 0
        self._batches = 0
        self._all_sent = False
        self._pulling = False
        self._writing = False
        self._reading = False
        self._twice: Request | None = None
        self._heard = 0.0
        self._write_error: BaseException | None = None
        self._changed = Condition()
        self._cancelled = False
        self._opened: tuple[flight.FlightStreamWriter, flight.FlightStreamReader] | None = None
        self._threads: list[Thread] = []
        self.end: EndMessage | None = None

    def __iter__(self) -> Iterator[Answer]:
        first = next(self._requests, None)
        if first is None:
            return
        self._heard = time.monotonic()
        ended = False
        live.add(self)
        try:
            self._start(partial(self._read, first), "flightquant-reader")
            while (event := self._next_event()) is not None:
                if isinstance(event, BaseException):
                    raise event
                self._window.leave(event.request.nbytes)
                yield event
            ended = True
        finally:
            self._window.close()
            if not ended:
                self._cancel()
            blocked = self._pulling or self._opened is None
            patience_s = JOIN_SECONDS if ended else BLOCKED_SECONDS if blocked else CANCELLED_SECONDS
            self._join(time.monotonic() + patience_s)
            if not any(thread.is_alive() for thread in self._threads):
                live.discard(self)
                if self._opened is not None:
                    with contextlib.suppress(*_BROKEN):
                        self._opened[0].close()

    def cancel(self, error: BaseException) -> None:
        """End the call from another thread: ``error`` is raised where it is iterated over."""
        self._events.put(error)

    @staticmethod
    def end_all() -> None:
        """End the calls that the interpreter's end finds: a thread that Flight gives back later aborts the process."""
        calls = list(live)
        for call in calls:
            call._window.close()
            call._cancel()
        until = time.monotonic() + BLOCKED_SECONDS
        for call in calls:
            call._join(until)

    def _join(self, until: float) -> None:
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _next_event(self) -> Answer | BaseException | None:
        while True:
            try:
                return self._events.get(timeout=min(WAKE_SECONDS, self._stall_s))
            except Empty:
                # While the caller's own iterator gives nothing, nothing is due; after it, the end message is.
                due = self._opened is None or bool(self._sent) or self._all_sent
                if due and time.monotonic() - self._heard >= self._stall_s:
                    return UnavailableError(f"the server was lost: no answer for {self._stall_s:g} s")

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _open(self, first: Request) -> tuple[flight.FlightStreamWriter, flight.FlightStreamReader] | None:
        """Open the stream and start to write; None if the call is over meanwhile."""
        descriptor = flight.FlightDescriptor.for_command(self._command)
        writer, reader = self._client.do_exchange(descriptor, self._options)
        with self._changed:
            if self._cancelled:
                reader.cancel()
                with contextlib.suppress(*_BROKEN):
                    writer.close()
                return None
            self._opened = writer, reader
            self._start(partial(self._write, writer, first), "flightquant-writer")
        return writer, reader

    def _write(self, writer: flight.FlightStreamWriter, first: Request) -> None:
        schema = first.batch.schema
        try:
            request: Request | None = first
            while request is not None:
                if not request.batch.schema.equals(schema):
                    raise InvalidRequestError(
                        f"the schema changes in mid-stream, at layer {request.names[0]!r}", field="schema"
                    )
                if not self._window.enter(request.nbytes):
                    return
                if not self._put(writer, request):
                    return
                last = request
                self._pulling = True
                request = next(self._requests, None)
                self._pulling = False
            while not self._end_sending():
                self._twice = self._twice or Request(least_row(last.batch), 0)
                if not self._put(writer, self._twice):
                    return
        except BaseException as error:  # the caller's own iterator: its error is raised in the caller's thread
            self._events.put(error)

    def _put(self, writer: flight.FlightStreamWriter, request: Request) -> bool:
        """Write one request; False if the stream is broken or ended: the reader knows why, and tells it better."""
        if not self._sent:
            self._heard = time.monotonic()
        with self._changed:
            self._writing = True
            self._sent.append(request)
        self._rows += request.batch.num_rows
        self._batches += 1
        error: BaseException | None = None
        try:
            if self._batches == 1:
                writer.begin(request.batch.schema)
            writer.write_batch(request.batch)
        except _BROKEN as broken:
            error = broken
        with self._changed:
            self._writing = False
            self._write_error = error
            self._changed.notify()
        return error is None

    def _cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify()
        if self._opened is not None:
            self._opened[1].cancel()

    def _end_sending(self) -> bool:
        """Have the reader end the writing; False if it reads while nothing is due, and so cannot."""
        with self._changed:
            if self._reading and not self._sent:
                return False
            self._heard = time.monotonic()
            self._all_sent = True
            self._changed.notify()
            return True

    def _wait_to_read(self) -> bool:
        """Wait for something to read, but not for long; True if the writing has to be ended first.

        That is so when at most one more answer is due. While more are, to end the writing could block for ever: behind
        requests that the server does not read before somebody reads its answers.
        """

        def over() -> bool:
            return self._all_sent or self._write_error is not None

        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or over() or len(self._sent) > self._writing, SOON_SECONDS)
            self._reading = True
            return over() and not self._cancelled and len(self._sent) <= 1

    def _read(self, first: Request) -> None:
        try:
            if (opened := self._open(first)) is None:
                return
            writer, reader = opened
            written = False
            while True:
                if not written and self._wait_to_read():
                    written = True
                    with contextlib.suppress(*_BROKEN):  # the next read tells why
                        writer.done_writing()
                try:
                    chunk = reader.read_chunk()
                except StopIteration:
                    break
                finally:
                    self._reading = False
                self._take(chunk)
            self._check_end()
            self._events.put(None)
        except FlightquantError as error:  # before OSError, which some of ours are too
            self._events.put(error)
        except _BROKEN as error:
            self._events.put(our_error(error))
        except BaseException as error:  # carried over to the caller's thread
            self._events.put(error)

    def _take(self, chunk: Any) -> None:
        self._heard = time.monotonic()
        if self.end is not None:
            raise StreamCutError("the server went on after its end message")
        if chunk.data is None:
            self.end = EndMessage.from_json(chunk.app_metadata.to_pybytes()) if chunk.app_metadata else None
            if self.end is None:
                raise StreamCutError("the server sent a message that is neither an answer nor an end message")
            return
        if not self._sent:
            raise StreamCutError("the server sent an answer without a request")
        request = self._sent.popleft()
        if chunk.data.num_rows != request.batch.num_rows:
            raise StreamCutError(
                f"the server answered {chunk.data.num_rows} of {request.batch.num_rows} rows of a batch",
                got=chunk.data.num_rows,
                expected=request.batch.num_rows,
            )
        contract = (chunk.data.schema.metadata or {}).get(b"flightquant.contract", b"none").decode(errors="replace")
        if contract != CONTRACT_VERSION:
            raise InternalError(
                f"the server answers by contract {contract}; this client knows {CONTRACT_VERSION}", got=contract
            )
        if not _answers_it(chunk.data, request.batch):
            raise StreamCutError(f"the server answered other layers than {request.names[:3]}")
        if request is not self._twice:
            self._events.put(Answer(request, chunk.data, read_sums(chunk.app_metadata, chunk.data.num_rows)))

    def _check_end(self) -> None:
        if self.end is None:
            raise StreamCutError(f"the stream ended without its end message, {len(self._sent)} batches unanswered")
        if not self._all_sent or (self.end.rows, self.end.batches) != (self._rows, self._batches):
            raise StreamCutError(
                f"the server received {self.end.rows} rows in {self.end.batches} batches; {self._rows} rows in "
                f"{self._batches} batches had been sent{'' if self._all_sent else ' so far'}",
                got=self.end.rows,
                expected=self._rows,
            ) from self._write_error


live: WeakSet[Exchange] = WeakSet()
"""Calls with threads: these hold a call that was left before they ended."""
atexit.register(Exchange.end_all)


def _answers_it(answer: pa.RecordBatch, request: pa.RecordBatch) -> bool:
    """Whether the answer is this request's: Flight can lose a message and go on with the next."""
    return all(
        _plain(answer.column(name)).equals(_plain(request.column(name)))
        for name in ("layer_name", "row_offset")
        if name in request.schema.names and (name == "layer_name" or name in answer.schema.names)
    )


def _plain(column: pa.Array) -> pa.Array:
    return column if column.type == pa.int64() else pc.fill_null(column.cast(pa.utf8()), "")


def our_error(error: BaseException) -> FlightquantError:
    """A Flight, Arrow or socket error as one of ours: by the code that the server sent, else by its class."""
    known = from_wire(_sentence(error), getattr(error, "extra_info", b"") or b"")
    if known is not None:
        return known
    text = _sentence(error)
    if isinstance(error, flight.FlightTimedOutError):
        return DeadlineError(f"the call's time is over: {text}")
    if isinstance(error, flight.FlightUnauthenticatedError):
        return UnauthenticatedError(text)
    if isinstance(error, flight.FlightUnauthorizedError):
        return PermissionDeniedError(text)
    if isinstance(error, flight.FlightUnavailableError | flight.FlightCancelledError | flight.FlightInternalError):
        return UnavailableError(f"the server was lost or cannot be reached: {text}")
    if isinstance(error, OSError):
        return UnavailableError(f"the connection failed: {text}")
    return InternalError(f"the server failed: {text}")


def _sentence(error: BaseException) -> str:
    """What the server said, without what Arrow and gRPC add for their own developers."""
    text = re.sub(r"^Flight (returned|call failed)[\w ,]*, with message: ", "", str(error))
    return re.split(r"\.? (?:Detail:|gRPC client debug context:|Client context:) ", text)[0]
