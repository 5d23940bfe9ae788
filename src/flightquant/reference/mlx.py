"""``mlx``: MLX's affine quantization, the rule and the words of ``mlx.core.quantize`` of mlx 0.32.4 on a CPU.

All arithmetic is float32, whatever the weights' dtype; scales and biases are rounded to theirs after the codes are
made of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import integer
from flightquant.reference.numeric import F32, round_to, widen
from flightquant.schemes import LayerSpec

SMALLEST = np.float32(1e-7)
"""The least magnitude of a step between codes, before it is fitted to the edge."""


def quantize(weights: npt.NDArray[Any], spec: LayerSpec, dtype: str) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """Packed bytes, scales and biases (flat) of a matrix of shape (rows, cols).

    The end of larger magnitude, the *edge*, is a whole number of steps and becomes the bias, from which codes count
    towards the other end: the scale is negative where that is the largest weight.
    """
    matrix = widen(weights, dtype)
    groups = integer.grouped(matrix, spec)
    levels = np.float32(2**spec.scheme.bits - 1)
    with np.errstate(all="ignore"):
        least, most = groups.min(axis=-1), groups.max(axis=-1)
        below = np.abs(least) > np.abs(most)
        step = np.maximum((most - least) / levels, SMALLEST)
        scales = np.where(below, step, -step)
        edge = np.where(below, least, most)
        count = np.rint(edge / scales)
        scales = np.where(count != 0, edge / count, scales)
        biases = np.where(count != 0, edge, np.float32(0))
        codes = np.rint(np.clip((groups - biases[..., None]) / scales[..., None], 0, levels)).astype(np.int16)
    signed = (codes - (1 << (spec.scheme.bits - 1))).astype(np.int8).reshape(matrix.shape)
    packed = integer.pack(signed, spec.scheme.bits)
    if spec.scheme.bits == 8:
        packed = packed ^ np.uint8(0x80)
    kept = spec.scale_dtype_for(dtype)
    return packed.reshape(-1), round_to(scales, kept).reshape(-1), round_to(biases, kept).reshape(-1)


def dequantize(packed: npt.NDArray[np.uint8], scales: F32, biases: F32, spec: LayerSpec, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): ``code * scale + bias``."""
    bits = spec.scheme.bits
    stored = packed ^ np.uint8(0x80) if bits == 8 else packed
    codes = integer.unpack(stored.reshape(rows, -1), cols, bits).astype(np.float32) + np.float32(1 << (bits - 1))
    groups = integer.grouped(codes, spec)
    shape = (*groups.shape[:2], 1)
    with np.errstate(over="ignore", invalid="ignore"):
        return (groups * scales.reshape(shape) + biases.reshape(shape)).reshape(rows, cols)
