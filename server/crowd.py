"""Python's own lock under a crowd of threads.

A thread that waits for the lock wakes every 5 ms (``sys.getswitchinterval``) to ask its holder to let go. A flood of
calls, each with a thread of gRPC's, makes thousands that do little else than wake: more CPU went there than into
refusing the calls. So while calls are refused for want of room they ask ten times a second, and once a second while
there are very many threads, whatever becomes of their calls: most of these wait for the lock and are not even refused.
Hardly anybody waits longer for it: who holds the lock gives it up at the next read, write or kernel.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

CROWDED_SWITCH_S = 0.1
FLOODED_SWITCH_S = 1.0
FLOOD = 300
"""Threads of the process that are a flood: 8,000 that ask ten times a second keep a core busy."""
LOOK_S = 0.05
"""Least time between two looks at their number."""
CALM_S = 1.0
"""Without a refusal and a flood for so long, the usual interval holds again."""


class Crowd:
    """Sets the process's switch interval by how many threads there are, and whether calls are refused."""

    def __init__(self) -> None:
        self._usual = sys.getswitchinterval()
        self._busy = math.inf
        self._looked = -math.inf

    # No lock in any of these: that two at once set the interval twice harms nobody.

    def came(self) -> None:
        """A call came, whatever becomes of it."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        flooded = threads() >= FLOOD
        if flooded:
            self._busy = now
        if self._busy != math.inf:
            sys.setswitchinterval(FLOODED_SWITCH_S if flooded else CROWDED_SWITCH_S)

    def refused(self) -> None:
        """A call found no room."""
        if self._busy == math.inf:
            sys.setswitchinterval(CROWDED_SWITCH_S)
        self._busy = time.monotonic()

    def found_room(self) -> None:
        """A call came in."""
        now = time.monotonic()
        if self._busy + CALM_S >= now:
            return
        if threads() < FLOOD:
            self.close()
        else:  # no more come, but those that came are not through
            self._busy = now

    def close(self) -> None:
        """Leave the interval as it was found."""
        if self._busy != math.inf:
            self._busy = math.inf
            sys.setswitchinterval(self._usual)


@cache
def _reader() -> Callable[[Any], int]:
    # Python's own read gives the lock up, and in a flood waits seconds to have it again: this one does not (13 us).
    pread = ctypes.PyDLL(None).pread
    pread.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long
    pread.restype = ctypes.c_ssize_t
    status = os.open("/proc/self/status", os.O_RDONLY)
    return lambda text: int(pread(status, text, len(text), 0))


def threads() -> int:
    """Threads of the process, as the kernel counts them; asked without giving Python's lock up."""
    text = ctypes.create_string_buffer(4096)
    _reader()(text)
    return int(text.raw.partition(b"Threads:")[2].split(maxsplit=1)[0])
