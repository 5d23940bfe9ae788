"""``fp8_e4m3`` and ``fp8_e5m2``: 8-bit floats, scaled so that the largest weight becomes the format's largest value.

The rule of compressed-tensors 0.20 (``calculate_qparams`` and ``_quantize`` with 8-bit floats), which has e4m3 alone;
e5m2 is the same with its own largest value and torch's conversion. As with integers, quotients are rounded to the dtype
of the arithmetic before they become 8-bit floats. A block of 128x128 weights may be cut short by the matrix's edges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flightquant.reference.integer import grouped
from flightquant.reference.numeric import EPS, F32, round_saturating, round_to, widen
from flightquant.schemes import BLOCK_EDGE, LayerSpec


class Format(NamedTuple):
    """Mantissa bits, exponent of the least normal value, largest value, codes (without sign) that are no number."""

    mantissa: int
    least: int
    largest: float
    infinity: int | None
    first_nan: int


FORMATS = {
    "fp8_e4m3": Format(3, -6, 448.0, None, 0x7F),
    "fp8_e5m2": Format(2, -14, 57344.0, 0x7C, 0x7D),
}


def encode(values: F32, form: Format) -> npt.NDArray[np.uint8]:
    """The nearest 8-bit floats, ties to even, of values within the format's range."""
    magnitude = np.abs(values)
    exponent = np.where(magnitude == 0, form.least, np.maximum(np.frexp(magnitude)[1] - 1, form.least))
    # Steps are exact powers of two, so that only rint rounds; a carry into the next exponent is the next code.
    steps = np.rint(np.ldexp(magnitude, form.mantissa - exponent)).astype(np.int32)
    codes = steps + ((exponent - form.least) << form.mantissa)
    signed: npt.NDArray[np.uint8] = (codes | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
    return signed


def decode(codes: npt.NDArray[np.uint8], form: Format) -> F32:
    """The values of 8-bit floats, infinities and NaN included."""
    every = np.arange(128, dtype=np.int32)
    exponent = np.maximum(every >> form.mantissa, 1)
    steps = every - ((exponent - 1) << form.mantissa)
    table = np.ldexp(steps.astype(np.float32), exponent - 1 + form.least - form.mantissa)
    table[form.first_nan :] = np.nan
    if form.infinity is not None:
        table[form.infinity] = np.inf
    return np.concatenate([table, -table])[codes]


def _blocks(matrix: F32) -> F32:
    """A matrix cut into its blocks, the last ones filled up with zeros, in shape (down, across, 128 * 128)."""
    rows, cols = matrix.shape
    filled = np.pad(matrix, ((0, -rows % BLOCK_EDGE), (0, -cols % BLOCK_EDGE)))
    cut = filled.reshape(-1, BLOCK_EDGE, filled.shape[1] // BLOCK_EDGE, BLOCK_EDGE).swapaxes(1, 2)
    return cut.reshape(*cut.shape[:2], BLOCK_EDGE**2)


def _unblocked(blocks: npt.NDArray[Any], rows: int, cols: int) -> npt.NDArray[Any]:
    """The inverse of :func:`_blocks`."""
    down, across, _ = blocks.shape
    cut = blocks.reshape(down, across, BLOCK_EDGE, BLOCK_EDGE).swapaxes(1, 2)
    return cut.reshape(down * BLOCK_EDGE, across * BLOCK_EDGE)[:rows, :cols]


def quantize(
    weights: npt.NDArray[Any], spec: LayerSpec, dtype: str, global_amax: float | None = None
) -> tuple[npt.NDArray[np.uint8], F32]:
    """Codes and scales (flat) of a matrix of shape (rows, cols); ``global_amax`` as in ``integer.parameters``."""
    form = FORMATS[spec.scheme.name]
    arithmetic, scale_dtype = spec.arithmetic_for(dtype), spec.scale_dtype_for(dtype)
    matrix = widen(weights, dtype)
    blockwise = spec.granularity == "block"
    groups = _blocks(matrix) if blockwise else grouped(matrix, spec)
    largest = np.float32(form.largest)
    with np.errstate(all="ignore"):
        amax: F32 = np.abs(groups).max(axis=-1)
        if global_amax is not None and not blockwise:
            amax = np.full_like(amax, global_amax, np.float32)
        scales = round_to(amax / largest, arithmetic)
        if scale_dtype != arithmetic:
            scales = round_saturating(scales, scale_dtype)
        scales = np.where(scales == 0, np.float32(EPS[scale_dtype]), scales)
        scaled = round_to(np.divide(groups, scales[..., None]), arithmetic)
        codes = encode(np.clip(scaled, -largest, largest), form)
    if blockwise:
        codes = _unblocked(codes, *matrix.shape)
    return codes.reshape(-1), scales.reshape(-1)


def dequantize(packed: npt.NDArray[np.uint8], scales: F32, spec: LayerSpec, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): ``value * scale``."""
    values = decode(packed, FORMATS[spec.scheme.name]).reshape(rows, cols)
    if spec.granularity == "block":
        grid = scales.reshape(-1, -(-cols // BLOCK_EDGE))
        each = grid.repeat(BLOCK_EDGE, axis=0)[:rows].repeat(BLOCK_EDGE, axis=1)[:, :cols]
        with np.errstate(over="ignore", invalid="ignore"):
            return values * each
    groups = grouped(values, spec)
    with np.errstate(over="ignore", invalid="ignore"):
        return (groups * scales.reshape(groups.shape[:2])[..., None]).reshape(rows, cols)
