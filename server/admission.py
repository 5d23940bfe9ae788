"""Who may come in, and how much they may hold: calls and bytes in flight, counted for the whole process."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flightquant.errors import DeadlineError, DrainingError, OverloadedError
from flightquant.server.calls import Call

RETRY_AFTER_S = 1.0
POLL_S = 0.1
OPEN_FACTOR = 8
"""Calls that are open, silent ones included, may be so many times those that may run: each has a thread."""


class Admission:
    """Counts calls and bytes, and refuses what would be too much, before its body is read.

    A call that finds no room waits in a queue for a while; whose identity has the fewest running calls comes first. A
    call that was let in is never refused for bytes: it waits before its next read while the process holds more than
    its share. Every call may then hold one batch more, so what is held stays under ``max_bytes`` and one batch a call.

    A call whose client sends nothing for ``idle_s`` gives its place away as soon as another needs it. Nothing can wake
    its thread, which waits for the client; when the client speaks again the call ends with ``deadline``.

    Parameters
    ----------
    max_calls : int
        Calls at once.
    max_bytes : int
        Bytes of batches held at once.
    max_queued : int
        Calls that may wait to be let in.
    queue_s : float
        Seconds that one may wait.
    idle_s : float
        Seconds without a message after which a call is idle.
    """

    def __init__(
        self, max_calls: int, max_bytes: int, max_queued: int = 0, queue_s: float = 0.0, idle_s: float = math.inf
    ) -> None:
        self.max_calls = max_calls
        self.max_bytes = max_bytes
        self.idle_s = idle_s
        self._max_queued = max_queued
        self._queue_s = queue_s
        self._changed = threading.Condition()
        self._running: dict[int, Call] = {}
        self._queue: list[Call] = []
        self._silent = 0
        self._peak = 0
        self._bytes = 0
        self._waiting = 0
        self._draining = False
        self._ending = threading.Event()

    @property
    def calls(self) -> int:
        """Calls in flight."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Calls that wait to be let in."""
        return len(self._queue)

    @property
    def silent(self) -> int:
        """Calls that gave their place away, and whose client has not spoken since."""
        return self._silent

    @property
    def peak_calls(self) -> int:
        """Most calls that were ever in flight at once."""
        return self._peak

    @property
    def bytes_held(self) -> int:
        """Bytes of batches held by all calls."""
        return self._bytes

    @property
    def waiting(self) -> int:
        """Calls that wait for bytes before they read on."""
        return self._waiting

    @property
    def ending(self) -> bool:
        """Whether running calls are to end at their next step: the grace period is nearly over."""
        return self._ending.is_set()

    def drain(self) -> None:
        """Refuse every new call from now on; running ones go on."""
        self._draining = True

    def end_calls(self) -> None:
        """Ask the running calls to end with ``draining``."""
        self._ending.set()

    def enter(self, call: Call) -> None:
        """Let a call in, now or after a wait in the queue.

        Raises
        ------
        DrainingError
            The server is about to stop.
        OverloadedError
            There are too many calls, or the calls hold too many bytes, and there is no room in the queue or was none in
            time.
        """
        with self._changed:
            self._check_draining()
            refusal = self._refusal()
            if refusal is not None or self._queue:
                if len(self._queue) >= self._max_queued:
                    raise refusal or self._overloaded("max_queued", len(self._queue), self._max_queued)
                self._wait_in_queue(call)
            self._running[id(call)] = call
            self._peak = max(self._peak, len(self._running))
            call.admitted = True

    def _wait_in_queue(self, call: Call) -> None:
        self._queue.append(call)
        until = time.monotonic() + self._queue_s
        try:
            while True:
                refusal = self._refusal()
                if refusal is None and call is self._first():
                    return
                left = until - time.monotonic()
                if left <= 0:
                    raise refusal or self._overloaded("max_queued", len(self._queue), self._max_queued)
                self._changed.wait(min(left, POLL_S))
                self._check_draining()
        finally:
            # By identity: calls are equal if they say the same.
            self._queue = [other for other in self._queue if other is not call]
            self._changed.notify_all()

    def _first(self) -> Call:
        """Of those who wait, who came first of the identity with the fewest running calls."""
        running = Counter(call.identity.name for call in self._running.values())
        return min(self._queue, key=lambda call: running[call.identity.name])

    def _check_draining(self) -> None:
        if self._draining:
            raise DrainingError("the server is stopping; repeat the call elsewhere", retry_after_s=RETRY_AFTER_S)

    def _refusal(self) -> OverloadedError | None:
        """Why no call can come in now; None if one can."""
        if self._bytes >= self.max_bytes:
            return self._overloaded("max_bytes_in_flight", self._bytes, self.max_bytes)
        if len(self._running) >= self.max_calls:
            self._take_back()
        if len(self._running) >= self.max_calls:
            return self._overloaded("max_calls", len(self._running), self.max_calls)
        if len(self._running) + self._silent >= self.max_calls * OPEN_FACTOR:
            return self._overloaded("max_calls", len(self._running) + self._silent, self.max_calls * OPEN_FACTOR)
        return None

    def _take_back(self) -> None:
        """Take the places of calls whose clients have been silent for too long."""
        until = time.monotonic() - self.idle_s
        for call in [call for call in self._running.values() if call.silent_since < until]:
            del self._running[id(call)]
            call.admitted = False
            call.gave_place = True
            self._silent += 1

    @staticmethod
    def _overloaded(field: str, got: int, limit: int) -> OverloadedError:
        what = {
            "max_calls": "calls are running or open",
            "max_bytes_in_flight": "bytes are held by running calls",
            "max_queued": "calls wait to be let in",
        }[field]
        return OverloadedError(
            f"{got} {what}, the server's limit is {limit}; repeat in {RETRY_AFTER_S:g} s",
            field=field,
            got=got,
            expected=limit,
            retry_after_s=RETRY_AFTER_S,
        )

    def leave(self, call: Call) -> None:
        """The call is over: it counts no longer, nor does what it held."""
        self.hold(call, 0)
        with self._changed:
            if self._running.pop(id(call), None) is not None:
                call.admitted = False
            elif call.gave_place:
                self._silent -= 1
                call.gave_place = False
            self._changed.notify_all()

    @contextmanager
    def listening(self, call: Call) -> Iterator[None]:
        """While the call waits for its client to say something.

        Raises
        ------
        DeadlineError
            At the end: the client was silent for longer than ``idle_s``.
        """
        started = call.silent_since = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                call.silent_since = math.inf
                gone = call.gave_place
        if gone or time.monotonic() - started > self.idle_s:
            raise DeadlineError(
                f"the client sent nothing for more than {self.idle_s:g} s, the server's limit",
                field="idle_timeout_s",
                expected=self.idle_s,
            )

    def hold(self, call: Call, nbytes: int) -> None:
        """The call holds ``nbytes`` of batches from now on, in place of what it held before."""
        with self._changed:
            self._bytes += nbytes - call.bytes_held
            grew = nbytes > call.bytes_held
            call.bytes_held = nbytes
            if not grew:
                self._changed.notify_all()

    def wait_for_room(self, check: Callable[[], None]) -> None:
        """Return when another batch may be read.

        Parameters
        ----------
        check : callable
            Called ten times a second while waiting; what it raises ends the wait.
        """
        with self._changed:
            if self._bytes < self.max_bytes:
                return
            self._waiting += 1
            try:
                while self._bytes >= self.max_bytes:
                    check()
                    self._changed.wait(POLL_S)
            finally:
                self._waiting -= 1
