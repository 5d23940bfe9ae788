"""The kernels' way back against the memory that they write: every scheme dequantized, and verified against its weights.

GB/s of weights: those written, against plain writing of as many bytes in the same rounds with the same number of
threads; those compared with, against plain reading. "kernel" counts the time in the kernels; "call" the whole call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.benchmarks.harness import interleaved, reader, summary, weights
from flightquant.benchmarks.kernels import Figures
from flightquant.cython_core.engine import Answer, Engine
from flightquant.cython_core.restore import QuantizedSession
from flightquant.cython_core.validate import Limits
from flightquant.layers import Layer
from flightquant.quantized import quantized_batches, with_weights
from flightquant.spec import Command

OPERATIONS: dict[str, dict[str, Any]] = {
    "float32": {"op": "dequantize", "dtype": "float32"},
    "float16": {"op": "dequantize", "dtype": "float16"},
    "verify": {"op": "verify"},
}
"""Command of each way back, by its name in the figures: weights of a dtype, or how far they are from the first ones."""

ROOF_BYTES = 1 << 26
"""Plain writing and reading are timed on so much memory that no cache holds it."""


def writer(memory: npt.NDArray[np.uint8], pool: ThreadPoolExecutor, n_threads: int) -> Callable[[], None]:
    """A function that writes an array once with so many threads: the roof of every kernel that writes its output once.

    By the C library's ``memset``, a part for each thread.
    """
    cuts = [memory.nbytes * i // n_threads for i in range(n_threads + 1)]
    parts = [(memory.ctypes.data + low, 1, high - low) for low, high in pairwise(cuts)]

    def write() -> None:
        list(pool.map(lambda part: ctypes.memset(*part), parts))

    return write


def dequantize(
    chosen: dict[str, dict[str, Any]], shape: tuple[int, int], threads: Sequence[int], rounds: int
) -> Figures:
    """Every case on the answer to one layer of float32, in each of :data:`OPERATIONS`."""
    layer = weights(shape)
    made = answers(chosen, layer)
    memory = np.zeros(max(layer.nbytes, ROOF_BYTES), np.uint8)
    found: Figures = []
    for n_threads in threads:
        engine = Engine(n_threads)
        timed: dict[str, Callable[[], float | None]] = {"read": reader(memory.view(np.float32), n_threads)}
        # Operation by operation, so that each reuses its outputs' memory as callers do.
        for operation, options in OPERATIONS.items():
            for case, answer in made.items():
                timed[f"{case}|{operation}"] = _kernel_seconds(bound(engine, layer, answer, options))
        with ThreadPoolExecutor(n_threads) as pool:
            seconds = interleaved({"write": writer(memory, pool, n_threads), **timed}, rounds)
        engine.close()
        roofs = {name: summary(seconds[name], memory.nbytes) for name in ("write", "read")}
        for operation, options in OPERATIONS.items():
            nbytes = layer.data.size * np.dtype(options.get("dtype", "float32")).itemsize
            roof = roofs["read" if operation == "verify" else "write"]
            for case in made:
                key = f"{case}|{operation}"
                rate, call = summary(seconds[f"{key} kernel"], nbytes), summary(seconds[key], nbytes)
                found.append(
                    {"shape": list(shape), "case": case, "operation": operation, "threads": n_threads, **rate}
                    | {"share": rate["gb_s"] / roof["gb_s"], "ns_per_weight": nbytes / rate["gb_s"] / layer.data.size}
                    | {"call": call, "call_share": call["gb_s"] / roof["gb_s"], "roof": roof}
                )
    return found


def answers(chosen: dict[str, dict[str, Any]], layer: Layer) -> dict[str, pa.RecordBatch]:
    """What each case makes of a layer."""
    engine = Engine()
    made = {name: engine.quantize_layers((layer,), Command.build(**options)).batch for name, options in chosen.items()}
    engine.close()
    return made


def bound(engine: Engine, layer: Layer, answer: pa.RecordBatch, options: dict[str, Any]) -> Callable[[], Answer]:
    """One of :data:`OPERATIONS` on an answer, the batch and the session made once."""
    if options["op"] == "verify":
        (batch,) = with_weights({layer.name: layer.data.reshape(layer.shape)}, answer)
    else:
        (batch,) = quantized_batches(answer)
    session = QuantizedSession(engine, batch.schema, Command.build(**options), Limits())
    return lambda: session.answer(batch)


def _kernel_seconds(call: Callable[[], Answer]) -> Callable[[], float]:
    return lambda: call().seconds["kernel"]
