"""``q8_0`` and ``q4_0``: ggml's ``quantize_row_q8_0_ref`` and ``quantize_row_q4_0_ref``, block by block.

A block is 32 weights of one row: a float16 scale, then the codes. All arithmetic is float32; the codes come from the
float32 scale, before it is rounded for storage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import F32, widen

BLOCK = 32


def _inverse(scales: F32) -> F32:
    """``1 / scale``, 0 for 0. Where it overflows, ggml casts infinities and NaN to int8, which gives code 0 on x86."""
    with np.errstate(all="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    return np.where(np.isfinite(inverse), inverse, np.float32(np.nan))


def _half_bytes(scales: F32) -> npt.NDArray[np.uint8]:
    with np.errstate(over="ignore"):
        return scales.astype("<f2").view(np.uint8)


def quantize_q8_0(blocks: F32) -> npt.NDArray[np.uint8]:
    """Blocks of shape (n, 32) as bytes of shape (n, 34): ``roundf(x / d)``, half away from zero, ``d = amax / 127``."""
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    magnitude = np.abs(scaled)
    floor = np.floor(magnitude)
    rounded = np.copysign(floor + (magnitude - floor >= np.float32(0.5)), scaled)
    codes = np.where(np.isnan(scaled), np.float32(0), rounded).astype(np.int8)
    return np.concatenate([_half_bytes(scales), codes.view(np.uint8)], axis=1)


def quantize_q4_0(blocks: F32) -> npt.NDArray[np.uint8]:
    """Blocks of shape (n, 32) as bytes of shape (n, 18): ``trunc(x / d + 8.5)``, ``d`` = the extreme value / -8."""
    first = np.abs(blocks).argmax(axis=1)[:, None]
    # The first of a block of zeros gives the scale its sign, as in gguf (ggml's C code takes any zero for +0).
    scales = np.take_along_axis(blocks, first, axis=1) / np.float32(-8)
    shifted = blocks * _inverse(scales) + np.float32(8.5)
    codes = np.minimum(np.where(np.isnan(shifted), np.float32(0), shifted).astype(np.uint8), 15)
    return np.concatenate([_half_bytes(scales), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def dequantize_q8_0(blocks: npt.NDArray[np.uint8]) -> F32:
    """The inverse: bytes of shape (n, 34) as weights of shape (n, 32)."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return scales * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def dequantize_q4_0(blocks: npt.NDArray[np.uint8]) -> F32:
    """The inverse: bytes of shape (n, 18) as weights of shape (n, 32)."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        return scales * (nibbles.astype(np.float32) - np.float32(8))


_QUANTIZE = {"q8_0": quantize_q8_0, "q4_0": quantize_q4_0}
_DEQUANTIZE = {"q8_0": dequantize_q8_0, "q4_0": dequantize_q4_0}


def quantize(weights: npt.NDArray[Any], scheme: str, dtype: str) -> npt.NDArray[np.uint8]:
    """The packed bytes, flat, of a matrix of shape (rows, cols) with cols a multiple of 32."""
    return _QUANTIZE[scheme](widen(weights, dtype).reshape(-1, BLOCK)).reshape(-1)


def dequantize(packed: npt.NDArray[np.uint8], scheme: str, block_bytes: int, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols)."""
    return _DEQUANTIZE[scheme](packed.reshape(-1, block_bytes)).reshape(rows, cols)
