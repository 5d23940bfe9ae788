"""Make the golden vectors: what the libraries themselves answer to weights that are hard to get right.

Run from the repository root, with the ``oracles`` extra installed, for all families or for those named::

    PYTHONPATH=tests python tests/golden/make_golden.py [family ...]

Each family's file, ``<family>.npz``, holds the inputs' bits as well, so that the tests need no library. One JSON index
describes the cases; bytes, scales and zero points of all cases stand one after the other in three arrays.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from fq_oracles import library_quantize

FOLDER = Path(__file__).parent
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
    """22 rows of 256 weights, each row one kind of trouble, within the dtype's range."""
    rng = np.random.default_rng(20261121)
    largest, smallest = LARGEST[dtype], SMALLEST[dtype]
    decades = np.log10(largest)
    rows = np.zeros((22, COLS))
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
    rows[16] = np.resize(np.arange(-16, 16, 0.5), COLS)  # q5_0: ties at d = 1
    rows[16, 7::32] = -16
    rows[17] = np.resize(np.arange(-3, 28, 0.5), COLS)  # q5_1: ties at d = 1
    rows[17, 3::32], rows[17, 30::32] = -3, 28
    for row, kind in ((18, ml_dtypes.float8_e4m3fn), (20, ml_dtypes.float8_e5m2)):
        every = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
        finite = np.sort(every[np.isfinite(every)])
        rows[row] = np.resize(finite, COLS)  # every 8-bit float at scale 1, and every tie
        rows[row + 1] = np.resize((finite[1:] + finite[:-1]) / 2, COLS)
        rows[row + 1, -1] = finite[-1]
    return rows


def signed_zeros(dtype: str) -> npt.NDArray[np.float64]:
    """2 rows of positive weights with zeros of both signs in each 32: the first one negative, then positive."""
    rows = np.abs(np.random.default_rng(20261123).standard_normal((2, COLS))) * max(0.02, SMALLEST[dtype])
    rows[0, 3::32], rows[0, 20::32] = -0.0, 0.0
    rows[1, 3::32], rows[1, 20::32] = 0.0, -0.0
    return rows


def storage(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[Any]:
    """The values in the dtype, bfloat16 as its bits."""
    stored = values.astype(STORAGE[dtype])
    return stored.view(np.uint16) if dtype == "bfloat16" else stored


COMMON_LIBRARIES = ("auto-gptq", "autoawq", "mlx", "compressed-tensors", "torch", "gguf", "bitsandbytes", "numpy")
LIBRARIES = {
    "gguf": ("gguf", "numpy"),
    "fbgemm": ("torch", "numpy"),
    "kquants": ("llama-cpp-python", "numpy"),
    "onnx": ("onnxruntime", "numpy"),
    "hqq": ("hqq", "torch", "numpy"),
    "codebook": ("bitsandbytes", "torch", "numpy"),
}

Case = tuple[tuple[int, int, int], dict[str, Any]]
"""(First row, last row, columns) of the matrix, and the command's options; ``importance`` is a row of the table."""


def integer(dtype: str) -> Iterator[Case]:
    """Every granularity and symmetry of int8 and int4; of the others, whose parameters those cover, a part."""
    units = (("tensor", None), ("channel", None), *(("group", size) for size in (32, 64, 128, 256)))
    for scheme, symmetric, (granularity, group_size) in itertools.product(("int8", "int4"), (True, False), units):
        options = {"scheme": scheme, "symmetric": symmetric, "granularity": granularity, "group_size": group_size}
        if dtype == "float64" and (granularity == "tensor" or group_size not in (None, 128)):
            continue
        if granularity == "tensor":
            yield from (((first, last, COLS), options) for first, last in TENSORS)
        else:
            yield (0, 16, COLS), options
        if granularity != "group":
            yield from (((0, 16, cols), options) for cols in TAILS)
        if granularity == "group" and group_size not in (32, 128):
            continue
        for scale_dtype in ("float32", "float16", "bfloat16"):
            yield (10, 13, COLS), {**options, "scale_dtype": scale_dtype}
            yield (3, 10, COLS), {**options, "scale_dtype": scale_dtype}
    for scheme, symmetric in itertools.product(("int2", "int3", "int5", "int6", "int7"), (True, False)):
        options = {"scheme": scheme, "symmetric": symmetric}
        yield (0, 16, COLS), {**options, "granularity": "group", "group_size": 32}
        if dtype == "float64":
            continue
        yield (0, 16, COLS), {**options, "granularity": "channel"}
        yield from (((10, 16, cols), {**options, "granularity": "channel"}) for cols in TAILS)
        yield (10, 16, COLS), {**options, "granularity": "tensor"}
        yield (3, 10, COLS), {**options, "granularity": "group", "group_size": 128}


def float8(_: str) -> Iterator[Case]:
    """Both formats, one scale a row, a tensor or a block of 128x128."""
    for scheme in ("fp8_e4m3", "fp8_e5m2"):
        channel, tensor, block = ({"scheme": scheme, "granularity": name} for name in ("channel", "tensor", "block"))
        yield (0, 16, COLS), channel
        yield (18, 22, COLS), channel
        yield from (((first, last, COLS), tensor) for first, last in TENSORS)
        yield from (((first, last, COLS), block) for first, last in (*TENSORS, (0, 22)))
        yield from (((0, 16, cols), each) for cols in TAILS for each in (channel, block))
        yield (10, 16, 200), {**block, "scale_dtype": "float32"}
        for scale_dtype in ("float32", "float16", "bfloat16"):
            yield (3, 13, COLS), {**channel, "scale_dtype": scale_dtype}


def codebook(_: str) -> Iterator[Case]:
    """Blocks of the flat tensor, most with a short one at the end."""
    for scheme in ("nf4", "fp4"):
        yield from (((0, 16, COLS), {"scheme": scheme, "group_size": size}) for size in (32, 64, 4096))
        yield from (((2, 15, 251), {"scheme": scheme, "group_size": 32 << k}) for k in range(8))
        yield from (((0, 16, cols), {"scheme": scheme}) for cols in TAILS)
        nested = {"scheme": scheme, "packing": "bnb-nested"}
        yield from (((0, 22, COLS), {**nested, "group_size": size}) for size in (32, 64, 4096))
        yield from (((10, 16, cols), {**nested, "group_size": 32}) for cols in TAILS)
    yield from (((0, 22, COLS), {"scheme": "bnb8", "group_size": size}) for size in (64, 256, 4096))
    yield from (((2, 15, 251), {"scheme": "bnb8", "group_size": 64 << k}) for k in range(7))
    yield from (((0, 16, cols), {"scheme": "bnb8"}) for cols in TAILS)


def arrowquant(_: str) -> Iterator[Case]:
    """Every width and granularity; the source's rule, not its program (tests/fq_oracles.py)."""
    for width in (2, 4, 8):
        options = {"scheme": "arrowquant", "bit_width": width}
        yield (0, 18, COLS), {**options, "granularity": "channel"}
        yield (0, 16, COLS), {**options, "granularity": "group", "group_size": 32}
        yield from (((0, 16, cols), {**options, "granularity": "channel"}) for cols in TAILS)
        yield from (((first, last, COLS), {**options, "granularity": "tensor"}) for first, last in TENSORS)


def mlx(_: str) -> Iterator[Case]:
    """MLX's affine codes of every width and group size."""
    for width, group_size in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128)):
        yield (0, 18, COLS), {"scheme": "mlx", "bit_width": width, "group_size": group_size}


def hqq(_: str) -> Iterator[Case]:
    """HQQ's codes of every width and group size; of 3 bits, whole words of ten and not."""
    for width, group_size in itertools.product((8, 4, 3, 2), (32, 64, 128)):
        last = 20 if width == 3 else 18
        yield (0, last, COLS), {"scheme": f"hqq{width}", "group_size": group_size}
        yield (32, 34, COLS), {"scheme": f"hqq{width}", "group_size": group_size}
        # Not rows whose range is beyond float32, of which hqq makes nothing.
        steps = {"scheme": f"hqq{width}", "group_size": group_size, "calibration": "proximal"}
        yield from (((first, last, COLS), steps) for first, last in ((0, 8), (10, 22)))
    yield (10, 13, 128), {"scheme": "hqq3"}


def micro(_: str) -> Iterator[Case]:
    """Groups of 16 and 32, one scale of the tensor over those of nvfp4."""
    for scheme in ("mxfp4", "mxfp8"):
        yield (0, 22, COLS), {"scheme": scheme}
        yield (10, 16, 96), {"scheme": scheme}
    yield from (((first, last, COLS), {"scheme": "nvfp4"}) for first, last in (*TENSORS, (0, 22), (14, 15), (18, 22)))
    yield from (((10, 15, cols), {"scheme": "nvfp4"}) for cols in (16, 48, 112))


def packing(dtype: str) -> Iterator[Case]:
    """GPTQ's and AWQ's layouts: 32 rows, which is what they take. Rows without negative weights are not for GPTQ v1."""
    if dtype == "float64":
        return
    for scheme, layouts in (
        ("int4", ("gptq", "gptq-v2", "awq")),
        ("int8", ("gptq", "gptq-v2")),
        ("int3", ("gptq", "gptq-v2")),
        ("int2", ("gptq", "gptq-v2")),
    ):
        for layout, symmetric, group_size in itertools.product(layouts, (True, False), (32, 128, None)):
            if layout == "gptq" and not symmetric:
                continue
            granularity = "group" if group_size else "channel"
            options = {"scheme": scheme, "packing": layout, "symmetric": symmetric, "granularity": granularity}
            yield (0, 32, COLS), {**options, "group_size": group_size}


def onnx(dtype: str) -> Iterator[Case]:
    """ONNX Runtime's MatMulNBits of every width; zero points of an odd number of groups."""
    for scheme, symmetric in itertools.product(("int2", "int4", "int8"), (True, False)):
        options = {"scheme": scheme, "packing": "onnx", "symmetric": symmetric}
        yield from (((0, 22, COLS), {**options, "group_size": size}) for size in (32, 128))
        yield (10, 16, 96), {**options, "group_size": 32}
        yield (10, 17, 48), {**options, "group_size": 16}
        if dtype == "float32":
            yield (0, 22, COLS), {**options, "group_size": 64, "scale_dtype": "bfloat16"}
            yield (0, 22, COLS), {**options, "group_size": 256}


def gguf(_: str) -> Iterator[Case]:
    """ggml's blocks of 32."""
    yield from (((0, 16, COLS), {"scheme": scheme}) for scheme in ("q8_0", "q4_0"))
    yield from (((0, 18, COLS), {"scheme": scheme}) for scheme in ("q4_1", "q5_0", "q5_1"))
    yield (0, 22, COLS), {"scheme": "mxfp4", "packing": "gguf"}


def fbgemm(_: str) -> Iterator[Case]:
    """FBGEMM's rows, in each width that it takes."""
    for scheme, tails in (("int8", TAILS), ("int4", (2, 34, 100)), ("int2", (4, 36, 100))):
        yield from (((0, 22, cols), {"scheme": scheme, "packing": "fbgemm"}) for cols in (*tails, COLS))


def kquants(dtype: str) -> Iterator[Case]:
    """ggml's searched blocks of 256 and 32."""
    for scheme in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl"):
        yield (0, 22, COLS), {"scheme": scheme}
        if dtype in ("float32", "bfloat16"):
            yield from (((0, 22, COLS), {"scheme": scheme, "importance": row}) for row in range(len(importances())))


def importances() -> npt.NDArray[np.float32]:
    """What errors count, one kind a row: as activations have it, with unused columns, over many decades, not at all."""
    rng = np.random.default_rng(20261122)
    usual = rng.standard_normal(COLS) ** 2
    unused = np.where(rng.random(COLS) < 0.5, 0, rng.random(COLS))
    return np.array([usual, unused, 10 ** rng.uniform(-20, 20, COLS), np.zeros(COLS)], np.float32)


FAMILIES: dict[str, Callable[[str], Iterator[Case]]] = {
    "integer": integer,
    "float8": float8,
    "codebook": codebook,
    "gguf": gguf,
    "kquants": kquants,
    "micro": micro,
    "packing": packing,
    "onnx": onnx,
    "fbgemm": fbgemm,
    "mlx": mlx,
    "arrowquant": arrowquant,
    "hqq": hqq,
}
"""The cases of each family for weights of a dtype; the name is the file's."""


def write(family: str) -> None:
    """Ask the libraries and write the family's file."""
    inputs = {}
    for dtype in STORAGE:
        rows = np.concatenate([np.resize(matrix(dtype), (32, COLS)), signed_zeros(dtype)])
        inputs[dtype] = storage(rows, dtype)
    index = []
    data, scales, zeros = [], [], []
    for dtype in STORAGE:
        for (first, last, cols), options in FAMILIES[family](dtype):
            weights = np.ascontiguousarray(inputs[dtype][first:last, :cols])
            known = dict(options)
            if "importance" in known:
                known["importance"] = np.ascontiguousarray(importances()[known["importance"], :cols])
            packed, scale, zero = library_quantize(weights, dtype, known)
            data.append(packed)
            scales.append(np.zeros(0, np.float32) if scale is None else scale)
            zeros.append(np.zeros(0, np.float32) if zero is None else zero)
            given = {key: value for key, value in options.items() if value is not None}
            index.append([dtype, first, last, cols, len(packed), len(scales[-1]), len(zeros[-1]), given])
    made_with = {name: version(name) for name in LIBRARIES.get(family, COMMON_LIBRARIES)}
    text = json.dumps({"made_with": made_with, "cases": index}).encode()
    target = FOLDER / f"{family}.npz"
    np.savez_compressed(
        target,
        index=np.frombuffer(text, np.uint8),
        data=np.concatenate(data),
        scales=np.concatenate(scales),
        zero_points=np.concatenate(zeros),
        importance=importances(),
        **inputs,
    )
    sys.stdout.write(f"{target}: {len(index)} cases, {target.stat().st_size} bytes, {made_with}\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        write(name)
