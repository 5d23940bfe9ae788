"""Rounding to the dtypes that NumPy lacks or treats differently, bit for bit as IEEE 754 and torch do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

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
