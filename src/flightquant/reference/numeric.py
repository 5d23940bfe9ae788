"""Rounding to the dtypes that NumPy lacks or treats differently, bit for bit as IEEE 754 and torch do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

LANES = 16
"""In so many float32 lanes the errors of a search are added up."""

EPS = {"float32": np.float32(2.0**-23), "float16": np.float32(2.0**-10), "bfloat16": np.float32(2.0**-7)}
"""``torch.finfo(dtype).eps``."""
MAX: dict[str, np.float32] = {
    "float32": np.finfo(np.float32).max,
    "float16": np.float32(65504.0),
    "bfloat16": np.uint32(0x7F7F0000).view(np.float32),
}
"""``torch.finfo(dtype).max``."""


def widen(data: npt.NDArray[Any], dtype: str) -> F32:
    """Weights of any input dtype as float32: exact but for float64, which is rounded to nearest even."""
    if dtype == "bfloat16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return data.astype(np.float32)


def round_to(values: F32, dtype: str) -> F32:
    """float32 values rounded to the nearest ``dtype`` (ties to even, overflow to infinity), held in float32."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32))


def round_saturating(values: F32, dtype: str) -> F32:
    """As :func:`round_to`, but a value beyond the dtype's range becomes its largest one (compressed-tensors)."""
    if dtype == "float32":
        return values
    return round_to(np.clip(values, -MAX[dtype], MAX[dtype]), dtype)


def fused(a: F32, b: F32, c: F32) -> F32:
    """``a * b + c`` with one rounding, as the processors' fused multiply-add.

    The product is exact in float64. The sum, where it is not, becomes the neighbour whose last bit is set, which lies
    on the same side of every float32 and of every tie between two (rounding to odd: Boldo and Melquiond, 2008).
    """
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + addend
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        beyond = np.signbit(error) != np.signbit(total)
        bits = total.view(np.int64)
        odd = np.where(np.isfinite(total) & (error != 0), (bits - beyond) | 1, bits)
        return odd.view(np.float64).astype(np.float32)
