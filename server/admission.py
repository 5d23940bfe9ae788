"""Who may come in, and how much they may hold: calls and bytes in flight, counted for the whole process."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from flightquant.errors import DeadlineError, DrainingError, OverloadedError
from flightquant.server.calls import Call
from flightquant.server.crowd import Crowd

RETRY_AFTER_S = 1.0
POLL_S = 0.1
OPEN_FACTOR = 8
"""Calls that are open, silent ones included, may be so many times those that may run: each has a thread."""


@dataclass(frozen=True, eq=False, slots=True)
class _Queued:
    """A call that waits to be let in, and what it is woken by."""

    call: Call
    turn: threading.Condition


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
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._running: dict[int, Call] = {}
        self._queue: list[_Queued] = []
        self._silent = 0
        self._peak = 0
        self._bytes = 0
        self._waiting = 0
        self._draining = False
        self._ending = threading.Event()
        self._crowd = Crowd()

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
    def computing(self) -> int:
        """Calls that have a batch in the engine."""
        with self._lock:
            return sum(call.computing for call in self._running.values())

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
        self._crowd.close()

    def end_calls(self) -> None:
        """Ask the running calls to end with ``draining``."""
        self._ending.set()

    def came(self) -> None:
        """Told of every call, before it is known whose it is."""
        self._crowd.came()

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
        self._check_draining()
        # Without the lock: thousands of refused calls, as a flood brings them, must not stand in line for it.
        reached = self._reached()
        if reached is not None and len(self._queue) >= self._max_queued and not self._idle():
            raise self._overloaded(*reached)
        with self._lock:
            self._check_draining()
            self._take_back()
            reached = self._reached()
            if reached is not None or self._queue:
                if len(self._queue) >= self._max_queued:
                    raise self._overloaded(*(reached or ("max_queued", len(self._queue), self._max_queued)))
                self._wait_in_queue(call)
            else:
                self._running[id(call)] = call
            self._peak = max(self._peak, len(self._running))
            call.admitted = True
        self._crowd.found_room()

    def _wait_in_queue(self, call: Call) -> None:
        queued = _Queued(call, threading.Condition(self._lock))
        self._queue.append(queued)
        until = time.monotonic() + self._queue_s
        try:
            while True:
                self._take_back()
                reached = self._reached()
                if reached is None and queued is self._first():
                    self._running[id(call)] = call
                    return
                left = until - time.monotonic()
                if left <= 0:
                    raise self._overloaded(*(reached or ("max_queued", len(self._queue), self._max_queued)))
                queued.turn.wait(min(left, POLL_S))
                self._check_draining()
        finally:
            self._queue.remove(queued)
            self._call_first()

    def _first(self) -> _Queued:
        """Of those who wait, who came first of the identity with the fewest running calls."""
        running = Counter(call.identity.name for call in self._running.values())
        return min(self._queue, key=lambda queued: running[queued.call.identity.name])

    def _call_first(self) -> None:
        """Wake the one that can come in now, if any: waking all of them for one place costs more than the calls do."""
        if self._queue and self._reached() is None:
            self._first().turn.notify()

    def _check_draining(self) -> None:
        if self._draining:
            raise DrainingError("the server is stopping; repeat the call elsewhere", retry_after_s=RETRY_AFTER_S)

    def _reached(self) -> tuple[str, int, int] | None:
        """The limit that keeps calls from coming in now: its name, what there is, and it; None if there is room."""
        running = len(self._running)
        if self._bytes >= self.max_bytes:
            return "max_bytes_in_flight", self._bytes, self.max_bytes
        if running >= self.max_calls:
            return "max_calls", running, self.max_calls
        if running + self._silent >= self.max_calls * OPEN_FACTOR:
            return "max_calls", running + self._silent, self.max_calls * OPEN_FACTOR
        return None

    def _idle(self) -> list[Call]:
        """Running calls whose clients have been silent for too long."""
        until = time.monotonic() - self.idle_s
        return [call for call in list(self._running.values()) if call.silent_since < until]

    def _take_back(self) -> None:
        """If all places are taken, take those of idle calls."""
        if len(self._running) < self.max_calls:
            return
        for call in self._idle():
            del self._running[id(call)]
            call.gave_place = True
            call.admitted = False
            self._silent += 1

    def _overloaded(self, field: str, got: int, limit: int) -> OverloadedError:
        self._crowd.refused()
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
        if not (call.admitted or call.gave_place or call.bytes_held):
            return  # a refused one, of which there may be thousands at once: no lock
        with self._lock:
            self._hold(call, 0)
            if self._running.pop(id(call), None) is not None:
                call.admitted = False
            elif call.gave_place:
                self._silent -= 1
                call.gave_place = False
            self._call_first()

    def listen(self, call: Call) -> None:
        """From now on the call waits for its client to say something, until :meth:`heard`."""
        call.silent_since = time.monotonic()

    def heard(self, call: Call) -> None:
        """The client said something, or will never again.

        Raises
        ------
        DeadlineError
            It was silent for longer than ``idle_s``.
        """
        since = call.silent_since
        with self._lock:
            call.silent_since = math.inf
            gone = call.gave_place
        if gone or time.monotonic() - since > self.idle_s:
            raise DeadlineError(
                f"the client sent nothing for more than {self.idle_s:g} s, the server's limit",
                field="idle_timeout_s",
                expected=self.idle_s,
            )

    def hold(self, call: Call, nbytes: int) -> None:
        """The call holds ``nbytes`` of batches from now on, in place of what it held before."""
        with self._lock:
            if self._hold(call, nbytes):
                self._call_first()

    def _hold(self, call: Call, nbytes: int) -> bool:
        """Whether bytes were given back."""
        less = nbytes < call.bytes_held
        self._bytes += nbytes - call.bytes_held
        call.bytes_held = nbytes
        if less and self._waiting:
            self._room.notify_all()
        return less

    def wait_for_room(self, check: Callable[[], None]) -> None:
        """Return when another batch may be read.

        Parameters
        ----------
        check : callable
            Called ten times a second while waiting; what it raises ends the wait.
        """
        if self._bytes < self.max_bytes:
            return
        with self._lock:
            self._waiting += 1
            try:
                while self._bytes >= self.max_bytes:
                    check()
                    self._room.wait(POLL_S)
            finally:
                self._waiting -= 1
