"""Who may come in, and how much they may hold: calls and bytes in flight, counted for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flightquant.errors import DrainingError, OverloadedError
from flightquant.server.calls import Call

RETRY_AFTER_S = 1.0
POLL_S = 0.1


class Admission:
    """Counts calls and bytes, and refuses what would be too much, before its body is read.

    A call that was let in is never refused for bytes: it waits before its next read while the process holds more than
    its share. Every call may then hold one batch more, so what is held stays under ``max_bytes`` and one batch a call.

    Parameters
    ----------
    max_calls : int
        Calls at once.
    max_bytes : int
        Bytes of batches held at once.
    """

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self.max_calls = max_calls
        self.max_bytes = max_bytes
        self._changed = threading.Condition()
        self._calls = 0
        self._peak = 0
        self._bytes = 0
        self._draining = False
        self._ending = threading.Event()

    @property
    def calls(self) -> int:
        """Calls in flight."""
        return self._calls

    @property
    def peak_calls(self) -> int:
        """Most calls that were ever in flight at once."""
        return self._peak

    @property
    def bytes_held(self) -> int:
        """Bytes of batches held by all calls."""
        return self._bytes

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
        """Let a call in.

        Raises
        ------
        DrainingError
            The server is about to stop.
        OverloadedError
            There are too many calls, or the calls hold too many bytes.
        """
        with self._changed:
            if self._draining:
                raise DrainingError("the server is stopping; repeat the call elsewhere", retry_after_s=RETRY_AFTER_S)
            if self._calls >= self.max_calls:
                raise OverloadedError(
                    f"{self._calls} calls are running, the server's limit; repeat in {RETRY_AFTER_S:g} s",
                    field="max_calls",
                    got=self._calls,
                    expected=self.max_calls,
                    retry_after_s=RETRY_AFTER_S,
                )
            if self._bytes >= self.max_bytes:
                raise OverloadedError(
                    f"the running calls hold {self._bytes} bytes, the server's limit is {self.max_bytes}; "
                    f"repeat in {RETRY_AFTER_S:g} s",
                    field="max_bytes_in_flight",
                    got=self._bytes,
                    expected=self.max_bytes,
                    retry_after_s=RETRY_AFTER_S,
                )
            self._calls += 1
            self._peak = max(self._peak, self._calls)
            call.admitted = True

    def leave(self, call: Call) -> None:
        """The call is over: it counts no longer, nor does what it held."""
        self.hold(call, 0)
        with self._changed:
            if call.admitted:
                self._calls -= 1
                call.admitted = False

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
            while self._bytes >= self.max_bytes:
                check()
                self._changed.wait(POLL_S)
