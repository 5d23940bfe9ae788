"""Calls that are refused or lost are repeated, from the first layer that has no answer yet.

Every answer that has come is given on exactly once and never asked for again; requests are kept until their answer is
taken, so that a new attempt, on a new connection if need be, goes on where the last one ended. Quantizing is a pure
function of the request, so what comes out is the same bytes as from one unbroken stream.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock

from flightquant.client.batching import Request
from flightquant.client.joining import Answer
from flightquant.errors import (
    DeadlineError,
    DrainingError,
    FlightquantError,
    OverloadedError,
    StreamCutError,
    UnavailableError,
)

log = logging.getLogger("flightquant.client")

Attempt = Callable[[Iterator[Request], float | None, FlightquantError | None], Iterable[Answer]]
"""Starts one exchange: from the requests, the seconds that are left (None: no limit) and why the last one failed (None:
this is the first) to its answers, in order. It may choose another server or connection each time."""

_AGAIN = (OverloadedError, DrainingError, UnavailableError, StreamCutError)


@dataclass(frozen=True, slots=True)
class Retry:
    """How long and how often a call that is refused or lost is repeated.

    Attributes
    ----------
    patience_s : float
        Seconds without a single new answer after which the last failure is raised.
    first_s, longest_s : float
        The wait before the first repetition, in seconds; each further one doubles it, up to ``longest_s``. A new answer
        starts it afresh. Waits are shortened at random by up to half, so that many clients do not come back together.
    connect_s : float or None
        The same patience with a server that cannot be reached and has not answered the call at all: most likely the
        address is wrong. None: ``patience_s``.
    """

    patience_s: float = 30.0
    first_s: float = 0.1
    longest_s: float = 5.0
    connect_s: float | None = None

    def patience(self, failure: FlightquantError, *, answered: bool) -> float:
        """Seconds without a new answer after which this failure is raised."""
        if answered or self.connect_s is None or not isinstance(failure, UnavailableError):
            return self.patience_s
        return min(self.connect_s, self.patience_s)

    def wait_s(self, failures: int, after_s: float | None) -> float:
        """Seconds to wait before the next attempt.

        Parameters
        ----------
        failures : int
            Attempts that have failed since the last answer, at least 1.
        after_s : float or None
            What the server asked for (``retry_after_s``); never undercut.
        """
        backoff: float = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 60))
        spread = backoff * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing
        return spread if after_s is None else after_s + spread


class Replay:
    """Requests that can be taken again: each is kept until its answer has come.

    An attempt that failed may leave a thread behind that still waits for the caller's own iterator; what that thread
    gets, a request or the iterator's error, is there for the next attempt.
    """

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests
        self._kept: dict[int, Request] = {}
        self._pulled = 0
        self._answered = 0
        self._confirming: Request | None = None
        self._pulling = Lock()
        self._exhausted = False
        self.failure: BaseException | None = None

    @property
    def answered(self) -> int:
        """Requests whose answer has come."""
        return self._answered

    def attempt(self) -> tuple[Iterator[Request], int]:
        """The requests from the first unanswered one on, and how many answers of them are known already.

        Where all have been answered and only the end message is missing, the last one is sent once more: no call
        counts as done without it.
        """
        if self._exhausted and not self._kept and self._confirming is not None:
            return iter([self._confirming]), 1
        return self._from(self._answered), 0

    def _from(self, position: int) -> Iterator[Request]:
        while (request := self._at(position)) is not None:
            yield request
            position += 1

    def _at(self, position: int) -> Request | None:
        with self._pulling:
            if position < self._pulled:
                # None only for the thread of an abandoned attempt: what it would send is answered already.
                return self._kept.get(position)
            if self.failure is not None:
                # An iterator that has raised looks exhausted when asked again.
                raise self.failure
            if self._exhausted:
                return None
            try:
                request = next(self._requests, None)
            except BaseException as error:
                self.failure = error
                raise
            if request is None:
                self._exhausted = True
                return None
            self._kept[position] = request
            self._pulled += 1
            return request

    def take(self) -> None:
        """The first unanswered request has its answer."""
        self._confirming = self._kept.pop(self._answered)
        self._answered += 1


def answers(
    attempt: Attempt,
    requests: Iterator[Request],
    retry: Retry | None,
    deadline: float | None,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Answer]:
    """The answer of every request, once each and in order, over as many attempts as it takes.

    Parameters
    ----------
    retry : Retry or None
        None: the first failure is raised.
    deadline : float or None
        Of the whole call, in :func:`time.monotonic` seconds.
    pause : callable
        Waits for so many seconds; what it raises ends the call.

    Raises
    ------
    OverloadedError, DrainingError, UnavailableError, StreamCutError
        The last failure, once no answer has come for as long as ``retry`` says.
    DeadlineError
        The deadline is reached, or a wait would reach it.
    FlightquantError
        Any other failure, at once.
    """
    replay = Replay(requests)
    last_answer = time.monotonic()
    failure: FlightquantError | None = None
    failures = 0
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise late(failure)
        unsent, known = replay.attempt()
        running = iter(attempt(unsent, left, failure))
        before = replay.answered
        try:
            for answer in running:
                if known:
                    known -= 1
                    continue
                replay.take()
                last_answer, failures = time.monotonic(), 0
                yield answer
            return
        except FlightquantError as error:
            if retry is None or error is replay.failure or not is_lost(error, replay.answered > before):
                raise
            failure = error
        finally:
            close = getattr(running, "close", None)
            if close is not None:
                close()
        failures += 1
        wait = retry.wait_s(failures, failure.retry_after_s)
        now = time.monotonic()
        if now + wait - last_answer > retry.patience(failure, answered=replay.answered > 0):
            if isinstance(failure, UnavailableError) and not replay.answered:
                failure.add_note(f"tried for {now - last_answer:.0f} s; check the address, and that the server runs")
            raise failure
        if deadline is not None and now + wait >= deadline:
            raise late(failure) from failure
        log.warning("%s; again in %.1f s, %d batches answered so far", failure, wait, replay.answered)
        pause(wait)


def is_lost(error: FlightquantError, progress: bool) -> bool:
    """Whether the same call may succeed when repeated; a server's own time limit ends a call that gets on, no more."""
    from_server = isinstance(error, DeadlineError) and error.request_id is not None
    return isinstance(error, _AGAIN) or (from_server and progress)


def late(failure: FlightquantError | None) -> DeadlineError:
    """The error of a call whose deadline is reached, with what kept it from ending earlier."""
    reason = f"; its last attempt failed: {failure}" if failure else ""
    return DeadlineError(f"the call's time is over{reason}")
