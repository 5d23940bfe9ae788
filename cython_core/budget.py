"""The process's one budget of compute threads.

OpenMP starts a team for every thread that opens a parallel region, and a Flight server has a thread for every call. So
all large work runs on one dispatcher thread, whose team takes the whole budget, a few milliseconds at a time. Small
work takes one thread of the budget and runs where it is: to hand it over would cost more than it gains. Callers are
served in the order in which they came, but for the smallest work: it would wait for a slice of the large for many times
as long as it takes, so it has as many threads again for itself, and the system's scheduler shares the CPUs out.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from flightquant.cython_core._kernels import pin_team


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, cut by its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(count, quota) if quota else count)


def _cgroup_quota() -> int | None:
    """CPUs that the cgroup's quota allows, rounded up; None without one (cgroup version 2, then 1)."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        try:
            with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", encoding="ascii") as file:
                quota = file.read().strip()
            with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us", encoding="ascii") as file:
                period = file.read().strip()
        except OSError:
            return None
    if not quota.isdecimal() or not period.isdecimal() or int(quota) <= 0:
        return None
    return -(-int(quota) // int(period))


TINY_TILES = 1
"""The smallest work: up to 256 KiB of float32, a millisecond for the slowest format."""


class Turns:
    """So many threads, given to callers in the order in which they came."""

    def __init__(self, threads: int) -> None:
        self._lock = threading.Lock()
        self._free = threads
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def take(self, count: int) -> None:
        """So many of the threads, after those who came before, until they are given back."""
        turn = None
        with self._lock:
            if self._waiting or self._free < count:
                turn = threading.Lock()
                turn.acquire()
                self._waiting.append((count, turn))
            else:
                self._free -= count
        if turn is not None:
            try:
                turn.acquire()
            except BaseException:  # Ctrl-C while waiting
                with self._lock:
                    waits = (count, turn) in self._waiting
                    if waits:
                        self._waiting.remove((count, turn))
                if not waits:
                    self.give_back(count)
                raise

    def give_back(self, count: int) -> None:
        """What was taken; whose turn it is next goes on."""
        with self._lock:
            self._free += count
            while self._waiting and self._waiting[0][0] <= self._free:
                wanted, turn = self._waiting.popleft()
                self._free -= wanted
                turn.release()


class ThreadBudget:
    """Runs slices of work on at most ``n_threads`` threads, whatever the number of callers, and tiny work beside them.

    Parameters
    ----------
    n_threads : int
    inline_tiles : int
        The largest work, in tiles, that runs on its caller's thread. Of it, up to :data:`TINY_TILES` count as tiny and
        have ``n_threads`` threads more.
    """

    def __init__(self, n_threads: int, inline_tiles: int) -> None:
        self.n_threads = n_threads
        self._inline_tiles = inline_tiles
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        # Fewer threads than CPUs are the scheduler's to place: other processes would choose the same.
        initializer = partial(pin_team, cpus) if n_threads == len(cpus) > 1 else None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flightquant-compute", initializer=initializer)
        self._turns, self._tiny_turns = Turns(n_threads), Turns(n_threads)

    def run(self, tiles: int, work: Callable[[int], None], *, alone: bool = False) -> None:
        """Call ``work``, a slice of work of so many tiles, with how many threads it may use; ``alone``: with one."""
        if alone or tiles <= self._inline_tiles or self.n_threads == 1:
            turns = self._tiny_turns if tiles <= TINY_TILES else self._turns
            turns.take(1)
            try:
                work(1)
            finally:
                turns.give_back(1)
        else:
            self._turns.take(self.n_threads)
            try:
                self._executor.submit(work, self.n_threads).result()
            finally:
                self._turns.give_back(self.n_threads)

    def close(self) -> None:
        """End the dispatcher thread."""
        self._executor.shutdown()
