"""Make ``golden.npz``: what compressed-tensors and gguf themselves answer to weights that are hard to get right.

Run from the repository root, with the ``oracles`` extra installed::

    PYTHONPATH=tests python tests/golden/make_golden.py

The file holds the inputs' bits as well, so that the tests need neither library. One JSON index describes the cases;
bytes, scales and zero points of all cases stand one after the other in three arrays.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from fq_oracles import library_quantize

TARGET = Path(__file__).with_name("golden.npz")
COLS = 256
LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38, "float64": 3.4e38}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133, "float64": 2.0**-149}
STORAGE = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
TAILS = (1, 3, 7, 31, 33, 100)
TENSORS = ((0, 1), (1, 3), (4, 6), (6, 9), (10, 16), (3, 4), (9, 10))


def matrix(dtype: str) -> npt.NDArray[np.float64]:
    """16 rows of 256 weights, each row one kind of trouble, within the dtype's range."""
    rng = np.random.default_rng(20261121)
    largest, smallest = LARGEST[dtype], SMALLEST[dtype]
    decades = np.log10(largest)
    rows = np.zeros((16, COLS))
    rows[0, ::2] = -0.0
    rows[1, :128], rows[1, 128:] = 0.5, -3.0
    rows[2] = np.arange(COLS) - 127.5  # int8: every code and every tie at scale 1
    rows[3] = rng.standard_normal(COLS)
    rows[3, 77] = largest * 1e-3
    rows[4] = rng.integers(-9, 10, COLS) * smallest
    rows[5] = np.where(np.arange(COLS) % 2, 1.0, -1.0) * np.repeat(rng.choice([1, -1], 8), 32)
    rows[6] = rng.uniform(1, 2, COLS)
    rows[7] = -rng.uniform(0.1, 0.2, COLS)
    rows[8] = rng.choice([-1, 1], COLS) * 10 ** rng.uniform(-min(30, decades), min(30, decades), COLS)
    rows[9] = rng.uniform(-1, 1, COLS) * largest
    rows[9, 5], rows[9, 200] = largest, -largest
    rows[10] = rng.standard_normal(COLS) * 0.02
    rows[11] = rng.standard_normal(COLS) * np.repeat(10.0 ** -np.arange(8), 32)
    rows[12] = rng.standard_normal(COLS) * smallest * 100  # amax / levels underflows: the scale becomes eps
    rows[13, ::5] = np.resize(np.arange(-7.5, 8, 0.5), len(rows[13, ::5]))  # int4: ties at scale 1
    rows[13, 0::32], rows[13, 1::32] = 7.5, -7.5
    rows[14] = np.resize(np.arange(-8, 8, 0.5), COLS)  # q4_0: ties at d = 1
    rows[14, 9::32] = -8
    rows[15] = np.resize(np.arange(-63.5, 64, 0.5), COLS)  # q8_0: ties at d = 1
    rows[15, 31::32] = 127
    return rows


def storage(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[Any]:
    """The values in the dtype, bfloat16 as its bits."""
    stored = values.astype(STORAGE[dtype])
    return stored.view(np.uint16) if dtype == "bfloat16" else stored


def integer_options() -> list[dict[str, Any]]:
    """Every scheme, granularity and symmetry of the integer schemes."""
    return [
        {"scheme": scheme, "symmetric": symmetric, "granularity": granularity, "group_size": group_size}
        for scheme in ("int8", "int4")
        for symmetric in (True, False)
        for granularity, group_size in (
            ("tensor", None),
            ("channel", None),
            *(("group", size) for size in (32, 64, 128, 256)),
        )
    ]


def cases() -> list[tuple[str, tuple[int, int, int], dict[str, Any]]]:
    """(dtype, (first row, last row, columns), options) of every case."""
    chosen: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = []
    whole = (0, 16, COLS)
    for dtype in STORAGE:
        for options in integer_options():
            if dtype == "float64" and (options["granularity"] == "tensor" or options["group_size"] not in (None, 128)):
                continue
            if options["granularity"] == "tensor":
                chosen += [(dtype, (first, last, COLS), options) for first, last in TENSORS]
            else:
                chosen.append((dtype, whole, options))
            if options["granularity"] != "group":
                chosen += [(dtype, (0, 16, cols), options) for cols in TAILS]
            if options["granularity"] == "group" and options["group_size"] not in (32, 128):
                continue
            for scale_dtype in ("float32", "float16", "bfloat16"):
                chosen.append((dtype, (10, 13, COLS), {**options, "scale_dtype": scale_dtype}))
                chosen.append((dtype, (3, 10, COLS), {**options, "scale_dtype": scale_dtype}))
        chosen += [(dtype, whole, {"scheme": scheme}) for scheme in ("q8_0", "q4_0")]
    return chosen


def main() -> None:
    """Ask the libraries and write the file."""
    inputs = {dtype: storage(matrix(dtype), dtype) for dtype in STORAGE}
    index = []
    data, scales, zeros = [], [], []
    for dtype, (first, last, cols), options in cases():
        weights = np.ascontiguousarray(inputs[dtype][first:last, :cols])
        packed, scale, zero = library_quantize(weights, dtype, options)
        data.append(packed)
        scales.append(np.zeros(0, np.float32) if scale is None else scale)
        zeros.append(np.zeros(0, np.float32) if zero is None else zero)
        given = {key: value for key, value in options.items() if value is not None}
        index.append([dtype, first, last, cols, len(packed), len(scales[-1]), len(zeros[-1]), given])
    made_with = {name: version(name) for name in ("compressed-tensors", "torch", "gguf", "numpy")}
    text = json.dumps({"made_with": made_with, "cases": index}).encode()
    np.savez_compressed(
        TARGET,
        index=np.frombuffer(text, np.uint8),
        data=np.concatenate(data),
        scales=np.concatenate(scales),
        zero_points=np.concatenate(zeros),
        **inputs,
    )
    sys.stdout.write(f"{TARGET}: {len(index)} cases, {TARGET.stat().st_size} bytes, {made_with}\n")


if __name__ == "__main__":
    main()
