"""Every format in NumPy: the specification that the kernels are held to, bit for bit, and the dequantizer.

Slow on purpose: each function follows its format's rule one operation at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.errors import InvalidRequestError, LayerError
from flightquant.reference import gguf, integer, quality
from flightquant.reference.numeric import F32, widen
from flightquant.spec import SCHEMES, Command, LayerSpec

__all__ = ["QuantizedLayer", "dequantize", "dequantize_matrix", "matrix_shape", "packed_bytes", "quantize"]

Size = TypeVar("Size", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """One layer's answer: packed bytes, flat scales and zero points, and the four quality sums."""

    data: npt.NDArray[np.uint8]
    scales: F32 | None
    zero_points: F32 | None
    sums: npt.NDArray[np.float64]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a tensor: all axes but the last make rows; one of 0 or 1 dimensions is one row."""
    return (prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def unit_length(spec: LayerSpec, cols: int) -> int:
    """Weights in one unit of the kernels' tiling: a group or block, else a row."""
    return spec.group_size or cols


def packed_bytes(spec: LayerSpec, rows: Size, cols: Size) -> Size:
    """Bytes of ``quantized_data`` for a matrix, or for each of many."""
    if spec.scheme.block_bytes:
        return rows * (cols // spec.group_size) * spec.scheme.block_bytes
    if spec.scheme.bits == 8:
        return rows * cols
    return rows * (-(-cols * spec.scheme.bits // 32) * 4)


def quantize(
    weights: npt.NDArray[Any],
    spec: LayerSpec,
    dtype: str,
    global_amax: float | None = None,
    *,
    measure: bool = True,
) -> QuantizedLayer:
    """Quantize a matrix of shape (rows, cols), not empty; bfloat16 comes as uint16.

    Raises
    ------
    LayerError
        NaN or infinity among the weights (as float32), or a group that does not divide the row.
    """
    rows, cols = weights.shape
    wide = widen(weights, dtype)
    bad = np.flatnonzero(~np.isfinite(wide))
    if bad.size:
        raise LayerError("non_finite", f"weight {bad[0]} is not finite")
    if spec.group_size and cols % spec.group_size:
        raise LayerError("unsupported", f"group size {spec.group_size} does not divide the row of {cols}")
    scales: F32 | None = None
    zeros: F32 | None = None
    if spec.scheme.block_bytes:
        data = gguf.quantize(weights, spec.scheme.name, dtype)
    else:
        data, scales, zeros = integer.quantize(weights, spec, dtype, global_amax)
        zeros = None if spec.symmetric else zeros
    sums = np.zeros(4)
    if measure:
        again = dequantize_matrix(data, scales, zeros, spec, rows, cols)
        sums = quality.sums(wide.reshape(-1), again.reshape(-1), unit_length(spec, cols))
    return QuantizedLayer(data, scales, zeros, sums)


def dequantize_matrix(
    data: npt.NDArray[np.uint8], scales: F32 | None, zeros: F32 | None, spec: LayerSpec, rows: int, cols: int
) -> F32:
    """float32 weights of shape (rows, cols) from one layer's packed bytes."""
    if spec.scheme.block_bytes:
        return gguf.dequantize(data, spec.scheme.name, spec.scheme.block_bytes, rows, cols)
    if scales is None:
        raise InvalidRequestError(f"{spec.scheme.name} needs scales", field="scales", expected="list<float32>")
    return integer.dequantize(data, scales, zeros, spec, rows, cols)


def dequantize(answers: pa.Table | pa.RecordBatch) -> dict[str, F32]:
    """The layers of a table of answer rows, as float32 arrays of their own shapes, by name and in order.

    A layer that came in parts (rows of one name with ``row_offset``) is joined again.

    Raises
    ------
    LayerError
        A row whose status is not ``ok``: it has nothing to give back.
    InvalidRequestError
        A column is missing, or the bytes do not fit the shape.
    """
    columns = ("layer_name", "shape", "status", "error", "scheme", "group_size", "quantized_data", "scales")
    missing = [name for name in columns if name not in answers.schema.names]
    if missing:
        raise InvalidRequestError(f"the table has no column {missing[0]!r}", field=missing[0], expected=columns)
    parts: dict[str, list[tuple[int | None, F32]]] = {}
    wanted = [name for name in (*columns, "zero_points", "row_offset") if name in answers.schema.names]
    table = pa.Table.from_batches([answers]) if isinstance(answers, pa.RecordBatch) else answers
    for batch in table.select(wanted).to_batches():
        for i in range(batch.num_rows):
            row = {name: batch.column(name)[i] for name in wanted}
            name, matrix = _dequantize_row(row)
            offset = row["row_offset"].as_py() if "row_offset" in row else None
            parts.setdefault(name, []).append((offset, matrix))
    return {name: _join(name, pieces) for name, pieces in parts.items()}


def _join(name: str, pieces: list[tuple[int | None, F32]]) -> F32:
    """One layer from its parts, each of which must begin where the one before it ends."""
    if len(pieces) == 1:
        return pieces[0][1]
    pieces = sorted(pieces, key=lambda piece: piece[0] or 0)
    rows = 0
    for offset, matrix in pieces:
        if offset != rows or matrix.ndim == 0 or matrix.shape[1:] != pieces[0][1].shape[1:]:
            raise InvalidRequestError(
                f'layer "{name}" stands in the table {len(pieces)} times, and a part of shape {list(matrix.shape)} has '
                f"row_offset {offset}; expected parts that follow one another, the next at row {rows}",
                field="row_offset",
                got=offset,
                expected=rows,
            )
        rows += matrix.shape[0]
    return np.concatenate([matrix for _, matrix in pieces], axis=0)


def _dequantize_row(row: Mapping[str, Any]) -> tuple[str, F32]:
    name, status = row["layer_name"].as_py(), row["status"].as_py()
    if status != "ok":
        raise LayerError(status, f'layer "{name}" was not quantized: {row["error"].as_py()}')
    shape = row["shape"].as_py()
    if shape is None or any(extent is None or extent < 0 for extent in shape):
        raise _misfit(name, "shape", shape, "extents of 0 or more")
    rows, cols = matrix_shape(tuple(shape))
    if rows * cols == 0:
        try:
            return name, np.zeros(shape, np.float32)
        except ValueError:
            raise _misfit(name, "shape", shape, "extents that an array can have") from None
    if not row["quantized_data"].is_valid:
        raise _misfit(name, "quantized_data", None, "packed bytes")
    data = np.frombuffer(row["quantized_data"].as_buffer(), np.uint8)
    scales = _floats(name, "scales", row)
    zeros = _floats(name, "zero_points", row)
    spec = _stored_spec(row["scheme"].as_py(), row["group_size"].as_py(), scales, zeros, rows)
    if cols % (spec.group_size or 1) or data.size != packed_bytes(spec, rows, cols):
        expected = f"{packed_bytes(spec, rows, cols)} for {spec.scheme.name} of shape {shape} in whole groups"
        raise _misfit(name, "quantized_data", f"{data.size} bytes", expected)
    count = 1 if spec.granularity == "tensor" else rows * (cols // (spec.group_size or cols))
    for field, values in (("scales", scales), ("zero_points", zeros)):
        if values is not None and values.size != count:
            raise _misfit(name, field, f"{values.size} values", f"{count} for shape {shape}")
    return name, dequantize_matrix(data, scales, zeros, spec, rows, cols).reshape(shape)


def _misfit(name: str, field: str, got: Any, expected: str) -> InvalidRequestError:
    return InvalidRequestError(
        f'layer "{name}" has {got} in "{field}"; expected {expected}', field=field, got=got, expected=expected
    )


def _floats(name: str, field: str, row: Mapping[str, Any]) -> F32 | None:
    if field not in row or not row[field].is_valid:
        return None
    if row[field].values.null_count:
        raise _misfit(name, field, "null", "numbers")
    values: F32 = row[field].values.to_numpy(zero_copy_only=True)
    return values


def _stored_spec(scheme: str, group_size: int, scales: F32 | None, zeros: F32 | None, rows: int) -> LayerSpec:
    """The options that an answer row was made with, told from its scheme, group size and number of scales."""
    if scheme not in SCHEMES:
        raise InvalidRequestError(f'unknown scheme "{scheme}"', field="scheme", got=scheme, expected=tuple(SCHEMES))
    options: dict[str, Any] = {"scheme": scheme}
    if group_size:
        options["group_size"] = group_size
    elif scales is not None:
        options["granularity"] = "tensor" if scales.size == 1 and rows != 1 else "channel"
    if zeros is not None:
        options["symmetric"] = False
    return Command.build(**options).layer_spec()
