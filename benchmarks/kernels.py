"""The kernels against the memory that they read: schemes, sizes, reductions, single layers.

GB/s of input; the share is of the read bandwidth measured in the same rounds with the same number of threads. "off" and
"on" are the quality columns. "kernel" counts the time in the kernels; "call" the whole call, with its checks and its
answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flightquant.benchmarks.harness import interleaved, reader, summary, weights
from flightquant.cython_core.engine import Engine, Session
from flightquant.cython_core.magnitude import AmaxSession
from flightquant.cython_core.validate import Limits
from flightquant.layers import Layer, layers_batch
from flightquant.schemes import SCHEMES
from flightquant.spec import Command

Figures = list[dict[str, Any]]

SIZES: dict[str, tuple[int, tuple[int, int]]] = {
    "64K": (1, (16, 4096)),
    "256K": (1, (64, 4096)),
    "4.2M": (1, (1024, 4096)),
    "16.8M": (1, (4096, 4096)),
    "67M": (1, (16384, 4096)),
    "100 layers of 1M": (100, (256, 4096)),
}
"""Layers and their shape, by the size's name."""

SIZED_SCHEMES = ("int8", "int4", "q4_0")
"""Schemes of which every size is measured: one of each way through a layer."""

REDUCTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "amax alone, of the tensor": (1, {"op": "amax"}),
    "int8, of the tensor": (1, {"scheme": "int8", "granularity": "tensor"}),
    "int8, of each row": (1, {"scheme": "int8"}),
    "int8, of each row, three axes": (8, {"scheme": "int8"}),
    "int8, of groups of 128": (1, {"scheme": "int8", "group_size": 128}),
    "fp8_e4m3, of blocks of 128x128": (1, {"scheme": "fp8_e4m3", "granularity": "block"}),
}
"""What the largest magnitude is taken over: the parts that the layer's rows are cut into as a leading axis, options."""


def cases(schemes: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The command's options of each case by its name: every scheme as it is by default, and integers' variants."""
    found: dict[str, dict[str, Any]] = {}
    for name, scheme in SCHEMES.items():
        if schemes and name not in schemes:
            continue
        found[name] = {"scheme": name}
        if name in ("int8", "int4"):
            other = {"group_size": 128} if scheme.granularities[0] == "channel" else {"group_size": 32}
            found[f"{name} group {other['group_size']}"] = {"scheme": name, **other}
            found[f"{name} zero points"] = {"scheme": name, "symmetric": False}
        found.update(
            {
                f"{name} {variant.packing}": {"scheme": name, "packing": variant.packing}
                for variant in scheme.variants
                if variant.rule or variant.nested or variant.packing in ("gptq", "awq")
            }
        )
        found.update(
            {
                f"{name} {other}": {"scheme": name, "granularity": other}
                for other in scheme.granularities[1:]
                if other in ("tensor", "block") and scheme.bits == 8
            }
        )
    return found


@dataclass(frozen=True)
class Run:
    """One operation of the engine on a batch of layers; called, it returns its kernels' seconds."""

    engine: Engine
    layers: tuple[Layer, ...]
    options: dict[str, Any]
    metrics: bool

    def bound(self) -> Callable[[], float]:
        """The call itself, its batch and session made once."""
        batch = layers_batch(self.layers)
        session: Session
        if self.options.get("op") == "amax":
            session = AmaxSession(self.engine, batch.schema, Command.build(**self.options), Limits())
        else:
            session = self.engine.session(batch.schema, Command.build(metrics=self.metrics, **self.options))
        return lambda: session.quantize(batch).seconds["kernel"]


def measure(runs: dict[tuple[str, str], Run], n_threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Every run, interleaved with plain reading of the same bytes.

    Parameters
    ----------
    runs : dict
        By (case, "off" or "on").
    """
    first = next(iter(runs.values())).layers
    read_bytes = sum(layer.nbytes for layer in first)
    # Reading is timed on so much memory that no cache holds it, whatever the layers' size.
    memory = np.concatenate([layer.data for layer in first] * max(1, (1 << 26) // read_bytes))
    timed: dict[str, Callable[[], float | None]] = {"read": reader(_as_float32(memory), n_threads)}
    timed |= {"|".join(key): run.bound() for key, run in runs.items()}
    seconds = interleaved(timed, rounds)
    read = summary(seconds["read"], memory.nbytes)
    for (case, metrics), run in runs.items():
        nbytes, count = (
            sum(sizes) for sizes in zip(*((layer.nbytes, layer.data.size) for layer in run.layers), strict=True)
        )
        key = f"{case}|{metrics}"
        rate, call = summary(seconds[f"{key} kernel"], nbytes), summary(seconds[key], nbytes)
        yield {
            "case": case,
            "metrics": metrics,
            "dtype": run.layers[0].dtype,
            "threads": n_threads,
            **rate,
            "share": rate["gb_s"] / read["gb_s"],
            "ns_per_weight": nbytes / rate["gb_s"] / count,
            "call": call,
            "call_share": call["gb_s"] / read["gb_s"],
            "read": read,
        }


def _as_float32(memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return memory.view(np.uint8)[: memory.nbytes // 4 * 4].view(np.float32)


def schemes(
    chosen: dict[str, dict[str, Any]],
    shape: tuple[int, int],
    dtypes: Sequence[str],
    threads: Sequence[int],
    rounds: int,
) -> Figures:
    """Every case on a layer of one shape."""
    found: Figures = []
    for dtype in dtypes:
        layer = weights(shape, dtype)
        for n_threads in threads:
            engine = Engine(n_threads)
            runs = {
                (name, metrics): Run(engine, (layer,), options, metrics == "on")
                for name, options in chosen.items()
                for metrics in ("off", "on")
            }
            found += [{"shape": list(shape), **row} for row in measure(runs, n_threads, rounds)]
            engine.close()
    return found


def sizes(threads: Sequence[int], rounds: int, largest: int) -> Figures:
    """One scheme of each kind on layers of every size class up to so many weights, and on a batch of many layers."""
    found: Figures = []
    for size, (count, shape) in SIZES.items():
        if count * shape[0] * shape[1] > largest:
            continue
        layers = tuple(Layer(f"w{i}", shape, "float32", weights(shape, seed=i).data) for i in range(count))
        for n_threads in threads:
            engine = Engine(n_threads)
            for name in SIZED_SCHEMES:  # one after the other, so that each reuses its outputs' memory as callers do
                runs = {(name, "off"): Run(engine, layers, {"scheme": name}, False)}
                found += [{"size": size, **row} for row in measure(runs, n_threads, rounds)]
            engine.close()
    return found


def reductions(threads: Sequence[int], rounds: int, largest: int) -> Figures:
    """Every reduction on one layer of each size class from 4.2M weights up to so many."""
    found: Figures = []
    for size in ("4.2M", "16.8M", "67M"):
        rows, cols = SIZES[size][1]
        if rows * cols > largest:
            continue
        data = weights((rows, cols)).data
        for n_threads in threads:
            engine = Engine(n_threads)
            for name, (parts, options) in REDUCTIONS.items():
                shape = (rows, cols) if parts == 1 else (parts, rows // parts, cols)
                runs = {(name, "off"): Run(engine, (Layer("w", shape, "float32", data),), options, False)}
                found += [{"size": size, **row} for row in measure(runs, n_threads, rounds)]
            engine.close()
    return found


def in_cache(chosen: dict[str, dict[str, Any]], rounds: int) -> dict[str, float]:
    """GB/s of each case on one thread with its weights in cache: what the kernel could do if memory cost nothing."""
    layer = weights((32, 4096))  # in the second-level cache, large enough that starting up counts little
    engine = Engine(1)
    timed: dict[str, Callable[[], float | None]] = {}
    for name, options in chosen.items():
        run = Run(engine, (layer,), options, False).bound()
        timed[name] = lambda run=run: sum(run() for _ in range(10))  # type: ignore[misc]
    seconds = interleaved(timed, rounds)
    engine.close()
    return {name: summary(seconds[f"{name} kernel"], 10 * layer.nbytes)["gb_s"] for name in chosen}


def layers(rounds: int) -> Figures:
    """Whole calls in-process on two threads, as a user sees them: one layer of 4 MiB, 100 of them, one as a list."""
    import flightquant

    many = {f"w{i}": weights((256, 4096), seed=i).data.reshape(256, 4096) for i in range(100)}
    values = many["w0"].reshape(-1)

    def each() -> None:
        for name, layer in many.items():
            flightquant.quantize({name: layer}, "int4", metrics=False, n_threads=2)

    def together() -> None:
        flightquant.quantize(many, "int4", metrics=False, n_threads=2)

    def through_a_list() -> None:
        back = np.array(values.tolist(), np.float32).reshape(256, 4096)
        flightquant.quantize({"w": back}, "int4", metrics=False, n_threads=2)

    seconds = interleaved({"alone": each, "together": together, "list": through_a_list}, rounds)
    names = {"alone": "a layer of 4 MiB (mean of 100)", "together": "100 layers of 4 MiB", "list": "one through a list"}
    found: Figures = []
    for key, taken in seconds.items():
        each_ms = sorted(value * 1e3 / (len(many) if key == "alone" else 1) for value in taken)
        found.append({"case": names[key], "ms": statistics.median(each_ms), "min": each_ms[0], "max": each_ms[-1]})
    return found
