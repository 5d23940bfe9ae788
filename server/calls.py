"""What is known of one call: who it is in logs and traces, what was asked, how it ended."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flightquant.server.auth import EVERYONE, Identity
from flightquant.wire import SUMS_HEADER, EndMessage

REQUEST_ID_HEADER = "x-request-id"
TRACE_HEADER = "traceparent"
UNKNOWN = "none"
"""``op`` and ``scheme`` of a call whose command was not read."""

MAX_STAGES = 1000

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

Headers = Mapping[str, Sequence[str | bytes]]


class CallCancelledError(Exception):
    """The client ended the call or is gone: nobody is left to be told."""


class Stages:
    """When each stage of each batch of one call ran, the first :data:`MAX_STAGES` of them.

    Attributes
    ----------
    started_ns : int
        When the call began, nanoseconds since the epoch.
    noted : list of (str, float, float)
        Name, start in seconds since the call began, and length in seconds.
    dropped : int
        Stages that were too many to be noted.
    """

    def __init__(self) -> None:
        self.started_ns = time.time_ns()
        self.noted: list[tuple[str, float, float]] = []
        self.dropped = 0

    def note(self, name: str, begin: float, seconds: float) -> None:
        """One stage of one batch."""
        if len(self.noted) < MAX_STAGES:
            self.noted.append((name, begin, seconds))
        else:
            self.dropped += 1


@dataclass(slots=True)
class Call:
    """One call, from its headers to its line in the log.

    Attributes
    ----------
    request_id : str
        The client's ``x-request-id`` if it sent one that is fit to be logged, else a fresh one.
    traceparent, trace_id : str or None
        The W3C ``traceparent`` header, without what later versions may add, and the trace in it.
    sums : bool
        Whether the client asked for the quality sums of each batch.
    identity : Identity
        Who calls, and what they may do.
    op, scheme : str
        What the command asks for; :data:`UNKNOWN` until it was read.
    outcome : str
        ``ok``, ``cancelled`` or the code of the error that ended the call.
    admitted, gave_place : bool
        Whether the call has a place among the running ones; whether it had one and gave it away, being idle.
    silent_since : float
        Since when the call waits for its client, in :func:`time.monotonic` seconds; infinite while it does not.
    bytes_held : int
        Bytes of batches that the call holds now.
    computing : bool
        Whether one of them is in the engine.
    stages : Stages or None
        Where its stages are noted, if spans are made of them.
    """

    request_id: str
    method: str
    traceparent: str | None = None
    trace_id: str | None = None
    sums: bool = False
    op: str = UNKNOWN
    scheme: str = UNKNOWN
    peer: str | None = None
    identity: Identity = EVERYONE
    outcome: str = "ok"
    error: str | None = None
    totals: EndMessage | None = None
    bytes_held: int = 0
    computing: bool = False
    admitted: bool = False
    silent_since: float = math.inf
    gave_place: bool = False
    stages: Stages | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def from_headers(cls, method: str, headers: Headers) -> Call:
        """A call from what Flight's middleware sees of it: lower-case names, each with a list of values."""
        request_id = _single(headers, REQUEST_ID_HEADER)
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            # No secret: random bytes of the system's cost a turn at Python's lock.
            request_id = f"{random.getrandbits(128):032x}"
        trace = _TRACEPARENT.fullmatch(_single(headers, TRACE_HEADER) or "")
        return cls(
            request_id=request_id,
            method=method,
            traceparent=trace.group(0)[:55] if trace else None,
            trace_id=trace.group(1) if trace else None,
            sums=_single(headers, SUMS_HEADER) == "1",
        )

    @property
    def seconds(self) -> float:
        """Time since the call began."""
        return time.monotonic() - self.started


def _single(headers: Headers, name: str) -> str | None:
    """The header's value if it was sent exactly once, as text."""
    values = headers.get(name, ())
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None
