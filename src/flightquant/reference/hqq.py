"""``hqq8`` to ``hqq2``: HQQ's codes, scales and zero points, as ``Quantizer.quantize`` of hqq 0.2.8 makes them.

With ``axis=1`` and ``optimize=False``; all arithmetic is float32, whatever the weights' dtype. Codes of fewer than 8
bits are folded: of the groups, one below the other, those of the first half, quarter or tenth stand in the high bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import integer
from flightquant.reference.numeric import F32, widen
from flightquant.schemes import LayerSpec

NARROW = np.float32(1e-4)
"""The widest range of a group that is not scaled."""
STEEPEST = np.float32(2e4)
"""The most codes for a weight of 1."""


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
        codes = np.clip(np.rint(groups * factor + zeros), 0, levels).astype(np.uint8)
    packed = pack(codes.reshape(-1, spec.group_size), spec)
    scales: F32 = np.float32(1) / factor
    return packed, scales.reshape(-1), zeros.reshape(-1)


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
