"""The process's one budget of compute threads.

OpenMP starts a team for every thread that opens a parallel region, and a Flight server has a thread for every call. So
all large work runs on one dispatcher thread, whose team is the budget; callers take turns there, a few milliseconds
each. Work of few tiles (1 MiB of float32) runs where it is, as many at a time as there are threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

SMALL_TILES = 4


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


class ThreadBudget:
    """Runs slices of work on at most ``n_threads`` threads, whatever the number of callers."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flightquant-compute")
        self._small = threading.BoundedSemaphore(n_threads)

    def run(self, tiles: int, work: Callable[[int], None]) -> None:
        """Call ``work`` with the number of threads that it may use, for work of so many tiles; callers take turns."""
        if tiles <= SMALL_TILES or self.n_threads == 1:
            with self._small:
                work(1)
        else:
            self._executor.submit(work, self.n_threads).result()

    def close(self) -> None:
        """End the dispatcher thread."""
        self._executor.shutdown()
