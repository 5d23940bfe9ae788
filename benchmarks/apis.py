"""Every way to quantize the same arrays, side by side: seconds and memory of the list, batch, Arrow and service calls.

Usage: python -m flightquant.benchmarks.apis [ROUNDS]

Sixteen layers of 1024x1024 float32 (64 MiB) at four bits, from NumPy arrays to the answer. Each way runs in a process
of its own, so that its peak memory is its own; times are medians after one warm-up.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

LAYERS = 16
SIDE = 1024
WAYS = ("list", "batch", "arrow", "local", "service")


def weights() -> dict[str, Any]:
    """The same arrays for every way."""
    rng = np.random.default_rng(0)
    return {f"layers.{i}.weight": rng.standard_normal((SIDE, SIDE), np.float32) for i in range(LAYERS)}


def way(name: str, uri: str) -> Callable[[dict[str, Any]], object]:
    """The call to measure."""
    import flightquant
    from flightquant.client import QuantClient
    from flightquant.compat import ArrowQuantV2, numpy_to_arrow_table

    quantizer = ArrowQuantV2()
    options: dict[str, Any] = {"group_size": 128, "symmetric": False, "metrics": False}
    client = QuantClient(uri)
    return {
        "list": lambda held: quantizer.quantize({name: array.ravel().tolist() for name, array in held.items()}, 4),
        "batch": lambda held: quantizer.quantize_batch(held, 4),
        "arrow": lambda held: quantizer.quantize_arrow(numpy_to_arrow_table(held), 4),
        "local": lambda held: flightquant.quantize(held, "int4", **options),
        "service": lambda held: client.quantize(held, "int4", **options),
    }[name]


def child(name: str, rounds: int, uri: str) -> None:
    """Measure one way and print its median seconds and its peak memory over what stood before, in MiB."""
    held = weights()
    call = way(name, uri)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(held)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        call(held)
        seconds.append(time.perf_counter() - started)
    print(statistics.median(seconds), peak / 1024)


def main() -> None:
    """Measure every way and print a row for each."""
    if len(sys.argv) > 2:
        child(sys.argv[1], int(sys.argv[2]), sys.argv[3])
        return
    from flightquant.benchmarks.exchange import SERVE, server

    rounds = (sys.argv[1:] or ["5"])[0]
    nbytes = LAYERS * SIDE * SIDE * 4
    print(f"{LAYERS} layers of {SIDE}x{SIDE} float32, {nbytes >> 20} MiB, four bits; median of {rounds}")
    with server(SERVE) as (ready, _):
        for name in WAYS:
            command = [sys.executable, "-m", "flightquant.benchmarks.apis", name, rounds, ready["flight"]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds, peak = map(float, done.stdout.split())
            print(f"{name:8} {seconds * 1e3:9.1f} ms {nbytes / seconds / 1e9:7.2f} GB/s {peak:8.0f} MiB more")


if __name__ == "__main__":
    main()
