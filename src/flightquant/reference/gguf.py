"""ggml's blocks of 32 weights: ``quantize_row_q8_0_ref``, ``_q4_0_``, ``_q4_1_``, ``_q5_0_`` and ``_q5_1_ref``.

A block is 32 weights of one row: a float16 scale, then a float16 minimum where the format has one, then the codes. All
arithmetic is float32; the codes come from the float32 scale and minimum, before they are rounded for storage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import F32, widen

BLOCK = 32
Bytes = npt.NDArray[np.uint8]

SYMMETRIC_BITS = {"q4_0": 4, "q5_0": 5}
"""Bits of a code that has 0 in its middle."""
MINIMUM_BITS = {"q4_1": 4, "q5_1": 5}
"""Bits of a code that counts up from the block's minimum."""


def _inverse(scales: F32) -> F32:
    """``1 / scale``, 0 for 0. Where it overflows, ggml casts infinities and NaN to integers: code 0 on x86."""
    with np.errstate(all="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    return np.where(np.isfinite(inverse), inverse, np.float32(np.nan))


def _half_bytes(values: F32) -> Bytes:
    with np.errstate(over="ignore"):
        return values.astype("<f2").view(np.uint8)


def _halves(blocks: Bytes, first: int) -> F32:
    """The float16 that begins at byte ``first`` of each block, shape (n, 1)."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2").astype(np.float32)


def _cut(shifted: F32, bits: int) -> Bytes:
    """Cut off to codes of so many bits; NaN is code 0, which is what x86 makes of it."""
    codes: Bytes = np.where(np.isnan(shifted), np.float32(0), shifted).astype(np.uint8)
    return np.minimum(codes, np.uint8(2**bits - 1))


def _pack(codes: Bytes, bits: int) -> Bytes:
    """Codes of shape (n, 32), low nibbles j and j + 16 in one byte; before those, the fifth bits as one 32-bit word."""
    nibbles = codes[:, :16] & np.uint8(15) | codes[:, 16:] << np.uint8(4)
    if bits == 4:
        return nibbles
    return np.concatenate([np.packbits(codes >> 4, axis=1, bitorder="little"), nibbles], axis=1)


def _unpack(packed: Bytes, bits: int) -> F32:
    nibbles = packed[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if bits == 5:
        codes |= np.unpackbits(packed[:, :4], axis=1, bitorder="little") << 4
    return codes.astype(np.float32)


def quantize_q8_0(blocks: F32) -> Bytes:
    """Blocks of shape (n, 32) as bytes of shape (n, 34): ``roundf(x / d)``, half away from zero, ``d = amax / 127``."""
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    magnitude = np.abs(scaled)
    floor = np.floor(magnitude)
    rounded = np.copysign(floor + (magnitude - floor >= np.float32(0.5)), scaled)
    codes = np.where(np.isnan(scaled), np.float32(0), rounded).astype(np.int8)
    return np.concatenate([_half_bytes(scales), codes.view(np.uint8)], axis=1)


def quantize_symmetric(blocks: F32, bits: int) -> Bytes:
    """``trunc(x / d + middle + 0.5)`` with ``d`` = the extreme value / -middle: 18 or 22 bytes a block."""
    middle = 2 ** (bits - 1)
    first = np.abs(blocks).argmax(axis=1)[:, None]
    # The first of a block of zeros gives the scale its sign, as in gguf (ggml's C code takes any zero for +0).
    scales = np.take_along_axis(blocks, first, axis=1) / np.float32(-middle)
    codes = _cut(blocks * _inverse(scales) + np.float32(middle + 0.5), bits)
    return np.concatenate([_half_bytes(scales), _pack(codes, bits)], axis=1)


def quantize_minimum(blocks: F32, bits: int) -> Bytes:
    """``trunc((x - min) / d + 0.5)`` with ``d = (max - min) / (2^bits - 1)``: 20 or 24 bytes a block."""
    # Of several zeros the first is the minimum, as in ggml's C code; gguf leaves it to NumPy, where it differs by CPU.
    first = np.where(blocks == 0, np.float32(0), blocks).argmin(axis=1)[:, None]
    minimum = np.take_along_axis(blocks, first, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        # A range beyond float32 makes every quotient 0 or, of an infinite difference, NaN: code 0 for all.
        scales = (np.max(blocks, axis=1, keepdims=True) - minimum + np.float32(0)) / np.float32(2**bits - 1)
        codes = _cut((blocks - minimum) * _inverse(scales) + np.float32(0.5), bits)
    return np.concatenate([_half_bytes(scales), _half_bytes(minimum), _pack(codes, bits)], axis=1)


def dequantize_blocks(blocks: Bytes, scheme: str) -> F32:
    """The inverse: blocks of bytes, one in a row, as weights of shape (n, 32)."""
    with np.errstate(invalid="ignore", over="ignore"):
        if scheme == "q8_0":
            return _halves(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
        if scheme in SYMMETRIC_BITS:
            bits = SYMMETRIC_BITS[scheme]
            return _halves(blocks, 0) * (_unpack(blocks[:, 2:], bits) - np.float32(2 ** (bits - 1)))
        return _halves(blocks, 0) * _unpack(blocks[:, 4:], MINIMUM_BITS[scheme]) + _halves(blocks, 2)


def quantize(weights: npt.NDArray[Any], scheme: str, dtype: str) -> Bytes:
    """The packed bytes, flat, of a matrix of shape (rows, cols) with cols a multiple of 32."""
    blocks = widen(weights, dtype).reshape(-1, BLOCK)
    if scheme == "q8_0":
        packed = quantize_q8_0(blocks)
    elif scheme in SYMMETRIC_BITS:
        packed = quantize_symmetric(blocks, SYMMETRIC_BITS[scheme])
    else:
        packed = quantize_minimum(blocks, MINIMUM_BITS[scheme])
    return packed.reshape(-1)


def dequantize(packed: Bytes, scheme: str, block_bytes: int, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols)."""
    return dequantize_blocks(packed.reshape(-1, block_bytes), scheme).reshape(rows, cols)


MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of e2m1."""


def _half_powers(exponents: Bytes) -> F32:
    """``2^(exponent - 128)``."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float32)


def quantize_mxfp4(weights: npt.NDArray[Any], dtype: str) -> Bytes:
    """``quantize_row_mxfp4_ref``: bytes, flat, of a matrix whose rows are whole blocks.

    The exponent is ``floor(log2(amax)) + 125``, the logarithm rounded to float32, as a byte: below 2^-125 it starts
    again from 255, so that all codes are 0. On a bound between two values the one nearer to 0 is taken.
    """
    blocks = widen(weights, dtype).reshape(-1, BLOCK)
    amax = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore"):
        powers = np.floor(np.log2(amax.astype(np.float64)).astype(np.float32))
    exponents = (np.where(amax > 0, powers + 125, 0).astype(np.int32) & 255).astype(np.uint8)
    with np.errstate(over="ignore"):
        bounds = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32) * _half_powers(exponents)[:, None]
    codes = (np.abs(blocks)[..., None] > bounds[:, None]).sum(axis=-1).astype(np.uint8)
    codes |= np.where((codes > 0) & (blocks < 0), np.uint8(8), np.uint8(0))
    return np.concatenate([exponents[:, None], _pack(codes, 4)], axis=1).reshape(-1)


def dequantize_mxfp4(data: Bytes, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols): the code's value times half the block's power of two."""
    blocks = data.reshape(-1, 17)
    with np.errstate(over="ignore"):
        values = MXFP4_VALUES[_unpack(blocks[:, 1:], 4).astype(np.uint8)] * _half_powers(blocks[:, 0])[:, None]
    return values.reshape(rows, cols)
