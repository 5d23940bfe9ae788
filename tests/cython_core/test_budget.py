"""The thread budget: never more threads than it has, everybody's turn, nothing lost when a caller is interrupted."""

from __future__ import annotations

import os
import threading
import time

import pytest

from flightquant.cython_core import engine as engine_module
from flightquant.cython_core.budget import ThreadBudget, available_cpus
from flightquant.cython_core.engine import Engine


@pytest.fixture
def budget() -> ThreadBudget:
    return ThreadBudget(2, inline_tiles=4)


def test_there_is_at_least_one_cpu() -> None:
    assert available_cpus() >= 1


def test_small_work_runs_on_its_caller_and_large_work_on_the_dispatcher(budget: ThreadBudget) -> None:
    seen: list[tuple[int, str]] = []

    def work(n_threads: int) -> None:
        seen.append((n_threads, threading.current_thread().name))

    budget.run(4, work)
    budget.run(5, work)
    assert seen[0] == (1, threading.current_thread().name)
    assert seen[1][0] == 2
    assert seen[1][1].startswith("flightquant-compute")
    budget.close()


def test_a_team_of_all_cpus_has_one_thread_on_each() -> None:
    before = threading.active_count(), os.sched_getaffinity(0)
    cpus = sorted(before[1])
    budget = ThreadBudget(len(cpus), inline_tiles=0)
    places: list[set[int]] = []
    budget.run(1, lambda _: places.append(os.sched_getaffinity(0)))
    assert places == [{cpus[0]} if len(cpus) > 1 else set(cpus)]
    masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    for cpu in cpus:
        assert {cpu} in masks
    assert os.sched_getaffinity(0) == before[1], "the caller stays free"
    budget.close()


def test_a_smaller_team_is_the_schedulers_to_place() -> None:
    cpus = os.sched_getaffinity(0)
    budget = ThreadBudget(len(cpus) + 1, inline_tiles=0)
    places: list[set[int]] = []
    budget.run(1, lambda _: places.append(os.sched_getaffinity(0)))
    assert places == [cpus]
    budget.close()


@pytest.mark.parametrize("sizes", [(2, 2, 2, 9, 9), (1, 1, 1, 1)], ids=["others", "tiny"])
def test_callers_together_never_use_more_threads_than_there_are(budget: ThreadBudget, sizes: tuple[int, ...]) -> None:
    lock, now, peak = threading.Lock(), 0, 0

    def work(n_threads: int) -> None:
        nonlocal now, peak
        with lock:
            now += n_threads
            peak = max(peak, now)
        time.sleep(0.001)
        with lock:
            now -= n_threads

    def caller(tiles: int) -> None:
        for _ in range(20):
            budget.run(tiles, work)

    callers = [threading.Thread(target=caller, args=(tiles,)) for tiles in sizes]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(30)
    assert not any(thread.is_alive() for thread in callers)
    assert (now, peak) == (0, 2)
    budget.close()


def test_what_work_raises_reaches_its_caller_and_gives_the_threads_back(budget: ThreadBudget) -> None:
    def broken(n_threads: int) -> None:
        raise RuntimeError(str(n_threads))

    for tiles, threads in ((1, "1"), (4, "1"), (9, "2")) * 3:
        with pytest.raises(RuntimeError, match=threads):
            budget.run(tiles, broken)
    done: list[int] = []
    budget.run(9, done.append)
    assert done == [2]
    budget.close()


def test_large_work_is_not_starved_by_small_work(budget: ThreadBudget) -> None:
    stop = threading.Event()

    def small() -> None:
        while not stop.is_set():
            budget.run(2, lambda _: time.sleep(0.0005))

    callers = [threading.Thread(target=small) for _ in range(4)]
    for thread in callers:
        thread.start()
    done: list[int] = []
    for _ in range(5):
        budget.run(9, done.append)
    stop.set()
    for thread in callers:
        thread.join(30)
    assert done == [2] * 5
    budget.close()


@pytest.mark.parametrize("large", [9, 4], ids=["the team", "each thread"])
def test_tiny_work_waits_for_no_other(budget: ThreadBudget, large: int) -> None:
    """A layer of 4 KiB beside one of 1 GiB: while all threads are at work, it has others."""
    busy, release = threading.Barrier(3 if large == 4 else 2), threading.Event()
    order: list[str] = []

    def work(n_threads: int) -> None:
        busy.wait(30)
        release.wait(30)
        order.append("large")

    callers = [threading.Thread(target=budget.run, args=(large, work)) for _ in range(busy.parties - 1)]
    callers.append(threading.Thread(target=budget.run, args=(2, lambda _: order.append("small"))))
    for thread in callers[:-1]:
        thread.start()
    busy.wait(30)
    callers[-1].start()
    budget.run(1, lambda n_threads: order.append(f"tiny on {n_threads}"))
    assert order == ["tiny on 1"]
    release.set()
    for thread in callers:
        thread.join(30)
    assert order[0] == "tiny on 1"
    assert sorted(order[1:]) == ["large"] * (busy.parties - 1) + ["small"]
    budget.close()


@pytest.mark.parametrize(("slice_s", "expected"), [(1e9, [40, 128, 128, 104]), (0.0, [40] + [2] * 180)])
def test_slow_formats_are_computed_in_short_slices(
    monkeypatch: pytest.MonkeyPatch, slice_s: float, expected: list[int]
) -> None:
    """Between slices a cancelled call stops and others take their turn."""
    monkeypatch.setattr(engine_module, "SLICE_S", slice_s)
    engine = Engine(n_threads=2)
    slices: list[tuple[int, int]] = []
    teams: set[int] = set()

    def step(first: int, last: int, n_threads: int) -> None:
        slices.append((first, last))
        teams.add(n_threads)

    engine.in_slices(step, 400, None, {"queue": 0, "kernel": 0})
    engine.close()
    assert teams == {2}, "a short slice of large work is the team's too"
    assert [last - first for first, last in slices] == expected
    assert [first for first, _ in slices] == [0, *(last for _, last in slices[:-1])]
