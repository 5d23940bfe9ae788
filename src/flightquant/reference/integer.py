"""``int2`` to ``int8``: the rule of compressed-tensors 0.20 (``calculate_qparams``, ``_quantize``, ``pack_to_int32``).

Every operation is rounded once, to the dtype of the arithmetic: the weights' own when the scales are of it too, else
float32. The library computes in the weights' dtype, so that bfloat16 weights get bfloat16 quotients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import EPS, F32, round_saturating, round_to, widen
from flightquant.spec import LayerSpec

Codes = npt.NDArray[np.int8]


def grouped(matrix: npt.NDArray[Any], spec: LayerSpec) -> npt.NDArray[Any]:
    """A matrix of shape (rows, cols) seen as (rows, groups, group): one scale for each of the first two axes."""
    rows, cols = matrix.shape
    if spec.granularity == "tensor":
        return matrix.reshape(1, 1, rows * cols)
    return matrix.reshape(rows, -1, spec.group_size or cols)


def parameters(groups: F32, spec: LayerSpec, dtype: str, global_amax: float | None = None) -> tuple[F32, F32]:
    """Scales and zero points of shape (rows, groups), as ``calculate_qparams`` makes them.

    Parameters
    ----------
    global_amax : float, optional
        The magnitude to use in place of the largest one found, for a tensor that comes in parts.
    """
    arithmetic = spec.arithmetic_for(dtype)
    scale_dtype = spec.scale_dtype_for(dtype)
    levels = 2.0**spec.scheme.bits - 1
    low = np.float32(-(2.0 ** (spec.scheme.bits - 1)))
    with np.errstate(all="ignore"):
        smallest = np.minimum(groups.min(axis=-1), np.float32(0))
        largest = np.maximum(groups.max(axis=-1), np.float32(0))
        if spec.symmetric:
            amax = np.maximum(np.abs(smallest), np.abs(largest))
            if global_amax is not None:
                amax = np.full_like(amax, global_amax)
            scales = round_to(amax / np.float32(levels / 2), arithmetic)
            zeros = np.zeros_like(scales)
        else:
            span = round_to(largest - smallest, arithmetic)
            scales = round_to(span / np.float32(levels), arithmetic)
            zeros = round_to(low - round_to(smallest / scales, arithmetic), arithmetic)
            # An all-zero group gives 0 / 0: the library's NaN becomes 0 when it is cast to int8.
            zeros = np.rint(np.clip(np.where(np.isnan(zeros), np.float32(0), zeros), low, -low - 1))
            zeros += np.float32(0)  # an int8 has no negative zero
        if scale_dtype != arithmetic:
            # Only this conversion saturates: a span that overflows the weights' own dtype has an infinite scale.
            scales = round_saturating(scales, scale_dtype)
    return np.where(scales == 0, EPS[scale_dtype], scales), zeros


def codes(groups: F32, scales: F32, zeros: F32, spec: LayerSpec, dtype: str) -> Codes:
    """Signed codes, of the shape of ``groups``: ``rint(clip(x / scale + zero))``."""
    arithmetic = spec.arithmetic_for(dtype)
    low = np.float32(-(2.0 ** (spec.scheme.bits - 1)))
    with np.errstate(all="ignore"):
        scaled = round_to(groups / scales[..., None], arithmetic)
        if not spec.symmetric:
            scaled = round_to(scaled + zeros[..., None], arithmetic)
        return np.rint(np.clip(scaled, low, -low - 1)).astype(np.int8)


def pack(signed: Codes, bits: int) -> npt.NDArray[np.uint8]:
    """Codes of shape (rows, cols) as bytes of shape (rows, row_bytes).

    8 bits: the signed codes. Fewer: ``code + 2^(bits-1)`` in a dense stream, least significant bit first, each row
    filled up with zero bits to whole 32-bit words.
    """
    if bits == 8:
        return signed.view(np.uint8)
    rows, cols = signed.shape
    unsigned = (signed.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    row_bytes = -(-cols * bits // 32) * 4
    stream = np.zeros((rows, row_bytes * 8), np.uint8)
    planes = (unsigned[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream[:, : cols * bits] = planes.reshape(rows, cols * bits)
    return np.packbits(stream, axis=1, bitorder="little")


def unpack(packed: npt.NDArray[np.uint8], cols: int, bits: int) -> Codes:
    """The inverse of :func:`pack`: bytes of shape (rows, row_bytes) as codes of shape (rows, cols)."""
    if bits == 8:
        return packed.view(np.int8)
    stream = np.unpackbits(packed, axis=1, count=cols * bits, bitorder="little")
    planes = stream.reshape(packed.shape[0], cols, bits)
    unsigned: npt.NDArray[np.uint8] = (planes << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def quantize(
    weights: npt.NDArray[Any], spec: LayerSpec, dtype: str, global_amax: float | None = None
) -> tuple[Codes, F32, F32]:
    """Signed codes (a matrix), scales and zero points (flat) of a matrix of shape (rows, cols)."""
    matrix = widen(weights, dtype)
    groups = grouped(matrix, spec)
    scales, zeros = parameters(groups, spec, dtype, global_amax)
    signed = codes(groups, scales, zeros, spec, dtype).reshape(matrix.shape)
    return signed, scales.reshape(-1), zeros.reshape(-1)


def dequantize(signed: Codes, scales: F32, zeros: F32 | None, spec: LayerSpec) -> F32:
    """float32 weights of the shape of ``signed``, (rows, cols): ``(code - zero) * scale``."""
    groups = grouped(signed.astype(np.float32), spec)
    if zeros is not None:
        groups = groups - zeros.reshape(groups.shape[:2])[..., None]
    with np.errstate(over="ignore", invalid="ignore"):
        return (groups * scales.reshape(groups.shape[:2])[..., None]).reshape(signed.shape)
