"""``packing: fbgemm``: rows of codes with their own scale and bias behind them, as FBGEMM makes them in torch 2.13.

Exact with ``torch.ops.quantized.embedding_bag_byte_prepack``, ``_4bit_prepack`` and ``_2bit_prepack``, but for the sign
of a bias of 0, which depends on the library's vectors. Arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import integer
from flightquant.reference.numeric import F32, round_to, widen

Bytes = npt.NDArray[np.uint8]


def _least(matrix: F32) -> F32:
    """The least weight of each row; -0 lies below 0."""
    least: F32 = matrix.min(axis=1)
    negative = (np.signbit(matrix) & (matrix == 0)).any(axis=1)
    return np.where(least == 0, np.where(negative, np.float32(-0.0), np.float32(0)), least)


def quantize(weights: npt.NDArray[Any], bits: int, dtype: str) -> Bytes:
    """Bytes of a matrix of shape (rows, cols), flat: each row's codes, scale, bias."""
    matrix = widen(weights, dtype)
    least, most = _least(matrix), matrix.max(axis=1)
    levels = np.float32(2**bits - 1)
    kept = np.float32 if bits == 8 else np.float16
    with np.errstate(all="ignore"):
        if bits == 8:
            bias, span = least, most - least
            scales = span / levels
            inverse = levels / (span + np.float32(1e-8))
        else:
            bias = round_to(least, "float16")
            span = most - bias
            scales = round_to(np.where(span == 0, np.float32(1), span / levels), "float16")
            scales = np.where(scales == 0, np.float32(1), scales)
            inverse = np.float32(1) / scales
        steps = (matrix - bias[:, None]) * inverse[:, None]
        steps = np.where(np.isnan(steps), np.float32(0), np.clip(steps, 0, levels))
        tail = np.stack([scales, bias], axis=1).astype(kept).view(np.uint8)
    codes = np.rint(steps).astype(np.int16)
    packed = integer.pack((codes - (1 << (bits - 1))).astype(np.int8), bits)
    packed = packed ^ np.uint8(0x80) if bits == 8 else packed[:, : matrix.shape[1] * bits // 8]
    return np.concatenate([packed, tail], axis=1).reshape(-1)


def dequantize(data: Bytes, bits: int, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): ``code * scale + bias``."""
    lines = data.reshape(rows, -1)
    used = cols * bits // 8
    kept = np.float32 if bits == 8 else np.float16
    with np.errstate(invalid="ignore"):  # a float16 that is a signalling NaN, on some processors
        tail = np.ascontiguousarray(lines[:, used:]).view(kept).astype(np.float32)
    packed = lines[:, :used] ^ np.uint8(0x80) if bits == 8 else lines[:, :used]
    codes = integer.unpack(packed, cols, bits).astype(np.float32) + np.float32(1 << (bits - 1))
    with np.errstate(over="ignore", invalid="ignore"):
        return codes * tail[:, :1] + tail[:, 1:]
