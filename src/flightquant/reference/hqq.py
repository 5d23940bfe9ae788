"""``hqq8`` to ``hqq2``: HQQ's codes, scales and zero points, as ``Quantizer.quantize`` of hqq 0.2.8 makes them.

With ``axis=1``; all arithmetic is float32, whatever the weights' dtype. ``calibration: proximal`` moves the zero points
as ``optimize=True`` does, in steps of half-quadratic splitting (Badri and Shaji, 2023). Codes of fewer than 8 bits are
folded: of the groups, one below the other, those of the first half, quarter or tenth stand in the high bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import integer, quality
from flightquant.reference.numeric import F32, LANES, widen
from flightquant.schemes import LayerSpec

NARROW = np.float32(1e-4)
"""The widest range of a group that is not scaled."""
STEEPEST = np.float32(2e4)
"""The most codes for a weight of 1."""
STEPS = 20
"""The most proximal steps."""
SMALL = np.float32(0.17)
"""An error that shrinks to 0, as all do up to 10^(-1/1.3)."""
EXPONENT = float(np.float32(-0.3))
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


def quantize(weights: npt.NDArray[Any], spec: LayerSpec, dtype: str) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """Packed bytes, scales and zero points (flat) of a matrix of shape (rows, cols).

    A zero point of 0 has the opposite sign of the first of the least weights. A range beyond the largest float32 is
    that: hqq's scale is then infinite.
    """
    groups = integer.grouped(widen(weights, dtype), spec)
    levels = np.float32(2**spec.scheme.bits - 1)
    with np.errstate(all="ignore"):
        least = np.take_along_axis(groups, groups.argmin(axis=-1)[..., None], axis=-1)
        span = np.minimum(groups.max(axis=-1, keepdims=True) - least, np.finfo(np.float32).max)
        factor: F32 = np.minimum(np.float32(1) / span * levels, STEEPEST)
        factor = np.where(span <= NARROW, np.float32(1), factor).astype(np.float32, copy=False)
        zeros: F32 = -least * factor
        if spec.calibration == "proximal":
            zeros = proximal(groups.reshape(-1, spec.group_size), factor.reshape(-1, 1), zeros.reshape(-1, 1), levels)
            zeros = zeros.reshape(factor.shape)
        codes = np.clip(np.rint(groups * factor + zeros), 0, levels).astype(np.uint8)
    packed = pack(codes.reshape(-1, spec.group_size), spec)
    scales: F32 = np.float32(1) / factor
    return packed, scales.reshape(-1), zeros.reshape(-1)


def proximal(groups: F32, factor: F32, zeros: F32, levels: np.float32) -> F32:
    """Zero points of shape (groups, 1), moved until the mean error of all weights no longer falls.

    Each step takes as errors what remains of ``weight - restored`` when it is shrunk towards 0 as the norm of p = 0.7
    has it, and moves each zero point to the mean of ``code - (weight - error) * factor``; one that would leave float32
    stays. The step whose mean error is not below all before it is the last one, and its zero points are the result.
    """
    best = np.float32(np.inf)
    for _ in range(STEPS):
        codes = np.clip(np.rint(groups * factor + zeros), 0, levels)
        errors = groups - (codes - zeros) / factor
        moved = row_means(codes - (groups - shrink(errors)) * factor)
        zeros = np.where(np.isfinite(moved), moved, zeros)
        mean = mean_magnitude(errors)
        if not mean < best:
            break
        best = mean
    return zeros


def shrink(errors: F32) -> F32:
    """``sign(x) * max(|x| - 0.1 * |x|^-0.3, 0)``."""
    size = np.abs(errors)
    left = np.where(size > SMALL, np.maximum(size - np.float32(0.1) * power(size), 0), np.float32(0))
    shrunk: F32 = left * np.sign(errors)
    return shrunk


def power(size: F32) -> F32:
    """``size ** -0.3`` of numbers above ``SMALL``: float64 rounded once, from sums that any machine adds alike.

    With ``size = m * 2^e``, ``m`` next to 1 and ``s = (m - 1) / (m + 1)``, the logarithm of ``m`` is
    ``2 * (s + s^3/3 + ... + s^15/15)``. The power of 2 then is that of the nearest integer times ``exp`` of the rest,
    eleven terms of its series.
    """
    bits = size.view(np.int32)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(np.float32).astype(np.float64)
    upper = mantissa > 1.4142135
    mantissa = np.where(upper, mantissa * 0.5, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = np.full_like(square, 1 / 15)
    for odd in (13, 11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    wanted = ((exponent + upper) + 2 * s * series * LOG2_E) * EXPONENT
    whole = np.rint(wanted)
    rest = (wanted - whole) * LN_2
    series = np.ones_like(rest)
    for term in range(11, 0, -1):
        series = 1 + rest * (1 / term) * series
    return (series * np.ldexp(1.0, whole.astype(np.int32))).astype(np.float32)


def row_means(values: F32) -> F32:
    """Means of rows of 32, 64 or 128 values as torch 2.13 computes them on x86-64 (``dynamic8.torch_mean``)."""
    sides = np.zeros((len(values), 4, 8), np.float32)
    for line in np.moveaxis(values.reshape(len(values), -1, 4, 8), 1, 0):
        sides += line
    total = np.zeros(len(values), np.float32)
    for lane in (((sides[:, 0] + sides[:, 1]) + sides[:, 2]) + sides[:, 3]).T:
        total += lane
    means: F32 = (total / np.float32(values.shape[1]))[:, None]
    return means


def mean_magnitude(errors: F32) -> np.float32:
    """The mean of all magnitudes, added up in the quality columns' spans and tiles, rounded to float32."""
    flat = np.abs(errors).reshape(-1)
    total = np.float64(0)
    for _, _, spans in quality.bounds(flat.size, errors.shape[1]):
        tile = np.float64(0)
        for begin, end in spans:
            lanes = np.add.accumulate(flat[begin:end].reshape(-1, LANES), axis=0)[-1]
            tile += np.add.accumulate(lanes.astype(np.float64))[-1]
        total += tile
    return np.float32(total / flat.size)


def pack(codes: npt.NDArray[np.uint8], spec: LayerSpec) -> npt.NDArray[np.uint8]:
    """Codes of shape (groups, group size) folded into bytes, or into int32 words of ten 3-bit codes."""
    fold, bits = spec.scheme.fold, spec.scheme.bits
    if fold == 1:
        return codes.reshape(-1)
    lines = -(-codes.shape[0] // fold)
    wide = np.zeros((fold, lines * codes.shape[1]), np.uint32 if bits == 3 else np.uint8)
    wide.reshape(-1)[: codes.size] = codes.reshape(-1)
    folded = wide[0]
    for part in wide[1:]:
        folded = (folded << bits) | part
    flat: npt.NDArray[np.uint8] = folded.view(np.uint8)
    return flat


def unpack(packed: npt.NDArray[np.uint8], spec: LayerSpec, count: int) -> npt.NDArray[np.uint8]:
    """The first ``count`` codes, flat."""
    fold, bits = spec.scheme.fold, spec.scheme.bits
    if fold == 1:
        return packed
    words = packed.view(np.uint32) if bits == 3 else packed
    parts = [words >> (bits * (fold - 1 - k)) & ((1 << bits) - 1) for k in range(fold)]
    codes: npt.NDArray[np.uint8] = np.concatenate(parts)[:count].astype(np.uint8)
    return codes


def dequantize(packed: npt.NDArray[np.uint8], scales: F32, zeros: F32, spec: LayerSpec, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): ``(code - zero) * scale``."""
    codes = unpack(packed, spec, rows * cols).reshape(-1, spec.group_size).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return ((codes - zeros[:, None]) * scales[:, None]).reshape(rows, cols)
