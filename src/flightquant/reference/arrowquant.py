"""``arrowquant``: arrow_quant_v2's output layout and rule, codes of 2, 4 or 8 bits in one byte each.

The rule is that of its public source (``compute_quantization_params`` and ``quantize_scalar``): divide, add the zero
point, round half away from zero. What it leaves undefined is defined here: a unit of one value, whose scale would be
0, is exact, and a range beyond float32 is cut. Arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.integer import grouped
from flightquant.reference.numeric import F32, widen
from flightquant.schemes import LayerSpec


def quantize(weights: npt.NDArray[Any], spec: LayerSpec, dtype: str) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """Codes, scales and zero points (flat) of a matrix of shape (rows, cols).

    ``scale = (max - min) / (2^bits - 1)``, ``zero = 0 - min / scale``, ``code = round(x / scale + zero)`` from 0 to
    ``2^bits - 1``. A scale of 0 becomes 1.
    """
    groups = grouped(widen(weights, dtype), spec)
    levels = np.float32(2**spec.scheme.bits - 1)
    with np.errstate(over="ignore"):
        smallest, largest = groups.min(axis=-1), groups.max(axis=-1)
        scales = np.minimum(largest - smallest, np.finfo(np.float32).max) / levels
        scales = np.where(scales == 0, np.float32(1), scales)
        zeros = np.float32(0) - smallest / scales
        shifted = np.clip(groups / scales[..., None] + zeros[..., None], 0, levels)
    # Half away from zero: what lies under the largest float32 below a half goes down.
    codes = np.trunc(shifted + np.float32(0.5 - 2.0**-25)).astype(np.uint8)
    return codes.reshape(-1), scales.reshape(-1), zeros.reshape(-1)


def dequantize(codes: npt.NDArray[np.uint8], scales: F32, zeros: F32, spec: LayerSpec, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): ``(code - zero) * scale``."""
    groups = grouped(codes.reshape(rows, cols).astype(np.float32), spec)
    shape = (*groups.shape[:2], 1)
    with np.errstate(over="ignore"):
        return ((groups - zeros.reshape(shape)) * scales.reshape(shape)).reshape(rows, cols)
