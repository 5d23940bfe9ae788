"""What every benchmark here shares: the machine's header, interleaved rounds, medians with their spread.

Shared machines are noisy. So the sides of a comparison run in turn within one process, round by round, and what is
quoted is the median and the range of all rounds; the share of CPU time that others took stands beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.cython_core import active_isa
from flightquant.cython_core._kernels import DTYPES, FAMILIES
from flightquant.cython_core._quantize import JOB_WIDTH, SPEC_FIELDS, Plan, lay_out
from flightquant.cython_core.budget import ThreadBudget
from flightquant.layers import Layer


def cpu_model() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine(libraries: Sequence[str] = ()) -> dict[str, Any]:
    """What a figure depends on: processor, CPUs, instruction set, versions of Python and of the named libraries."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "isa": active_isa(),
        "python": platform.python_version(),
    }
    for name in ("flightquant", "numpy", "pyarrow", *libraries):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    return facts


def header(facts: Mapping[str, Any]) -> str:
    """The machine in one line, without libraries whose version is not known."""
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _cpu_times() -> tuple[int, int]:
    """(all, taken by others or by other machines on the same host) in clock ticks, since the machine started."""
    fields = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(fields), fields[7]


class OtherLoad:
    """The share of this machine's CPU time that the process itself did not get while it ran."""

    def __init__(self) -> None:
        self._start = _cpu_times(), time.process_time(), time.perf_counter()

    def shares(self) -> dict[str, float]:
        """``stolen`` by the host, and ``busy`` with other processes, as shares of all CPU time since the start."""
        (total, stolen), own, wall = self._start
        now_total, now_stolen = _cpu_times()
        ticks = max(now_total - total, 1)
        idle_or_own = time.process_time() - own
        return {
            "stolen": (now_stolen - stolen) / ticks,
            "own": idle_or_own / max((time.perf_counter() - wall) * len(os.sched_getaffinity(0)), 1e-9),
        }


def interleaved(cases: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in each round; the cases take turns, and the first round is not counted.

    A case that returns a number is also reported as ``"<name> kernel"`` with that many seconds: its kernels' share.
    """
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            kernel = case()
            whole = time.perf_counter() - start
            if turn:
                seconds.setdefault(name, []).append(whole)
                if kernel is not None:
                    seconds.setdefault(f"{name} kernel", []).append(kernel)
    return seconds


def summary(seconds: list[float], nbytes: int) -> dict[str, float]:
    """Median GB/s of so many bytes, and its range over the rounds."""
    rates = sorted(nbytes / 1e9 / value for value in seconds)
    return {"gb_s": statistics.median(rates), "min": rates[0], "max": rates[-1]}


def weights(shape: tuple[int, int], dtype: str = "float32", seed: int = 1) -> Layer:
    """Weights of a layer as checkpoints have them: normally distributed, standard deviation 0.02."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    values *= np.float32(0.02)
    if dtype == "bfloat16":
        bits = ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
        return Layer("weight", shape, dtype, bits.reshape(-1))
    return Layer("weight", shape, dtype, values.astype(dtype).reshape(-1))


def reader(array: npt.NDArray[Any], n_threads: int) -> Callable[[], None]:
    """A function that reads an array once with so many threads: the roof of every kernel that reads its input once.

    It takes the largest magnitude, two vector operations for 64 bytes, so that memory alone sets its pace.
    """
    spec = dict.fromkeys(SPEC_FIELDS, 0)
    spec |= {
        "family": FAMILIES["int8"],
        "dtype": DTYPES[array.dtype.name],
        "bits": 8,
        "symmetric": 1,
        "shared_scale": 1,
    }
    jobs, ones = np.empty((1, JOB_WIDTH), np.int64), np.ones(1, np.int64)
    lay_out(
        np.array([list(spec.values())], np.int64),
        np.zeros(1, np.int64),
        ones * array.ctypes.data,
        ones * array.size,
        np.zeros(1, np.int64),
        np.array([[1, array.size]], np.int64),
        np.zeros(1, np.uint8),
        jobs,
        ones,
        np.empty((3, 2), np.int64),
        np.empty(1, np.int64),
    )
    # Only ranges are taken: nothing is written to the outputs, whose addresses are those of nothing.
    plan = Plan(jobs, np.full(1, np.nan, np.float32), active_isa(), False, 0, 0, 0, 0, array)
    budget = ThreadBudget(n_threads, 0)
    return lambda: budget.run(plan.reduce_tiles, lambda count: plan.reduce(0, plan.reduce_tiles, count))


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """The figures as JSON, where asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
