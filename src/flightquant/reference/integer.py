"""``int2`` to ``int8``: the rule of compressed-tensors 0.20 (``calculate_qparams``, ``_quantize``, ``pack_to_int32``).

Every operation is rounded once, to the dtype of the arithmetic: the weights' own when the scales are of it too, else
float32. The library computes in the weights' dtype, so that bfloat16 weights get bfloat16 quotients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import quality
from flightquant.reference.numeric import EPS, F32, LANES, round_saturating, round_to, widen
from flightquant.schemes import LayerSpec

Codes = npt.NDArray[np.int8]

SHRINKS = np.float32(1) - np.arange(25, dtype=np.float32) * np.float32(0.025)
"""Factors by which ``calibration: mse`` shrinks a range, in the order in which they are tried: 1 to 0.4."""


def grouped(matrix: npt.NDArray[Any], spec: LayerSpec) -> npt.NDArray[Any]:
    """A matrix of shape (rows, cols) seen as (rows, groups, group): one scale for each of the first two axes."""
    rows, cols = matrix.shape
    if spec.granularity == "tensor":
        return matrix.reshape(1, 1, rows * cols)
    return matrix.reshape(rows, -1, spec.group_size or cols)


def parameters(
    groups: F32, spec: LayerSpec, dtype: str, global_amax: float | None = None, shrink: F32 | None = None
) -> tuple[F32, F32]:
    """Scales and zero points of shape (rows, groups), as ``calculate_qparams`` makes them.

    Parameters
    ----------
    global_amax : float, optional
        The magnitude to use in place of the largest one found, for a tensor that comes in parts.
    shrink : float32 array of shape (rows, groups), optional
        What the smallest and the largest weight are multiplied by.
    """
    arithmetic = spec.arithmetic_for(dtype)
    scale_dtype = spec.scale_dtype_for(dtype)
    levels = 2.0**spec.scheme.bits - 1
    low = np.float32(-(2.0 ** (spec.scheme.bits - 1)))
    with np.errstate(all="ignore"):
        smallest = np.minimum(groups.min(axis=-1), np.float32(0))
        largest = np.maximum(groups.max(axis=-1), np.float32(0))
        if shrink is not None:
            smallest, largest = smallest * shrink, largest * shrink
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


def best_shrinks(groups: F32, spec: LayerSpec, dtype: str, unit: int, importance: F32 | None) -> F32:
    """The factor of each group, of shape (rows, groups), whose squared error is the least, the first of several.

    The errors of a factor are those of the codes ``rint(clip(x * (1 / scale) + zero))``, in float32 whatever the
    dtype, the inverse being no more than the largest float32. Their squares, times the importance, are added up as
    those of the quality columns, but in 16 float32 lanes over a span, rounded and added one after the other, and the
    lanes in float64 in their order.

    Parameters
    ----------
    unit : int
        Weights of a unit of the tiling (``quality.bounds``).
    importance : float32 array of shape (rows, groups, group), optional
        What the square of each error is multiplied by.
    """
    low = np.float32(-(2.0 ** (spec.scheme.bits - 1)))
    best = np.zeros(groups.shape[:2], np.intp)
    least = np.zeros(groups.shape[:2])
    tiles = quality.bounds(groups.shape[-1], unit)
    with np.errstate(all="ignore"):
        for trial, factor in enumerate(SHRINKS):
            scales, zeros = (each[..., None] for each in parameters(groups, spec, dtype, shrink=factor))
            inverse = np.minimum(np.float32(1) / scales, np.finfo(np.float32).max)
            levels = np.rint(np.clip(groups * inverse + zeros, low, -low - 1))
            errors = (levels - zeros) * scales - groups
            squares = errors * errors if importance is None else importance * (errors * errors)
            total = np.zeros(groups.shape[:2])
            for _, _, spans in tiles:
                tile = np.zeros(groups.shape[:2])
                for begin, end in spans:
                    tile = tile + _in_lanes(squares[..., begin:end])
                total = total + tile
            better = total < least if trial else np.ones(best.shape, bool)
            best, least = np.where(better, trial, best), np.where(better, total, least)
    return SHRINKS[best]


def _in_lanes(terms: F32) -> npt.NDArray[np.float64]:
    """Sums over the last axis: each of 16 lanes in float32 from the first on, then the lanes in float64."""
    lanes = LANES
    padded = np.zeros((*terms.shape[:-1], -(-terms.shape[-1] // lanes) * lanes), np.float32)
    padded[..., : terms.shape[-1]] = terms
    sums = np.add.accumulate(padded.reshape(*terms.shape[:-1], -1, lanes), axis=-2)[..., -1, :]
    added: npt.NDArray[np.float64] = np.add.accumulate(sums.astype(np.float64), axis=-1)[..., -1]
    return added


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
    weights: npt.NDArray[Any],
    spec: LayerSpec,
    dtype: str,
    global_amax: float | None = None,
    importance: F32 | None = None,
) -> tuple[Codes, F32, F32]:
    """Signed codes (a matrix), scales and zero points (flat) of a matrix of shape (rows, cols)."""
    matrix = widen(weights, dtype)
    groups = grouped(matrix, spec)
    shrink = None
    if spec.calibration == "mse" and (global_amax is None or spec.granularity != "tensor" or not spec.symmetric):
        given = None if importance is None else grouped(np.broadcast_to(importance, matrix.shape), spec)
        unit = matrix.shape[1] if spec.granularity == "tensor" else groups.shape[-1]
        shrink = best_shrinks(groups, spec, dtype, unit, given)
    scales, zeros = parameters(groups, spec, dtype, global_amax, shrink)
    signed = codes(groups, scales, zeros, spec, dtype).reshape(matrix.shape)
    return signed, scales.reshape(-1), zeros.reshape(-1)


def dequantize(signed: Codes, scales: F32, zeros: F32 | None, spec: LayerSpec) -> F32:
    """float32 weights of the shape of ``signed``, (rows, cols): ``(code - zero) * scale``."""
    groups = grouped(signed.astype(np.float32), spec)
    if zeros is not None:
        groups = groups - zeros.reshape(groups.shape[:2])[..., None]
    with np.errstate(over="ignore", invalid="ignore"):
        return (groups * scales.reshape(groups.shape[:2])[..., None]).reshape(signed.shape)
