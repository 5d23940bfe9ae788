"""Small floats in small groups: ``mxfp4``, ``mxfp8`` and ``nvfp4``, the rules of compressed-tensors 0.20.

``calculate_qparams`` and ``quantize`` with float codes and, for the first two, ``scale_dtype`` uint8 (E8M0: powers of
two), for the last a scale for the whole tensor (``generate_gparam``); ``pack_fp4_to_uint8``. As with integers, the
library computes in the weights' own dtype, but for nvfp4's quotients, which are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference import float8
from flightquant.reference.numeric import F32, round_to, widen
from flightquant.schemes import LayerSpec

Bytes = npt.NDArray[np.uint8]

SCHEMES = ("mxfp4", "mxfp8", "nvfp4")
E2M1 = float8.Format(1, 0, 6.0, None, 8)
E4M3 = float8.FORMATS["fp8_e4m3"]
TOP_EXPONENT = {"mxfp4": 2, "mxfp8": 8}
"""Exponent of the largest value of the element's format."""
LEAST_NORMAL = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
NVFP4_RANGE = 448.0 * 6.0
"""The largest e4m3 times the largest e2m1."""


def mx_scales(amax: F32, top: int, dtype: str) -> F32:
    """Powers of two for largest magnitudes: that of ``amax``, the next one from 1.75 times it on, over the element's.

    2^-127 is the least. Magnitudes far below float16's normal ones have the scale 1, because the library's own, 0 in
    that dtype, becomes 1. Where its scale would be infinite, ours follows the rule.
    """
    if dtype == "float16":
        # The library rounds the bits of denormals: they have no power but the least normal one, or none.
        tiny = amax < np.float32(0.75 * 2.0**-14)
        amax = np.maximum(amax, np.float32(2.0**-14))
    rounded = (amax.view(np.int32) + np.int32(1 << 21)) >> 23
    scales: F32 = np.ldexp(np.float32(1), np.maximum(rounded - top, 0) - 127)
    if dtype == "float16":
        scales = np.where(tiny, np.float32(1), scales)
    return scales


def nvfp4_global(amax: float, dtype: str) -> np.float32:
    """The tensor's own scale: ``2688 / amax``, a reciprocal and a product in the weights' dtype; 1 if not finite."""
    least = np.float32(max(amax, LEAST_NORMAL[dtype]))
    with np.errstate(over="ignore"):
        inverse = round_to(np.array([np.float32(1) / least]), dtype)
        made = round_to(inverse * np.float32(NVFP4_RANGE), dtype)[0]
    return np.float32(made) if np.isfinite(made) else np.float32(1)


def nvfp4_scales(amax: F32, whole: np.float32, dtype: str) -> F32:
    """The groups' scales, values of e4m3, for their largest magnitudes and the tensor's own scale."""
    with np.errstate(over="ignore"):
        local = np.minimum(round_to(amax / np.float32(6), dtype) * whole, np.float32(448))
    stored = float8.decode(float8.encode(local, E4M3), E4M3)
    return np.where(stored == 0, np.float32(0.125), stored)


def e2m1(quotients: F32) -> Bytes:
    """The nearest 4-bit floats, ties to even; a zero has no sign, what is rounded to zero has."""
    codes = float8.encode(np.abs(np.clip(quotients, -6, 6)), E2M1)
    return codes | np.where(quotients < 0, np.uint8(8), np.uint8(0))


def quantize(
    weights: npt.NDArray[Any], spec: LayerSpec, dtype: str, global_amax: float | None = None
) -> tuple[Bytes, F32]:
    """Packed bytes and scales of a matrix of shape (rows, cols), nvfp4's own scale of the tensor last.

    Parameters
    ----------
    global_amax : float, optional
        For nvfp4: the magnitude to use in place of the largest one found.
    """
    name, arithmetic = spec.scheme.name, spec.arithmetic_for(dtype)
    groups = widen(weights, dtype).reshape(-1, spec.group_size)
    amax: F32 = np.abs(groups).max(axis=1)
    with np.errstate(under="ignore", over="ignore"):
        if name == "nvfp4":
            whole = nvfp4_global(float(amax.max()) if global_amax is None else global_amax, arithmetic)
            scales = nvfp4_scales(amax, whole, arithmetic)
            codes = e2m1(groups / (scales / whole)[:, None])
            return pack(codes), np.append(scales, whole)
        scales = mx_scales(amax, TOP_EXPONENT[name], arithmetic)
        quotients = round_to(groups / scales[:, None], arithmetic)
    if name == "mxfp8":
        return float8.encode(quotients, E4M3).reshape(-1), scales
    return pack(e2m1(quotients)), scales


def pack(codes: Bytes) -> Bytes:
    """Two codes a byte, the first one low."""
    pairs = codes.reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << np.uint8(4)


def dequantize(packed: Bytes, scales: F32, spec: LayerSpec, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): ``value * scale``, nvfp4's scale over the tensor's own."""
    if spec.scheme.name == "mxfp8":
        values = float8.decode(packed, E4M3)
    else:
        table = float8.decode(np.arange(8, dtype=np.uint8), E2M1)
        values = np.concatenate([table, -table])[np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)]
    with np.errstate(all="ignore"):
        each = scales[:-1] / scales[-1] if spec.scheme.name == "nvfp4" else scales
        return (values.reshape(-1, spec.group_size) * each[:, None]).reshape(rows, cols)
