"""``bnb8``: bitsandbytes 0.50.2's ``quantize_blockwise`` of a CPU tensor, and its quantization of other codes' scales.

The library built for CPUs does not look for the nearest of the 256 values: it looks the code up by one of 65536 places
between -1 and 1, which gives a neighbour's in a few of a thousand cases, and never that of 0. Arithmetic is float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import F32, widen

NESTED_BLOCK = 256
"""Scales under one scale of their own, where scales are quantized too."""

Bytes = npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def values() -> F32:
    """The values of the 256 codes, ascending: twice as many in each decade as in the one below it; 0; 1."""
    first, last = np.float32(0.1), np.float32(1)
    positive = []
    for decade in range(7):
        count = 2**decade
        step = float((last - first) / np.float32(count))
        # torch.linspace counts from the nearer end, one rounding for each boundary.
        up = [float(first) + step * i for i in range((count + 1) // 2)]
        down = [float(last) - step * i for i in range(count - len(up), -1, -1)]
        bounds = np.array(up + down, np.float32)
        positive.append(np.float32(10.0 ** (decade - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2)))
    means = np.concatenate(positive)
    return np.sort(np.concatenate([-means, means, np.array([0, 1], np.float32)]))


@lru_cache(maxsize=1)
def places() -> Bytes:
    """The code at each of 65536 places: how many midpoints between neighbouring values lie below the place's."""
    mids = (values()[:-1] + values()[1:]) * np.float32(0.5)
    at = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535) - np.float32(1)
    return np.searchsorted(mids, at, side="left").astype(np.uint8)


def quantize(weights: npt.NDArray[Any], block: int, dtype: str) -> tuple[Bytes, F32]:
    """Codes and magnitudes of the blocks, both flat, of weights of any shape, not empty; the last block may be short.

    ``place = trunc(fma((clip(x * (1 / amax), -1, 1) + 1) * 0.5, 65535, 0.5))``; what is not a number is at place 0.
    """
    flat = widen(weights, dtype).reshape(-1)
    padded = np.zeros(-(-flat.size // block) * block, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, block)
    amax = np.abs(blocks).max(axis=1)
    with np.errstate(all="ignore"):
        scaled = blocks * (np.float32(1) / amax)[:, None]
        scaled = np.where(np.isnan(scaled), np.float32(-1), np.clip(scaled, -1, 1))
        halved = (scaled + np.float32(1)) * np.float32(0.5)
        # Of so few bits that float64 holds the sum as it is: one rounding in all.
        place = (halved.astype(np.float64) * 65535 + 0.5).astype(np.float32).astype(np.int32)
    return places()[place].reshape(-1)[: flat.size], amax


def dequantize(codes: Bytes, scales: F32, block: int) -> F32:
    """float32 weights, flat: the code's value times its block's magnitude."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: F32 = values()[codes] * np.repeat(scales, block)[: codes.size]
        return scaled


def torch_mean(given: F32) -> np.float32:
    """The mean as torch 2.13 computes it on one thread of an x86-64 CPU with AVX2, whose order of sums this is.

    Vectors of 8 values (of one, where there are fewer than 8), four of them side by side, are added up in four levels,
    each of which is emptied into the next one after 16 steps, or more where four levels would not do otherwise.
    """
    lanes = 8 if given.size >= 8 else 1
    whole = given.size // lanes
    lines = whole // 4
    rows = given[: lines * 4 * lanes].reshape(lines, 4 * lanes)
    power = max(4, (max(lines, 1) - 1).bit_length() // 4)
    levels = np.zeros((4, 4 * lanes), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        _add_up(rows, levels, power)
        vectors = levels[0].reshape(4, lanes)
        for vector in given[lines * 4 * lanes : whole * lanes].reshape(-1, lanes):
            vectors[0] += vector
        total = np.float32(0)
        for value in (*given[whole * lanes :], *(vectors[0] + vectors[1] + vectors[2] + vectors[3])):
            total += value
        return np.float32(total / np.float32(given.size))


def _add_up(rows: F32, levels: F32, power: int) -> None:
    """The sum of rows, in the first of four levels."""
    steps = 1 << power
    for first in range(0, len(rows), steps):
        for row in rows[first : first + steps]:
            levels[0] += row
        done = first + steps
        for level in range(1, 4 if done <= len(rows) else 1):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if done & ((steps - 1) << (level * power)):
                break
    for level in range(1, 4):
        levels[0] += levels[level]


def nest(amax: F32) -> tuple[Bytes, F32]:
    """Codes of scales, and the scales of those with the mean, which was taken off before, as the last one."""
    offset = torch_mean(amax)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, outer = quantize(amax - offset, NESTED_BLOCK, "float32")
    return codes, np.append(outer, offset)


def unnest(codes: Bytes, outer: F32) -> F32:
    """The scales that codes of scales stand for."""
    with np.errstate(over="ignore", invalid="ignore"):
        scales: F32 = dequantize(codes, outer[:-1], NESTED_BLOCK) + outer[-1]
        return scales
