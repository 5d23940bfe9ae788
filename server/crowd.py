"""Python's own lock under a crowd of threads.

A thread that waits for the lock wakes every 5 ms (``sys.getswitchinterval``) to ask its holder to let go. A flood of
calls, each with a thread of gRPC's, makes thousands that do little else than wake: more CPU went there than into
refusing the calls. So while calls are refused for want of room they ask ten times a second, and once a second in a
flood. Hardly anybody waits longer for it: who holds the lock gives it up at the next read, write or kernel.
"""

from __future__ import annotations

import math
import sys
import time

CROWDED_SWITCH_S = 0.1
FLOODED_SWITCH_S = 1.0
FLOOD = 500
"""Refusals within :data:`CALM_S` that are a flood: 8,000 threads that ask ten times a second keep a core busy."""
CALM_S = 1.0
"""Without a refusal for so long, the usual interval holds again."""


class Crowd:
    """Sets the process's switch interval by whether calls are refused for want of room."""

    def __init__(self) -> None:
        self._usual = sys.getswitchinterval()
        self._refused = math.inf
        self._since, self._count = -math.inf, 0

    def refused(self) -> None:
        """A call found no room."""
        # No lock: that two at once count as one, or set the interval twice, harms nobody.
        now = time.monotonic()
        if self._refused == math.inf:
            sys.setswitchinterval(CROWDED_SWITCH_S)
        self._refused = now
        if now - self._since > CALM_S:
            if self._count >= FLOOD:
                sys.setswitchinterval(CROWDED_SWITCH_S)
            self._since, self._count = now, 0
        self._count += 1
        if self._count >= FLOOD:
            sys.setswitchinterval(FLOODED_SWITCH_S)

    def found_room(self) -> None:
        """A call came in."""
        if self._refused + CALM_S < time.monotonic():
            self.close()

    def close(self) -> None:
        """Leave the interval as it was found."""
        if self._refused != math.inf:
            self._refused = math.inf
            self._since, self._count = -math.inf, 0
            sys.setswitchinterval(self._usual)
