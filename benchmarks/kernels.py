"""Kernels against the memory they read, and against NumPy: ``python benchmarks/kernels.py``.

GB/s of input; the share is of the read bandwidth measured in the same rounds with the same number of threads. "off"
and "on" are the quality columns. "kernel" counts the time in the kernels; "call" the whole call, with its checks and
its answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from harness import OtherLoad, header, interleaved, machine, reader, summary, write_json

from flightquant import reference
from flightquant.cython_core.engine import Engine
from flightquant.layers import as_layer, layers_batch
from flightquant.spec import Command

CASES: dict[str, dict[str, Any]] = {
    "int8 channel": {"scheme": "int8"},
    "int8 group 128": {"scheme": "int8", "group_size": 128},
    "int8 tensor": {"scheme": "int8", "granularity": "tensor"},
    "int8 channel asym": {"scheme": "int8", "symmetric": False},
    "int4 group 128": {"scheme": "int4"},
    "int4 group 32": {"scheme": "int4", "group_size": 32},
    "int4 group 128 asym": {"scheme": "int4", "symmetric": False},
    "q8_0": {"scheme": "q8_0"},
    "q4_0": {"scheme": "q4_0"},
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def kernel(engine: Engine, weights: np.ndarray, options: dict[str, Any], metrics: bool) -> Callable[[], Any]:
    """One quantization of a whole layer, checks and answer included; returns its kernels' seconds."""
    batch = layers_batch([as_layer("weight", weights)])
    session = engine.session(batch.schema, Command.build(metrics=metrics, **options))
    return lambda: session.quantize(batch).seconds["kernel"]


def against_memory(rows: int, cols: int, rounds: int) -> list[dict[str, Any]]:
    """Every case, dtype and number of threads, interleaved with plain reading of the same bytes."""
    source = (np.random.default_rng(1).standard_normal((rows, cols)) * 0.02).astype(np.float32)
    found = []
    for n_threads in (1, 2):
        engine = Engine(n_threads)
        for dtype, kind in DTYPES.items():
            weights = source.astype(kind)
            cases: dict[str, Callable[[], Any]] = {"read": reader(source, n_threads)}
            for name, options in CASES.items():
                cases[f"{name}|off"] = kernel(engine, weights, options, False)
                cases[f"{name}|on"] = kernel(engine, weights, options, True)
            seconds = interleaved(cases, rounds)
            read = summary(seconds.pop("read"), source.nbytes)
            for name in [name for name in seconds if not name.endswith(" kernel")]:
                case, metrics = name.split("|")
                rate = summary(seconds[f"{name} kernel"], weights.nbytes)
                call = summary(seconds[name], weights.nbytes)
                facts = {"case": case, "metrics": metrics, "dtype": dtype, "threads": n_threads}
                shares = {"share": rate["gb_s"] / read["gb_s"], "call_share": call["gb_s"] / read["gb_s"]}
                ns = weights.nbytes / rate["gb_s"] / weights.size
                found.append({**facts, **rate, **shares, "ns_per_weight": ns, "call": call, "read": read})
        engine.close()
    return found


def against_numpy(rounds: int) -> list[dict[str, Any]]:
    """One thread against the NumPy reference, on a layer that NumPy can finish."""
    weights = (np.random.default_rng(2).standard_normal((512, 4096)) * 0.02).astype(np.float32)
    engine = Engine(1)
    found = []
    for name, options in CASES.items():
        spec = Command.build(**options).layer_spec()

        def slow(spec: Any = spec) -> None:
            reference.quantize(weights, spec, "float32", measure=False)

        seconds = interleaved({"numpy": slow, "kernel": kernel(engine, weights, options, False)}, rounds)
        rates = {side: summary(values, weights.nbytes) for side, values in seconds.items()}
        found.append({"case": name, **rates, "times": rates["kernel"]["gb_s"] / rates["numpy"]["gb_s"]})
    engine.close()
    return found


def main() -> None:
    """Run, print, and write JSON where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    facts, load = machine(), OtherLoad()
    print(header(facts))
    found = against_memory(options.rows, options.cols, options.rounds)
    seen = None
    for row in found:
        group = (row["threads"], row["dtype"])
        if group != seen:
            seen = group
            read = row["read"]
            print(
                f"\n{row['dtype']} {options.rows}x{options.cols}, {row['threads']} thread(s); reading "
                f"{read['gb_s']:.1f} GB/s ({read['min']:.1f} to {read['max']:.1f})"
            )
        print(
            f"  {row['case']:<20} {row['metrics']:<3} kernel {row['gb_s']:6.2f} GB/s ({row['min']:.2f} to "
            f"{row['max']:.2f}) {row['share']:5.0%} of reading {row['ns_per_weight']:.3f} ns/weight;"
            f" call {row['call']['gb_s']:6.2f} GB/s {row['call_share']:5.0%}"
        )
    print("\nagainst the NumPy reference, float32 512x4096, 1 thread")
    numpy_rows = against_numpy(max(3, options.rounds // 2))
    for row in numpy_rows:
        print(
            f"  {row['case']:<20} {row['kernel']['gb_s']:6.2f} GB/s, NumPy {row['numpy']['gb_s']:.3f} GB/s: "
            f"{row['times']:.0f} times"
        )
    shares = load.shares()
    print(f"\nCPU time stolen by the host: {shares['stolen']:.1%}; used by this process: {shares['own']:.0%}")
    write_json(options.json, {"machine": facts, "kernels": found, "numpy": numpy_rows, "load": shares})


if __name__ == "__main__":
    main()
