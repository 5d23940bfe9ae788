"""What the tests share: golden vectors, weights that are hard to get right, request batches, exact comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant import reference
from flightquant.errors import LayerError
from flightquant.reference import QuantizedLayer, quality
from flightquant.spec import Command

GOLDEN = Path(__file__).parent / "golden"
STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
}
ARROW_VALUES = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "float64": pa.float64(),
    "bfloat16": pa.uint16(),
}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GoldenCase:
    """One matrix and what its scheme's own library makes of it."""

    name: str
    dtype: str
    weights: Array
    options: dict[str, Any]
    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32] | None
    zero_points: npt.NDArray[np.float32] | None
    importance: npt.NDArray[np.float32] | None = None


@lru_cache(maxsize=1)
def golden_cases() -> tuple[GoldenCase, ...]:
    """The stored answers of the libraries, of every family (tests/golden/make_golden.py)."""
    return tuple(case for path in sorted(GOLDEN.glob("*.npz")) for case in _family(path))


def _family(path: Path) -> list[GoldenCase]:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    index = json.loads(arrays["index"].tobytes())["cases"]
    at = [0, 0, 0]
    cases = []
    for dtype, first, last, cols, *sizes, options in index:
        parts = []
        for which, name in enumerate(("data", "scales", "zero_points")):
            parts.append(arrays[name][at[which] : at[which] + sizes[which]])
            at[which] += sizes[which]
        weights = np.ascontiguousarray(arrays[dtype][first:last, :cols])
        label = "-".join(map(str, (dtype, f"{first}:{last}x{cols}", *options.values())))
        data, scales, zeros = parts
        row = options.pop("importance", None)
        importance = None if row is None else arrays["importance"][row, :cols]
        given = scales if sizes[1] else None, zeros if sizes[2] else None
        cases.append(GoldenCase(label, dtype, weights, options, data, *given, importance))
    return cases


def stored_as(values: Array, dtype: str) -> Array:
    """Values in one of the four dtypes, bfloat16 as its bits; what is too large becomes the largest finite value."""
    info = ml_dtypes.finfo(STORAGE[dtype])
    clipped = np.clip(values, float(info.min), float(info.max)) if dtype != "float64" else values
    with np.errstate(all="ignore"):
        stored = np.asarray(clipped).astype(STORAGE[dtype])
    return stored.view(np.uint16) if dtype == "bfloat16" else stored


def weights_like(kind: str, size: int, dtype: str, rng: np.random.Generator) -> Array:
    """``size`` finite weights of one kind of trouble, as stored in the dtype."""
    values = np.asarray(rng.standard_normal(size) * 0.02)
    if kind == "mixed":
        values = rng.choice([-1.0, 1.0], size) * 10.0 ** rng.uniform(-30, 30, size)
    elif kind == "denormal":
        values = rng.integers(-200, 200, size) * float(ml_dtypes.finfo(STORAGE[dtype]).smallest_subnormal)
    elif kind == "ties":
        values = rng.integers(-256, 256, size) / 2.0
    elif kind == "zeros":
        values = np.where(rng.random(size) < 0.5, -0.0, 0.0)
    elif kind == "huge":
        values = rng.uniform(-1, 1, size) * 3.4e38
    elif kind == "outlier":
        values[rng.integers(0, size, max(1, size // 97))] = 1e10
    elif kind == "positive":
        values = np.abs(values) + 1.0
    elif kind == "constant":
        values = np.full(size, -0.3)
    elif kind == "blocks":
        values = values * np.repeat(10.0 ** rng.integers(-12, 6, size // 32 + 1), 32)[:size]
    elif kind != "normal":
        raise ValueError(kind)
    return stored_as(values, dtype)


KINDS = ("normal", "mixed", "denormal", "ties", "zeros", "huge", "outlier", "positive", "constant", "blocks")


def at_alignment(data: bytes | Array, alignment: int) -> pa.Buffer:
    """An Arrow buffer of these bytes whose address is ``alignment`` modulo 64."""
    raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
    memory = np.zeros(len(raw) + 128, np.uint8)
    start = -memory.ctypes.data % 64 + alignment
    memory[start : start + len(raw)] = np.frombuffer(raw, np.uint8)
    return pa.py_buffer(memory)[start : start + len(raw)]


def weights_type(dtype: str, kind: str = "list", *, size: int = 0, storage: pa.DataType | None = None) -> pa.Field:
    """The ``weights`` field: ``kind`` is list, large_list or fixed_size_list (of ``size``)."""
    values = storage or ARROW_VALUES[dtype]
    if kind == "fixed_size_list":
        made = pa.list_(values, size)
    else:
        made = pa.large_list(values) if kind == "large_list" else pa.list_(values)
    return pa.field("weights", made, metadata={"dtype": dtype} if dtype == "bfloat16" else None)


def weights_array(layers: Sequence[Array], field: pa.Field, alignment: int = 0) -> pa.Array:
    """One list a layer, over one values buffer at an address of this alignment (offsets likewise)."""
    flat = np.concatenate([np.asarray(layer).reshape(-1) for layer in layers]) if layers else np.zeros(0, np.float32)
    offsets = np.concatenate([[0], np.cumsum([np.asarray(layer).size for layer in layers])]).astype(np.int64)
    kind = field.type
    values = pa.Array.from_buffers(kind.value_type, int(offsets[-1]), [None, at_alignment(flat, alignment)])
    if pa.types.is_fixed_size_list(kind):
        return pa.Array.from_buffers(kind, len(layers), [None], children=[values])
    width = np.int64 if pa.types.is_large_list(kind) else np.int32
    starts = at_alignment(offsets.astype(width), alignment)
    return pa.Array.from_buffers(kind, len(layers), [None, starts], children=[values])


def request(
    layers: Mapping[str, Array],
    dtype: str = "float32",
    *,
    kind: str = "list",
    storage: pa.DataType | None = None,
    alignment: int = 0,
    columns: Mapping[str, pa.Array] | None = None,
) -> pa.RecordBatch:
    """One request batch with ``layer_name``, ``weights``, ``shape`` (the arrays' own), then ``columns``."""
    arrays = list(layers.values())
    size = arrays[0].size if arrays else 0
    field = weights_type(dtype, kind, size=size, storage=storage)
    made = {
        "layer_name": pa.array(list(layers), pa.utf8()),
        "weights": weights_array(arrays, field, alignment),
        "shape": pa.array([list(array.shape) for array in arrays], pa.list_(pa.int64())),
        **(columns or {}),
    }
    fields = [field if name == "weights" else pa.field(name, array.type) for name, array in made.items()]
    return pa.RecordBatch.from_arrays(list(made.values()), schema=pa.schema(fields))


def reference_layer(
    weights: Array,
    dtype: str,
    command: Command,
    global_amax: float | None = None,
    importance: Array | None = None,
) -> QuantizedLayer | LayerError:
    """What the reference makes of one layer of any shape, or the error it raises."""
    rows, cols = reference.matrix_shape(weights.shape)
    if rows * cols == 0:
        return QuantizedLayer(np.zeros(0, np.uint8), np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(4))
    try:
        return reference.quantize(weights.reshape(rows, cols), command.layer_spec(), dtype, global_amax, importance)
    except LayerError as error:
        return error


def same_bits(got: Any, expected: Any, what: str) -> None:
    """Fail unless two arrays hold the same bytes; the message names the first difference."""
    got, expected = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    assert got.size == expected.size, f"{what}: {got.size} values instead of {expected.size}"
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    differ = np.flatnonzero(got.reshape(-1).view(unsigned) != expected.reshape(-1).view(unsigned))
    if differ.size:
        at = int(differ[0])
        raise AssertionError(
            f"{what}: {differ.size} of {got.size} values differ, first at {at}: "
            f"{got.reshape(-1)[at]!r} instead of {expected.reshape(-1)[at]!r}"
        )


def floats_of(scalar: Any) -> npt.NDArray[np.float32] | None:
    """The values of one ``list<float32>`` cell, None for null."""
    return scalar.values.to_numpy() if scalar.is_valid else None


def check_row(batch: pa.RecordBatch, i: int, expected: QuantizedLayer | LayerError, what: str = "") -> None:
    """Row ``i`` of an answer holds exactly what the reference says: bytes, scales, zero points and quality."""
    row = {name: batch.column(name)[i] for name in batch.schema.names if not name.startswith("x_")}
    label = f"{what} row {i} {row['layer_name']}"
    if isinstance(expected, LayerError):
        assert row["status"].as_py() == expected.status, f"{label}: {row['status']} {row['error']}"
        assert not row["quantized_data"].is_valid, label
        return
    assert row["status"].as_py() == "ok", f"{label}: {row['status']} {row['error']}"
    assert not row["error"].is_valid, label
    same_bits(np.frombuffer(row["quantized_data"].as_buffer() or b"", np.uint8), expected.data, f"{label} data")
    for name, wanted in (("scales", expected.scales), ("zero_points", expected.zero_points)):
        got = floats_of(row[name])
        if wanted is None:
            assert got is None, f"{label}: {name} is {got!r} instead of null"
        elif wanted.size or got is not None:
            assert got is not None, f"{label}: {name} is null"
            same_bits(got, wanted, f"{label} {name}")
    if row["sqnr_db"].is_valid:
        for name, values in zip(("sqnr_db", "cosine", "max_abs_error"), quality.columns(expected.sums), strict=True):
            got_value = np.array([row[name].as_py()], np.float32)
            if np.isnan(values[0]):
                assert np.isnan(got_value[0]), f"{label} {name}: {got_value[0]} instead of NaN"
            else:
                same_bits(got_value, values, f"{label} {name}")


def answer_bytes(batch: pa.RecordBatch) -> bytes:
    """Every byte of an answer but its timing, so that two answers can be compared whole, null slots included."""
    timeless = batch.select([name for name in batch.schema.names if name != "kernel_ns"])
    return bytes(timeless.serialize())


def matrix_of(rows: Sequence[Any]) -> Array:
    """Rows of ``answer.sums`` as the reference returns them, one array."""
    return np.array([np.zeros(4) if isinstance(row, LayerError) else row.sums for row in rows])
