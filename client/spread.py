"""One call over several servers: each takes layers as fast as it answers them; what a dead one held goes to the others.

Every server has a lane: a thread with one exchange at a time, fed from a common pool. A layer that is sent in parts
stays in one lane, where its answers are joined. A lane whose exchange fails gives its unanswered layers back and tries
again after a wait, as long as the call lasts. The call fails when all lanes fail for the retry's patience, or when an
error is the caller's own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Condition, Lock, Semaphore, Thread

import pyarrow as pa

from flightquant.client.batching import Request
from flightquant.client.calls import Attempts, CallCancelledError, Cancellation
from flightquant.client.exchange import BLOCKED_SECONDS, WAKE_SECONDS
from flightquant.client.joining import Answer, join
from flightquant.client.retry import Retry, is_lost, late
from flightquant.errors import FlightquantError

log = logging.getLogger("flightquant.client")

JOIN_SECONDS = 15.0
"""How long an ended call waits for its lanes."""
ANSWERS_AHEAD = 4
"""Answers of each lane that may wait for the caller to take them."""


@dataclass(slots=True)
class Unit:
    """What goes to one server as a whole: a message of layers, or all parts of one layer.

    Attributes
    ----------
    index : int
        Its place in the call.
    known : bool
        Whether its answer has been given on: it is sent again only for an end message to confirm it.
    """

    index: int
    requests: list[Request]
    known: bool = False


def units(requests: Iterator[Request]) -> Iterator[Unit]:
    """The requests in units, the parts of a layer together: a layer that was cut is held as a whole."""
    index = 0
    parts: list[Request] = []
    for request in requests:
        parts.append(request)
        if request.part is None or request.part.ends:
            yield Unit(index, parts)
            index, parts = index + 1, []


@dataclass(slots=True)
class Turn:
    """One exchange of a lane: the units that it has taken and not answered, in order.

    After a failure it is ``probing``: until its first answer it takes one unit and leaves the rest to the others.
    """

    held: deque[Unit] = field(default_factory=deque)
    probing: bool = False
    last: Unit | None = None
    over: bool = False


class Pool:
    """The call's units, taken by lanes and given back by those that fail."""

    def __init__(self, source: Iterator[Unit]) -> None:
        self._source = source
        self._returned: deque[Unit] = deque()
        self._unanswered = 0
        self._turns = 0
        self._pulling = False
        self._exhausted = False
        self._closed = False
        self._changed = Condition()
        self.failure: BaseException | None = None
        self.last_answer = time.monotonic()
        self.answered = False

    def begin(self, *, probing: bool) -> Turn | None:
        """Wait for something to do; None once everything is answered and confirmed, or the call is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or self._returned or not self._exhausted)
            if self._is_over():
                return None
            self._turns += 1
            return Turn(probing=probing)

    def feed(self, turn: Turn) -> Iterator[Request]:
        """Requests for a turn, until there are no more.

        Raises
        ------
        CallCancelledError
            The turn is over.
        """
        while (unit := self._take(turn)) is not None:
            yield from unit.requests

    def _take(self, turn: Turn) -> Unit | None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: turn.over or self._closed or self._may_take(turn))
                if turn.over or self._closed:
                    # Not an end like any other: who says to Flight that all is written while the stream is cancelled
                    # takes the process down with it.
                    raise CallCancelledError
                if self._returned:
                    return self._hold(turn, self._returned.popleft())
                if self._exhausted:
                    return None
                self._pulling = True
            try:
                unit = next(self._source, None)
            except BaseException as error:
                self.failure = error
                self._closed = True
                raise
            finally:
                with self._changed:
                    self._pulling = False
                    self._changed.notify_all()
            with self._changed:
                if unit is None:
                    self._exhausted = True
                else:
                    # The turn may be over by now; then this is for the next who asks.
                    self._returned.append(unit)
                self._changed.notify_all()

    def _may_take(self, turn: Turn) -> bool:
        if turn.probing and turn.held:
            return False
        if self._returned:
            return True
        return self._unanswered == 0 if self._exhausted else not self._pulling

    def _hold(self, turn: Turn, unit: Unit) -> Unit:
        self._unanswered += 1
        turn.held.append(unit)
        return unit

    def answer(self, turn: Turn) -> Unit:
        """The unit whose answer has come."""
        with self._changed:
            self.last_answer = time.monotonic()
            self.answered = True
            turn.last = unit = turn.held.popleft()
            turn.probing = False
            self._unanswered -= 1
            self._changed.notify_all()
            return unit

    def end(self, turn: Turn, *, failed: bool) -> None:
        """A turn is over; what it held goes back."""
        with self._changed:
            turn.over = True
            if failed and not turn.held and turn.last is not None:
                # All was answered, but no end message says so.
                turn.last.known = True
                turn.held.append(turn.last)
                self._unanswered += 1
            self._unanswered -= len(turn.held)
            self._returned.extendleft(reversed(turn.held))
            self._turns -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """End all turns."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the call is over."""
        return self._closed

    @property
    def pulling(self) -> bool:
        """Whether a thread waits for the caller's own iterator, which nothing here can wake."""
        return self._pulling

    def wait(self, seconds: float) -> None:
        """Wait, but not beyond the end of the call."""
        with self._changed:
            self._changed.wait_for(self._is_over, seconds)

    def _is_over(self) -> bool:
        done = self._exhausted and not self._returned and not self._unanswered and not self._turns
        return self._closed or done


class Spread:
    """One call: iterate over it once for ``(place, answer batch)``, in the order in which answers come.

    Parameters
    ----------
    lanes : sequence of callable
        For each server what starts its exchanges, given the cancellation that ends them.
    deadline : float or None
        In :func:`time.monotonic` seconds.
    """

    def __init__(
        self,
        lanes: Sequence[Callable[[Cancellation], Attempts]],
        requests: Iterator[Request],
        retry: Retry | None,
        deadline: float | None,
        cancellation: Cancellation,
    ) -> None:
        self._pool = Pool(units(requests))
        self._retry = retry
        self._deadline = deadline
        self._outer = cancellation
        self._inner = Cancellation()
        self._events: SimpleQueue[tuple[int, pa.RecordBatch] | BaseException | None] = SimpleQueue()
        self._room = Semaphore(ANSWERS_AHEAD * len(lanes))
        self._living = set(range(len(lanes)))
        self._failing: set[int] = set()
        self._counting = Lock()
        self._threads = [
            Thread(target=self._run, args=(number, lane(self._inner)), name="flightquant-lane", daemon=True)
            for number, lane in enumerate(lanes)
        ]

    def __iter__(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        with self._outer.telling(self._events.put):
            try:
                for thread in self._threads:
                    thread.start()
                while (event := self._next_event()) is not None:
                    if isinstance(event, BaseException):
                        raise self._pool.failure or event
                    self._room.release()
                    yield event
                if self._pool.failure is not None:
                    raise self._pool.failure
            finally:
                self._pool.close()
                self._inner.now()
                until = time.monotonic() + (BLOCKED_SECONDS if self._pool.pulling else JOIN_SECONDS)
                for thread in self._threads:
                    if thread.ident is not None:
                        thread.join(max(0.0, until - time.monotonic()))

    def _next_event(self) -> tuple[int, pa.RecordBatch] | BaseException | None:
        while True:
            with contextlib.suppress(Empty):
                return self._events.get(timeout=WAKE_SECONDS)

    def _run(self, lane: int, attempts: Attempts) -> None:
        failure: FlightquantError | None = None
        failures, since = 0, 0.0
        try:
            while (turn := self._pool.begin(probing=failure is not None)) is not None:
                failed = True
                before = self._pool.last_answer
                try:
                    left = self._left(failure)
                    self._take_answers(lane, turn, attempts(self._pool.feed(turn), left, failure))
                    failed, failure, failures = False, None, 0
                except FlightquantError as error:
                    if error is self._pool.failure or not is_lost(error, self._pool.last_answer > before):
                        raise
                    failures = 1 if turn.last is not None else failures + 1
                    since = time.monotonic() if failures == 1 else since
                    failure = error
                finally:
                    self._pool.end(turn, failed=failed)
                if failure is not None and not self._wait(lane, failure, failures, since):
                    break
            else:
                failure = None
        except BaseException as error:  # carried over to the caller's thread
            self._events.put(error)
        finally:
            with self._counting:
                self._living.discard(lane)
                if not self._living:
                    self._events.put(failure)

    def _left(self, failure: FlightquantError | None) -> float | None:
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise late(failure)
        return left

    def _take_answers(self, lane: int, turn: Turn, answers: Iterator[Answer]) -> None:
        try:
            for batch in join(answers):
                unit = self._pool.answer(turn)
                self._failing.discard(lane)
                if unit.known:
                    continue
                while not self._room.acquire(timeout=0.2):
                    if self._pool.closed:
                        return
                self._events.put((unit.index, batch))
        finally:
            answers.close()  # type: ignore[attr-defined]

    def _wait(self, lane: int, failure: FlightquantError, failures: int, since: float) -> bool:
        """Wait before the lane's next turn; False if it has none."""
        if self._retry is None:
            return False
        wait = self._retry.wait_s(failures, failure.retry_after_s)
        with self._counting:
            self._failing.add(lane)
            all_fail = self._failing >= self._living
        patience = self._retry.patience(failure, answered=self._pool.answered)
        if all_fail and time.monotonic() + wait - max(since, self._pool.last_answer) > patience:
            raise failure
        log.warning("%s; again in %.1f s, other servers go on", failure, wait)
        self._pool.wait(wait)
        return True
