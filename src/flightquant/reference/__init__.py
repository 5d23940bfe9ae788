"""Every format in NumPy: the specification that the kernels are held to, bit for bit, and the dequantizer.

Slow on purpose: each function follows its format's rule one operation at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.errors import InvalidRequestError, LayerError, clip_text
from flightquant.quantized import quantized_batches
from flightquant.reference import (
    arrowquant,
    dynamic8,
    fbgemm,
    float8,
    gguf,
    hqq,
    integer,
    kquants,
    micro,
    mlx,
    nf4,
    onnx,
    packings,
    quality,
)
from flightquant.reference.numeric import F32, widen
from flightquant.schemes import BLOCK_EDGE, SCHEMES, LayerSpec, Size
from flightquant.spec import Command

__all__ = ["QuantizedLayer", "dequantize", "dequantize_matrix", "matrix_shape", "packed_bytes", "quantize"]


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
    """Weights in one unit of the kernels' tiling: a group, two of the smallest, else a row."""
    return max(spec.group_size, 32) if spec.granularity == "group" else cols


def packed_bytes(spec: LayerSpec, rows: Size, cols: Size) -> Size:
    """Bytes of ``quantized_data`` for a matrix, or for each of many."""
    packed: Size
    if spec.scheme.flat:
        packed = -(-rows * cols * spec.scheme.bits // 8)
        return packed - (-rows * cols // spec.group_size) if spec.scheme.nested else packed
    if spec.scheme.block_bytes:
        return rows * (cols // spec.group_size) * spec.scheme.block_bytes
    if spec.scheme.fold > 1:
        lines = -(-(rows * cols // spec.group_size) // spec.scheme.fold)
        return lines * spec.group_size * (4 if spec.scheme.bits == 3 else 1)
    packed = rows * spec.scheme.row_bytes(cols)
    if spec.scheme.transposed:
        packed = packed + rows * (cols // (spec.group_size or cols)) * spec.scheme.bits // 8
    if spec.scheme.rule == "onnx" and not spec.symmetric:
        packed = packed - rows * (-(cols // spec.group_size) * spec.scheme.bits // 8)
    return packed


def fits_groups(spec: LayerSpec, cols: int) -> bool:
    """Whether rows of so many weights can be cut into the groups that the options ask for."""
    if spec.scheme.row_tail:
        return cols * spec.scheme.bits % 8 == 0
    return spec.scheme.flat or spec.granularity != "group" or cols % spec.group_size == 0


def fits_transpose(spec: LayerSpec, rows: int, cols: int) -> bool:
    """Whether both axes fill whole words, where the packing is one of the transpose, or groups fold evenly."""
    if spec.scheme.fold > 1 and spec.scheme.bits != 3:
        return rows * cols // spec.group_size % spec.scheme.fold == 0
    return not spec.scheme.transposed or (rows % 32 == 0 and cols % 32 == 0)


def whole_words(spec: LayerSpec) -> str:
    """What ``fits_transpose`` asks for, in words."""
    if spec.scheme.fold > 1:
        return f"a multiple of {spec.scheme.fold} groups of {spec.group_size} weights"
    return "multiples of 32"


def scale_count(spec: LayerSpec, rows: int, cols: int) -> int:
    """Scales of a matrix that is not empty."""
    if spec.granularity == "block":
        return -(-rows // BLOCK_EDGE) * -(-cols // BLOCK_EDGE)
    if spec.granularity == "tensor":
        return 1
    if spec.granularity == "channel":
        return rows
    count = -(-rows * cols // spec.group_size) + spec.scheme.whole_scale
    return -(-count // dynamic8.NESTED_BLOCK) + 1 if spec.scheme.nested else count


def quantize(
    weights: npt.NDArray[Any],
    spec: LayerSpec,
    dtype: str,
    global_amax: float | None = None,
    importance: F32 | None = None,
    *,
    measure: bool = True,
) -> QuantizedLayer:
    """Quantize a matrix of shape (rows, cols), not empty; bfloat16 comes as uint16.

    Parameters
    ----------
    global_amax : float, optional
        The magnitude of a tensor that this is a part of.
    importance : float32 array of shape (cols,), optional
        What an error in each column counts, in schemes that search.

    Raises
    ------
    LayerError
        NaN or infinity among the weights (as float32), or a group that does not divide the row.
    """
    rows, cols = weights.shape
    spec = spec.fitting(cols)
    wide = widen(weights, dtype)
    bad = np.flatnonzero(~np.isfinite(wide))
    if bad.size:
        raise LayerError("non_finite", f"weight {bad[0]} is not finite")
    if not fits_groups(spec, cols):
        raise LayerError("unsupported", f"group size {spec.group_size} does not divide the row of {cols}")
    if not fits_transpose(spec, rows, cols):
        raise LayerError(
            "unsupported", f"a matrix of {rows} x {cols} does not fill whole words; expected {whole_words(spec)}"
        )
    scales: F32 | None = None
    zeros: F32 | None = None
    if spec.scheme.name in kquants.SCHEMES:
        data = kquants.quantize(weights, spec.scheme.name, dtype, importance)
    elif spec.scheme.rule == "fbgemm":
        data = fbgemm.quantize(weights, spec.scheme.bits, dtype)
    elif spec.scheme.rule == "mxfp4-ggml":
        data = gguf.quantize_mxfp4(weights, dtype)
    elif spec.scheme.block_bytes:
        data = gguf.quantize(weights, spec.scheme.name, dtype)
    elif spec.scheme.name == "bnb8":
        data, scales = dynamic8.quantize(weights, spec.group_size, dtype)
    elif spec.scheme.flat:
        data, scales = nf4.quantize(weights, spec.scheme.name, spec.group_size, dtype)
        if spec.scheme.nested:
            codes, scales = dynamic8.nest(scales)
            data = np.concatenate([data, codes])
    elif spec.scheme.name in micro.SCHEMES:
        data, scales = micro.quantize(weights, spec, dtype, global_amax)
    elif spec.scheme.name in float8.FORMATS:
        data, scales = float8.quantize(weights, spec, dtype, global_amax)
    elif spec.scheme.name == "mlx":
        data, scales, zeros = mlx.quantize(weights, spec, dtype)
    elif spec.scheme.packing == "hqq":
        data, scales, zeros = hqq.quantize(weights, spec, dtype)
    elif spec.scheme.name == "arrowquant":
        data, scales, zeros = arrowquant.quantize(weights, spec, dtype)
    elif spec.scheme.rule == "onnx":
        data, scales, zeros = onnx.quantize(weights, spec, dtype)
        zeros = None if spec.symmetric else zeros
    else:
        signed, scales, zeros = integer.quantize(weights, spec, dtype, global_amax, importance)
        if spec.scheme.transposed:
            data = packings.pack(signed, zeros.reshape(rows, -1), spec)
        else:
            data = integer.pack(signed, spec.scheme.bits).reshape(-1)
        zeros = None if spec.symmetric else zeros
    sums = compare(wide, dequantize_matrix(data, scales, zeros, spec, rows, cols), spec) if measure else np.zeros(4)
    return QuantizedLayer(data, scales, zeros, sums)


def compare(wide: F32, again: F32, spec: LayerSpec) -> npt.NDArray[np.float64]:
    """The four quality sums of float32 weights against dequantized ones, both of shape (rows, cols)."""
    strips = quality.strips(*wide.shape) if spec.granularity == "block" else None
    return quality.sums(wide.reshape(-1), again.reshape(-1), unit_length(spec, wide.shape[1]), strips)


def dequantize_matrix(
    data: npt.NDArray[np.uint8], scales: F32 | None, zeros: F32 | None, spec: LayerSpec, rows: int, cols: int
) -> F32:
    """float32 weights of shape (rows, cols) from one layer's packed bytes."""
    if spec.scheme.name in kquants.SCHEMES:
        return kquants.dequantize(data, spec.scheme.name, spec.scheme.block_bytes, rows, cols)
    if spec.scheme.rule == "fbgemm":
        return fbgemm.dequantize(data, spec.scheme.bits, rows, cols)
    if spec.scheme.rule == "mxfp4-ggml":
        return gguf.dequantize_mxfp4(data, rows, cols)
    if spec.scheme.block_bytes:
        return gguf.dequantize(data, spec.scheme.name, spec.scheme.block_bytes, rows, cols)
    if scales is None:
        raise InvalidRequestError(f"{spec.scheme.name} needs scales", field="scales", expected="list<float32>")
    if spec.scheme.name == "bnb8":
        return dynamic8.dequantize(data, scales, spec.group_size).reshape(rows, cols)
    if spec.scheme.nested:
        packed = -(-rows * cols // 2)
        data, scales = data[:packed], dynamic8.unnest(data[packed:], scales)
    if spec.scheme.flat:
        return nf4.dequantize(data, scales, spec.scheme.name, spec.group_size, rows, cols)
    if spec.scheme.name in micro.SCHEMES:
        return micro.dequantize(data, scales, spec, rows, cols)
    if spec.scheme.name in float8.FORMATS:
        return float8.dequantize(data, scales, spec, rows, cols)
    if spec.scheme.always_zero_points and zeros is None:
        raise InvalidRequestError(
            f"{spec.scheme.name} needs zero points", field="zero_points", expected="list<float32>"
        )
    if spec.scheme.always_zero_points:
        assert zeros is not None  # noqa: S101 - it always has them
        if spec.scheme.name == "mlx":
            return mlx.dequantize(data, scales, zeros, spec, rows, cols)
        if spec.scheme.packing == "hqq":
            return hqq.dequantize(data, scales, zeros, spec, rows, cols)
        return arrowquant.dequantize(data, scales, zeros, spec, rows, cols)
    if spec.scheme.transposed:
        signed = packings.unpack(data, spec, rows, cols)
    elif spec.scheme.rule == "onnx":
        signed = onnx.unpack(data, spec, rows, cols)
    else:
        signed = integer.unpack(data.reshape(rows, -1), cols, spec.scheme.bits)
    return integer.dequantize(signed, scales, zeros, spec)


Parts = dict[str, list[tuple[int | None, npt.NDArray[Any]]]]
"""Arrays by layer name: each with the index of the layer's first axis at which it begins, None for a whole layer."""


def dequantize(answers: pa.Table | pa.RecordBatch, *, dtype: str = "float32") -> dict[str, npt.NDArray[Any]]:
    """The layers of a table of answer rows, as arrays of their own shapes, by name and in order.

    A layer that came in parts (rows of one name with ``row_offset``) is joined again.

    Parameters
    ----------
    dtype : {"float32", "float16"}, optional
        Of the arrays; float16 is rounded from float32, ties to even, overflow to infinity.

    Raises
    ------
    LayerError
        A row whose status is not ``ok``: it has nothing to give back; or NaN among its scales.
    InvalidRequestError
        A column is missing, or the bytes do not fit the shape.
    """
    command = Command.build(op="dequantize", dtype=dtype)
    parts: Parts = {}
    for batch in quantized_batches(answers):
        for i in range(batch.num_rows):
            row = {name: batch.column(name)[i] for name in batch.schema.names}
            name, matrix = _dequantize_row(row)
            offset = row["row_offset"].as_py() if "row_offset" in row else None
            with np.errstate(over="ignore", invalid="ignore"):
                parts.setdefault(name, []).append((offset, matrix.astype(command.dtype, copy=False)))
    return join_parts(parts)


def join_parts(parts: Parts) -> dict[str, npt.NDArray[Any]]:
    """Whole layers from their parts, each of which must begin where the one before it ends.

    Raises
    ------
    InvalidRequestError
        Parts are missing, overlap, or have other shapes.
    """
    return {name: _join(name, pieces) for name, pieces in parts.items()}


def _join(name: str, pieces: list[tuple[int | None, npt.NDArray[Any]]]) -> npt.NDArray[Any]:
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
    name = row["layer_name"].as_py()
    status = row["status"].as_py() if "status" in row else "ok"
    if status not in ("ok", None):
        reason = row["error"].as_py() if "error" in row else None
        raise LayerError(status, f'layer "{name}" was not quantized: {reason}')
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
    one_scale = None if scales is None else scales.size == 1 and rows != 1
    told = {field: row[field].as_py() for field in ("packing", "bit_width", "group_size") if field in row}
    spec = stored_spec(row["scheme"].as_py(), **told, one_scale=one_scale, asymmetric=zeros is not None)
    if not (fits_groups(spec, cols) and fits_transpose(spec, rows, cols)) or data.size != packed_bytes(
        spec, rows, cols
    ):
        expected = f"{packed_bytes(spec, rows, cols)} for {spec.scheme.name} of shape {shape} in whole groups"
        raise _misfit(name, "quantized_data", f"{data.size} bytes", expected)
    count = scale_count(spec, rows, cols)
    for field, values in (("scales", scales), ("zero_points", zeros)):
        if values is not None and values.size != count:
            raise _misfit(name, field, f"{values.size} values", f"{count} for shape {shape}")
    for field, values in (("scales", scales), ("zero_points", zeros)):
        if values is not None and np.isnan(values).any():
            raise LayerError("non_finite", f'layer "{name}" has NaN in "{field}"; expected numbers', field=field)
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


@lru_cache(maxsize=256)
def stored_spec(
    scheme: str,
    packing: str | None = None,
    bit_width: int | None = None,
    group_size: int | None = None,
    *,
    one_scale: bool | None,
    asymmetric: bool,
) -> LayerSpec:
    """The options that an answer row was made with.

    Parameters
    ----------
    packing, bit_width : str, int
        As the row says; None where it does not.
    group_size : int
        0 or None for none.
    one_scale : bool or None
        Whether there is one scale for several rows; None where there is no list of scales.
    asymmetric : bool
        Whether there are zero points.

    Raises
    ------
    InvalidRequestError
        There is no such scheme, packing or combination.
    """
    if scheme not in SCHEMES:
        raise InvalidRequestError(
            f'unknown scheme "{clip_text(str(scheme), 80)}"; expected one of {", ".join(SCHEMES)}',
            field="scheme",
            got=scheme,
            expected=tuple(SCHEMES),
        )
    options: dict[str, Any] = {"scheme": scheme}
    if packing is not None:
        options["packing"] = packing
    if SCHEMES[scheme].bit_widths:
        options["bit_width"] = bit_width
    elif bit_width not in (None, SCHEMES[scheme].bits):
        raise InvalidRequestError(
            f"bit_width is {bit_width}; expected {SCHEMES[scheme].bits}, that of {scheme}",
            field="bit_width",
            got=bit_width,
            expected=SCHEMES[scheme].bits,
        )
    if group_size and SCHEMES[scheme].group_sizes:
        options["group_size"] = group_size
    elif group_size:
        options["granularity"] = "block"
    elif one_scale is not None:
        options["granularity"] = "tensor" if one_scale else "channel"
    if asymmetric:
        options["symmetric"] = False
    return Command.build(**options).layer_spec()
