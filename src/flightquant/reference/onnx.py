"""``packing: onnx``: the weights of ONNX Runtime's MatMulNBits, by the rule of its own quantizer, version 1.31.1.

Exact with ``quantize_matmul_2bits``, ``_4bits`` and ``_8bits``, which ``MatMulNBitsQuantizer`` calls by default, on an
x86-64 CPU. A row here is a column of the node's matrix, which it holds transposed. Arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import integer
from flightquant.reference.numeric import F32, round_to, widen
from flightquant.schemes import LayerSpec

UNDER_HALF = np.float32(0.5 - 2.0**-25)
"""Added to what is not negative and cut: half goes away from zero."""


def parameters(groups: F32, spec: LayerSpec, dtype: str) -> tuple[F32, F32, F32]:
    """Scales that codes are made with, scales that are stored, zero points from 0 up, of shape (rows, groups).

    Symmetric: the end of larger magnitude, the lower one where both have the same, is the lowest code. Else both ends,
    drawn to 0, are the lowest and the highest one.
    """
    middle, levels, none = (np.float32(each) for each in (2 ** (spec.scheme.bits - 1), 2**spec.scheme.bits - 1, 0))
    least: F32 = np.minimum(groups.min(axis=-1), none) + none
    most: F32 = np.maximum(groups.max(axis=-1), none) + none
    scales: F32
    zeros: F32
    if spec.symmetric:
        extreme: F32 = np.where(most > -least, most, least)
        extreme = np.where((least == 0) & (most == 0), groups[..., 0], extreme)  # a zero keeps its sign
        scales = np.negative(extreme / middle)
        zeros = np.full_like(scales, middle)
    else:
        scales = (most - least) / levels
        zeros = np.where(scales != 0, none - least / scales, none)
        zeros = np.trunc(np.clip(zeros, none, levels) + UNDER_HALF)
    stored = round_to(scales, spec.scale_dtype_for(dtype))
    # Of float16 weights the library rounds the scale first; bfloat16 it does not know: scales are rounded afterwards.
    return stored if spec.arithmetic_for(dtype) == "float16" else scales, stored, zeros


def quantize(weights: npt.NDArray[Any], spec: LayerSpec, dtype: str) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """Packed bytes, scales, and zero points counted from the middle code, all flat, of a matrix (rows, cols)."""
    matrix = widen(weights, dtype)
    groups = integer.grouped(matrix, spec)
    bits = spec.scheme.bits
    middle, levels = 1 << (bits - 1), np.float32(2**bits - 1)
    with np.errstate(all="ignore"):
        scales, stored, zeros = parameters(groups, spec, dtype)
        inverse = np.where(scales != 0, np.float32(1) / scales, np.float32(0))
        raised = groups * inverse[..., None] + zeros[..., None]
        raised = np.where(np.isnan(raised), np.float32(0), np.clip(raised, 0, levels))
    codes = np.trunc(raised + UNDER_HALF).astype(np.int16).reshape(matrix.shape)
    packed = integer.pack((codes - middle).astype(np.int8), bits)
    data = (packed ^ np.uint8(0x80) if bits == 8 else packed).reshape(-1)
    if not spec.symmetric:
        data = np.concatenate([data, pack_points(zeros, bits).reshape(-1)])
    return data, stored.reshape(-1), (zeros - np.float32(middle)).reshape(-1)


def pack_points(zeros: F32, bits: int) -> npt.NDArray[np.uint8]:
    """Zero points of shape (rows, groups) as bytes, the lowest bits first; a row's last byte is filled with middles."""
    each = 8 // bits
    rows, groups = zeros.shape
    filled = np.full((rows, -(-groups // each) * each), 1 << (bits - 1), np.uint8)
    filled[:, :groups] = zeros.astype(np.uint8)
    shifted = filled.reshape(rows, -1, each) << (np.arange(each, dtype=np.uint8) * np.uint8(bits))
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(shifted, axis=-1)
    return packed


def unpack(data: npt.NDArray[np.uint8], spec: LayerSpec, rows: int, cols: int) -> integer.Codes:
    """Codes less the middle one, of shape (rows, cols)."""
    packed = data[: rows * cols * spec.scheme.bits // 8].reshape(rows, -1)
    return integer.unpack(packed ^ np.uint8(0x80) if spec.scheme.bits == 8 else packed, cols, spec.scheme.bits)
