"""ggml's k-quants, ``quantize_q2_K`` to ``quantize_q6_K``, and ``quantize_iq4_nl``: blocks with searched scales.

A k-quant's block is 256 weights of one row, in sub-blocks of 16 or 32 whose scales are themselves quantized. What is
matched is the plain x86-64 build of ggml 0.25.3: no fused multiply-add, and every sum in float32 from the first
element to the last. Arrays of sub-blocks have shape (sub-blocks, weights of one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import F32, widen

Bytes = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
Array = npt.NDArray[Any]

BLOCK = 256
NOTHING = np.float32(1e-15)
"""A sub-block whose largest magnitude is below it counts as zero, where codes have a sign."""


@dataclass(frozen=True, slots=True)
class Format:
    """One k-quant: bits of a code, weights of a sub-block, and the trials of the search for scale and minimum.

    A trial divides by ``(first + step * i + top) / range`` for ``i`` from 0 to ``last``, ``top`` being the highest
    code.
    """

    bits: int
    sub: int
    first: float = 0.0
    step: float = 0.0
    last: int = 0


FORMATS = {
    "q2_k": Format(2, 16, -0.5, 0.1, 15),
    "q3_k": Format(3, 16),
    "q4_k": Format(4, 32, -1.0, 0.1, 20),
    "q5_k": Format(5, 32, -0.5, 0.1, 15),
    "q6_k": Format(6, 16),
}
SCHEMES = (*FORMATS, "iq4_nl")
WEIGHTED = (-0.9, 0.05, 36)
"""The trials where weights are given."""

IQ4_NL_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def nearest(values: Array) -> I32:
    """To the nearest integer, ties to even, as ggml does it: right up to 2^22, and what comes of its trick beyond."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(values + np.float32(12582912), np.float32).view(np.int32)
    return (bits & 0x7FFFFF) - 0x400000


def total(terms: Array) -> F32:
    """The sum over the last axis in float32, from 0 on, one term after the other."""
    sums: F32 = np.add.accumulate(terms, axis=-1)[..., -1] + np.float32(0)  # -0 only if all terms are, and then 0
    return sums


def half(values: F32) -> F32:
    """Rounded to float16, held in float32; a NaN has its sign bit set, as what x86 makes has."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    return np.where(np.isnan(rounded), -np.abs(rounded), rounded)


def _half_bytes(values: F32) -> Bytes:
    """float16 values of shape (n,) as bytes of shape (n, 2)."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _halves(blocks: Bytes, first: int) -> F32:
    """The float16 that begins at byte ``first`` of each block, shape (n, 1)."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2").astype(np.float32)


def search_minimum(x: F32, w: F32, top: int, first: float, step: float, last: int, absolute: bool) -> tuple[F32, ...]:
    """Scale, negated minimum (never negative) and codes 0 to ``top`` of sub-blocks, ``make_qkx2_quants``.

    The range divided by ``top`` comes first; then every trial's codes give a scale and a minimum by weighted least
    squares, and the trial is kept if its weighted error, of squares or ``absolute``, is less than the least so far.
    The minimum that was kept is the one from which the next trial counts.
    """
    top_f, low, high = np.float32(top), np.minimum(x.min(axis=1), np.float32(0)), x.max(axis=1)
    sum_w, sum_x = np.add.accumulate(w, axis=1)[:, -1], np.add.accumulate(w * x, axis=1)[:, -1]

    def codes_for(inverse: Array, minimum: F32) -> F32:
        return np.clip(nearest(inverse[:, None] * (x - minimum[:, None])), 0, top).astype(np.float32)

    def error_of(scale: Array, minimum: Array, codes: F32) -> F32:
        difference = scale[:, None] * codes + minimum[:, None] - x
        return total(w * (np.abs(difference) if absolute else difference * difference))

    inverse = top_f / (high - low)
    scale, minimum, codes = np.float32(1) / inverse, low, codes_for(inverse, low)
    least = error_of(scale, minimum, codes)
    for i in range(last + 1):
        levels = np.float32(first) + np.float32(step) * np.float32(i) + top_f
        tried = codes_for(levels / (high - minimum), minimum)
        wl = w * tried
        sum_l, sum_l2, sum_xl = total(wl), total(wl * tried), total(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        its_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        its_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = its_minimum > 0
        its_scale = np.where(positive, sum_xl / sum_l2, its_scale)
        its_minimum = np.where(positive, np.float32(0), its_minimum)
        error = error_of(its_scale, its_minimum, tried)
        better = (determinant > 0) & (error < least)
        least, scale = np.where(better, error, least), np.where(better, its_scale, scale)
        minimum, codes = np.where(better, its_minimum, minimum), np.where(better[:, None], tried, codes)
    flat = high == low
    return np.where(flat, np.float32(0), scale), -minimum, np.where(flat[:, None], np.float32(0), codes)


def _extreme(x: F32) -> tuple[F32, npt.NDArray[np.bool_]]:
    """The value of largest magnitude of each sub-block, the first of several, 1 where all count as zero; where so."""
    magnitude = np.where(np.isnan(x), np.float32(0), np.abs(x))  # scales may be NaN
    first = magnitude.argmax(axis=1)[:, None]
    extreme, empty = np.take_along_axis(x, first, axis=1)[:, 0], magnitude.max(axis=1) < NOTHING
    return np.where(empty, np.float32(1), extreme), empty


def search_signed(x: F32, w: F32, middle: int) -> tuple[F32, F32]:
    """Scale, and codes 0 to ``2 * middle - 1`` of which ``middle`` stands for 0, ``make_qx_quants``.

    18 trials around ``-middle / extreme``; one is kept if its codes' correlation with the weights is higher.
    """
    extreme, empty = _extreme(x)

    def sums_for(inverse: Array) -> tuple[F32, F32, F32]:
        codes = np.clip(nearest(inverse[:, None] * x), -middle, middle - 1).astype(np.float32)
        return codes, total(w * x * codes), total(w * codes * codes)

    codes, sum_lx, sum_l2 = sums_for(np.float32(-middle) / extreme)
    scale = np.where(sum_l2 == 0, np.float32(0), sum_lx / sum_l2)
    best = scale * sum_lx
    for i in (*range(-9, 0), *range(1, 10)):
        tried, sum_lx, sum_l2 = sums_for(-(np.float32(middle) + np.float32(0.1) * np.float32(i)) / extreme)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best, codes = np.where(better, scale * sum_lx, best), np.where(better[:, None], tried, codes)
    codes = np.where(empty[:, None], np.float32(0), codes + np.float32(middle))
    return np.where(empty, np.float32(0), scale), codes


def descend_signed(x: F32, middle: int) -> tuple[F32, F32]:
    """As :func:`search_signed`, but each code is moved in turn, up to five times, if that helps: ``make_q3_quants``."""
    extreme, empty = _extreme(x)
    w = x * x
    inverse = np.float32(-middle) / extreme
    codes = np.clip(nearest(inverse[:, None] * x), -middle, middle - 1).astype(np.float32)
    sum_lx, sum_l2 = total(w * x * codes), total(w * codes * codes)
    for _ in range(5):
        for i in range(x.shape[1]):
            xi, wi, code = x[:, i], w[:, i], codes[:, i]
            lx = sum_lx - wi * xi * code
            l2 = sum_l2 - wi * code * code
            moved = np.clip(nearest(xi * l2 / lx), -middle, middle - 1).astype(np.float32)
            new_lx, new_l2 = lx + wi * xi * moved, l2 + wi * moved * moved
            better = (lx > 0) & (moved != code) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            codes[:, i] = np.where(better, moved, code)
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    codes = np.where(empty[:, None], np.float32(0), codes + np.float32(middle))
    return np.where(empty, np.float32(0), scale), codes


def search_positive(x: F32, w: F32, top: int) -> tuple[F32, I32]:
    """Scale and 8-bit codes of rows of positive values, ``make_qp_quants``: eight trials, then codes in turn."""
    largest = np.maximum(x, np.float32(0)).max(axis=1)
    empty = largest < NOTHING
    largest = np.where(empty, np.float32(1), largest)

    def codes_for(inverse: Array) -> I32:
        return nearest(inverse[:, None] * x)

    inverse = np.float32(top) / largest
    difference = x - (np.float32(1) / inverse)[:, None] * (codes_for(inverse) & 255).astype(np.float32)
    least = total(w * difference * difference)
    for i in (*range(-4, 0), *range(1, 5)):
        tried = (np.float32(0.1) * np.float32(i) + np.float32(top)) / largest
        codes = np.minimum(codes_for(tried), top).astype(np.float32)
        difference = x - (np.float32(1) / tried)[:, None] * codes
        error = total(w * difference * difference)
        better = error < least
        least, inverse = np.where(better, error, least), np.where(better, tried, inverse)
    exact = np.minimum(codes_for(inverse), top)
    codes = exact.astype(np.float32)
    sum_lx, sum_l2, stored = total(w * x * codes), total(w * codes * codes), exact & 255
    for _ in range(5):
        for i in range(x.shape[1]):
            xi, wi, code = x[:, i], w[:, i], stored[:, i].astype(np.float32)
            lx, l2 = sum_lx - wi * xi * code, sum_l2 - wi * code * code
            moved = np.minimum(nearest(xi * l2 / lx), top)
            moved_f = moved.astype(np.float32)
            new_lx, new_l2 = lx + wi * xi * moved_f, l2 + wi * moved_f * moved_f
            better = (lx > 0) & (l2 > 0) & (moved != stored[:, i])
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            stored[:, i] = np.where(better, moved & 255, stored[:, i])
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    return np.where(empty, np.float32(0), scale), np.where(empty[:, None], 0, stored)


def _weights(name: str, x: F32, importance: F32 | None) -> F32:
    """What each weight's error counts in the search, of blocks of shape (n, weights of a block).

    ``importance`` has the same shape. With it a weight near 0 counts as one of the block's usual magnitude.
    """
    if importance is not None:
        if name == "q6_k":
            return importance
        usual = {"q2_k": total(x * x) / np.float32(BLOCK), "iq4_nl": total(x * x) * np.float32(2.0 / 32)}
        mean = usual.get(name, np.float32(2) * total(x * x) / np.float32(BLOCK))
        return importance * np.sqrt(mean[:, None] + x * x)
    if name in ("q4_k", "q5_k"):
        sub = x.reshape(-1, 32)
        weights: F32 = np.sqrt(total(sub * sub) / np.float32(32))[:, None] + np.abs(sub)
        return weights.reshape(x.shape)
    return np.abs(x) if name == "q2_k" else x * x


def _pack_6(scales: I32, minima: I32) -> Bytes:
    """Scales and minima of 8 sub-blocks (bytes, but of 6 bits unless something overflowed) in 12 bytes."""
    low, high = (scales & 255, minima & 255), (scales[:, 4:] & 255, minima[:, 4:] & 255)
    first = [part[:, :4] | (top >> 4) << 6 for part, top in zip(low, high, strict=True)]
    packed = np.concatenate([*first, high[0] & 15 | (high[1] & 15) << 4], axis=1)
    return packed.astype(np.uint8)


def _unpack_6(packed: Bytes) -> tuple[F32, F32]:
    """The inverse: scales and minima of shape (n, 8)."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    minima = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _stack_2(codes: Array) -> Bytes:
    """Two bits of 256 weights in 64 bytes: byte l of each half holds weights l, l + 32, l + 64 and l + 96."""
    parts = (codes & np.uint8(3)).reshape(-1, 2, 4, 32)
    stacked: Bytes = (parts << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=2, dtype=np.uint8)
    return stacked.reshape(-1, 64)


def _unstack_2(packed: Bytes) -> Bytes:
    parts = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    return parts.reshape(-1, BLOCK)


def _stack_4(codes: Array, width: int) -> Bytes:
    """The low four bits of 256 weights in 128 bytes: of each 2 * width weights, the second half lies above."""
    parts = (codes & np.uint8(15)).reshape(-1, BLOCK // width // 2, 2, width)
    return (parts[:, :, 0] | parts[:, :, 1] << np.uint8(4)).reshape(-1, 128)


def _unstack_4(packed: Bytes, width: int) -> Bytes:
    parts = packed.reshape(-1, BLOCK // width // 2, 1, width)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(-1, BLOCK)


def _stack_1(bits: Array) -> Bytes:
    """One bit of 256 weights in 32 bytes: bit i of byte l is that of weight 32 * i + l."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _unstack_1(packed: Bytes) -> Bytes:
    return np.unpackbits(packed.reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, BLOCK)


def _quantize_minimum(name: str, x: F32, w: F32, weighted: bool) -> Bytes:
    """q2_k, q4_k and q5_k: ``d * scale * code - dmin * minimum`` with codes from 0 up."""
    form = FORMATS[name]
    trials = WEIGHTED if weighted else (form.first, form.step, form.last)
    sub, sub_w = x.reshape(-1, form.sub), w.reshape(-1, form.sub)
    top, levels = 2**form.bits - 1, 15 if name == "q2_k" else 63
    absolute = name == "q2_k" and not weighted
    scale, minimum, codes = search_minimum(sub, sub_w, top, *trials, absolute)
    units = []
    for values in (scale.reshape(len(x), -1), minimum.reshape(len(x), -1)):
        if weighted:
            unit, steps = search_positive(values, total(sub_w).reshape(len(x), -1), levels)
            steps = np.minimum(steps, levels) if name == "q5_k" else steps
        else:
            largest = np.fmax(values, np.float32(0)).max(axis=1)
            inverse = np.where(largest > 0, np.float32(levels) / largest, np.float32(0))
            unit, steps = largest / np.float32(levels), nearest(inverse[:, None] * values) & 255
            if levels == 63:
                steps = np.minimum(steps, levels)
            elif values is not scale:
                steps = np.where(largest[:, None] > 0, steps, 0)
        units.append((half(unit), steps))
    (d, scales), (dmin, minima) = units
    if name == "q2_k":
        stored = (scales & 255 | minima << 4).astype(np.uint8)
        scales_f, minima_f = (stored & 15).astype(np.float32), (stored >> 4).astype(np.float32)
    else:
        stored = _pack_6(scales, minima)
        scales_f, minima_f = _unpack_6(stored)
    divisor, offset = (d[:, None] * scales_f).reshape(-1, 1), (dmin[:, None] * minima_f).reshape(-1, 1)
    again = np.clip(nearest((sub + offset) / divisor), 0, top)
    # A sub-block whose scale came out as 0 keeps the codes of the search.
    found = np.where(divisor == 0, codes, again).astype(np.uint8).reshape(-1, BLOCK)
    head = [_half_bytes(d), _half_bytes(dmin)]
    if name == "q2_k":
        return np.concatenate([stored, _stack_2(found), *head], axis=1)
    fifth = [_stack_1(found >> 4)] if name == "q5_k" else []
    return np.concatenate([*head, stored, *fifth, _stack_4(found, 32)], axis=1)


def _requantize(sub: F32, divisor: F32, codes: F32, middle: int) -> Bytes:
    """Codes of sub-blocks for the stored scales; those whose scale came out as 0 keep the codes of the search."""
    again = np.clip(nearest(sub / divisor[:, None]), -middle, middle - 1) + middle
    return np.where(divisor[:, None] == 0, codes, again).astype(np.uint8).reshape(-1, BLOCK)


def _first_largest(scales: F32) -> F32:
    """The scale of largest magnitude of each block, the first of several; 0 if there is none."""
    magnitude = np.where(np.isnan(scales), np.float32(0), np.abs(scales))
    largest = np.take_along_axis(scales, magnitude.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(magnitude.max(axis=1) > 0, largest, np.float32(0))


def _quantize_q3_k(x: F32, w: F32, weighted: bool) -> Bytes:
    sub, sub_w = x.reshape(-1, 16), w.reshape(-1, 16)
    if weighted:
        scale, codes = search_signed(sub, sub_w, 4)
        scales = scale.reshape(-1, 16)
        unit, found = search_signed(scales, total(sub_w).reshape(-1, 16), 32)
        d, stored = half(unit), found.astype(np.int32)
    else:
        scale, codes = descend_signed(sub, 4)
        scales = scale.reshape(-1, 16)
        largest = _first_largest(scales)
        inverse = np.float32(-32) / largest
        steps = nearest(inverse[:, None] * scales).astype(np.int8).astype(np.int32)
        stored = np.where(largest[:, None] != 0, np.clip(steps, -32, 31) + 32, 0)
        d = half(np.where(largest != 0, np.float32(1) / inverse, np.float32(0)))
    divisor = d[:, None] * (stored - 32).astype(np.float32)
    found_codes = _requantize(sub, divisor.reshape(-1), codes, 4)
    nibbles = (stored[:, :8] & 15 | (stored[:, 8:] & 15) << 4).astype(np.uint8)
    upper = ((stored >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6])[:, None]).sum(axis=1).astype(np.uint8)
    planes = [_stack_1(found_codes >> 2), _stack_2(found_codes)]
    return np.concatenate([*planes, nibbles, upper, _half_bytes(d)], axis=1)


def _quantize_q6_k(x: F32, w: F32) -> Bytes:
    sub = x.reshape(-1, 16)
    scale, codes = search_signed(sub, w.reshape(-1, 16), 32)
    scales = scale.reshape(-1, 16)
    largest = _first_largest(scales)
    empty = np.abs(largest) < NOTHING
    inverse = np.float32(-128) / np.where(empty, np.float32(1), largest)
    d = half(np.where(empty, np.float32(0), np.float32(1) / inverse))
    steps = np.minimum(nearest(inverse[:, None] * scales), 127).astype(np.int8)
    steps[empty] = 0
    divisor = d[:, None] * steps.astype(np.float32)
    found = _requantize(sub, divisor.reshape(-1), codes, 32)
    found[empty] = 0
    parts = [_stack_4(found, 64), _stack_2(found >> 4), steps.view(np.uint8), _half_bytes(d)]
    return np.concatenate(parts, axis=1)


def _iq4_nl_codes(scaled: F32) -> npt.NDArray[np.intp]:
    """Index of the nearest of the 16 values, the upper one of two; NaN belongs to the last."""
    bounds = (IQ4_NL_VALUES[1:] + IQ4_NL_VALUES[:-1]) / np.float32(2)
    codes: npt.NDArray[np.intp] = np.searchsorted(bounds, scaled, side="right")
    return codes


def _quantize_iq4_nl(x: F32, w: F32) -> Bytes:
    """16 trials around ``-127 / extreme``; one is kept if its values' correlation with the weights is higher."""
    extreme, empty = _extreme(x)

    def sums_for(inverse: Array) -> tuple[F32, F32]:
        values = IQ4_NL_VALUES[_iq4_nl_codes(inverse[:, None] * x)]
        return total(w * values * x), total(w * values * values)

    sum_qx, sum_q2 = sums_for(np.float32(1) / (-extreme / IQ4_NL_VALUES[0]))
    scale = np.where(sum_q2 > 0, sum_qx / sum_q2, np.float32(0))
    best = scale * sum_qx
    for i in range(-7, 8):
        sum_qx, sum_q2 = sums_for((np.float32(i) + IQ4_NL_VALUES[0]) / extreme)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = np.where(better, sum_qx / sum_q2, scale)
        best = np.where(better, scale * sum_qx, best)
    scale = np.where(empty, np.float32(0), scale)
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    codes = _iq4_nl_codes(inverse[:, None] * x).astype(np.uint8)
    return np.concatenate([_half_bytes(half(scale)), codes[:, :16] | codes[:, 16:] << np.uint8(4)], axis=1)


def quantize(weights: npt.NDArray[Any], name: str, dtype: str, importance: F32 | None = None) -> Bytes:
    """The packed bytes, flat, of a matrix of shape (rows, cols) with cols a multiple of the block.

    Parameters
    ----------
    importance : float32 array of shape (cols,), optional
        What an error in each column counts.
    """
    matrix = widen(weights, dtype)
    block = 32 if name == "iq4_nl" else BLOCK
    x = matrix.reshape(-1, block)
    given = None
    if importance is not None:
        given = np.broadcast_to(importance, matrix.shape).reshape(-1, block)
    with np.errstate(all="ignore"):
        w = _weights(name, x, given)
        if name == "iq4_nl":
            packed = _quantize_iq4_nl(x, w)
        elif name == "q3_k":
            packed = _quantize_q3_k(x, w, given is not None)
        elif name == "q6_k":
            packed = _quantize_q6_k(x, w)
        else:
            packed = _quantize_minimum(name, x, w, given is not None)
    return packed.reshape(-1)


def dequantize_blocks(blocks: Bytes, name: str) -> F32:
    """Blocks of bytes, one in a row, as weights of shape (n, weights of a block)."""
    with np.errstate(invalid="ignore", over="ignore"):
        if name == "iq4_nl":
            nibbles = blocks[:, 2:]
            values: F32 = IQ4_NL_VALUES[np.concatenate([nibbles & 15, nibbles >> 4], axis=1)]
            return _halves(blocks, 0) * values
        if name == "q2_k":
            scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
            codes, unit, least = _unstack_2(blocks[:, 16:80]), _halves(blocks, 80), _halves(blocks, 82)
            return _with_minimum(codes, unit * scales.astype(np.float32), least * minima.astype(np.float32))
        if name in ("q4_k", "q5_k"):
            codes = _unstack_4(blocks[:, -128:], 32)
            if name == "q5_k":
                codes |= _unstack_1(blocks[:, 16:48]) << np.uint8(4)
            scales_f, minima_f = _unpack_6(blocks[:, 4:16])
            return _with_minimum(codes, _halves(blocks, 0) * scales_f, _halves(blocks, 2) * minima_f)
        if name == "q3_k":
            codes = _unstack_2(blocks[:, 32:96]) | _unstack_1(blocks[:, :32]) << np.uint8(2)
            nibbles, upper = blocks[:, 96:104], blocks[:, 104:108]
            steps = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int32)
            steps |= np.concatenate([upper >> (2 * i) & 3 for i in range(4)], axis=1).astype(np.int32) << 4
            return _signed(codes, _halves(blocks, 108) * (steps - 32).astype(np.float32), 4)
        codes = _unstack_4(blocks[:, :128], 64) | _unstack_2(blocks[:, 128:192]) << np.uint8(4)
        steps = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
        return _signed(codes, _halves(blocks, 208) * steps.astype(np.float32), 32)


def _with_minimum(codes: Bytes, scales: F32, minima: F32) -> F32:
    parts = codes.reshape(*scales.shape, -1).astype(np.float32)
    return (scales[..., None] * parts - minima[..., None]).reshape(len(codes), -1)


def _signed(codes: Bytes, scales: F32, middle: int) -> F32:
    parts = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(middle)
    return (scales[..., None] * parts).reshape(len(codes), -1)


def dequantize(packed: Bytes, name: str, block_bytes: int, rows: int, cols: int) -> F32:
    """float32 weights of shape (rows, cols)."""
    return dequantize_blocks(packed.reshape(-1, block_bytes), name).reshape(rows, cols)
