"""``nf4`` and ``fp4``: bitsandbytes 0.50.2's ``quantize_4bit`` of a CPU tensor, without double quantization.

A block is so many consecutive weights of the flat tensor, whatever its rows; the last one may be short. All arithmetic
is float32. A short block is divided by its magnitude, a whole one is multiplied with the reciprocal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import F32, widen

SMALLEST = np.float32(1e-38)
"""What a block is divided by, at least."""

# The values of the 16 codes, in the order of the codes. Both zeros of fp4 are positive, as in the table that the
# library stores with its weights; what its compiled code makes of code 8 has either sign.
VALUES: dict[str, F32] = {
    "nf4": np.array(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        np.float32,
    ),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}
# Codes by their values. Both zeros of fp4 stand in the order in which torch.argsort leaves them: 0 below 8.
ORDER: dict[str, npt.NDArray[np.uint8]] = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}


def _bounds(scheme: str) -> F32:
    """The 15 midpoints between neighbouring values; a weight on a bound belongs to the value below it."""
    values = VALUES[scheme][ORDER[scheme]]
    midpoints: F32 = (values[:-1] + values[1:]) / np.float32(2)
    return midpoints


def quantize(weights: npt.NDArray[Any], scheme: str, block: int, dtype: str) -> tuple[npt.NDArray[np.uint8], F32]:
    """Packed bytes and the blocks' magnitudes, both flat, of weights of any shape, not empty."""
    flat = widen(weights, dtype).reshape(-1)
    whole = flat.size - flat.size % block
    blocks, short = flat[:whole].reshape(-1, block), flat[whole:]
    amax = np.abs(blocks).max(axis=1)
    inverse = np.float32(1) / np.maximum(amax, SMALLEST)
    scaled = (blocks * inverse[:, None]).reshape(-1)
    if short.size:
        magnitude = np.maximum(np.abs(short).max(), SMALLEST)
        amax = np.append(amax, magnitude)
        scaled = np.concatenate([scaled, short / magnitude])
    if flat.size % 2:
        scaled = np.append(scaled, np.float32(0))
    codes = ORDER[scheme][np.searchsorted(_bounds(scheme), np.clip(scaled, -1, 1), side="left")]
    return codes[::2] << 4 | codes[1::2], amax


def dequantize(packed: npt.NDArray[np.uint8], scales: F32, scheme: str, block: int, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): the code's value times its block's magnitude."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: rows * cols]
    return (VALUES[scheme][codes] * np.repeat(scales, block)[: codes.size]).reshape(rows, cols)
