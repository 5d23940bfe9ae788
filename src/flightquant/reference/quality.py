"""The quality columns: signal-to-noise ratio, cosine and largest error of dequantized against given weights.

Sums are made in an order that depends on the layer's shape alone, so that they are the same bits on every instruction
set and for every number of threads: 32 float32 lanes over a *span* of at most 2048 weights, each product added to its
lane with one rounding, the upper half of the lanes added to the lower one until one is left, spans added up in float64
to a *tile* of about 65536 weights, tiles added up to the layer. A span never crosses a
group or row (a *unit*) that is longer than it, nor one that is no multiple of 32 weights. Where scales cover blocks of
128x128 weights, a tile is a strip of 128 rows, and its spans are the rows' pieces of 512 weights, column by column.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.reference.numeric import F32, fused

SPAN = 2048
TILE = 65536
LANES = 32
STRIP_ROWS, STRIP_COLS = 128, 512
# Squares of float32 lanes are trusted while their sum stays in this range; else the span is summed in float64.
SUM_LOW, SUM_HIGH = 2.0**-80, 2.0**100

Sums = npt.NDArray[np.float64]
Tile = tuple[int, int, list[tuple[int, int]]]
"""First and last weight of a tile, and of each of its spans in the order in which they are added."""


def _joins_units(unit: int) -> bool:
    """Whether a span may hold several units: whole vectors and, packed at any bit width, whole 32-bit words."""
    return unit <= SPAN and unit % 32 == 0


def bounds(n: int, unit: int) -> list[Tile]:
    """The tiles of a layer of ``n`` weights made of units (groups or rows)."""
    tiles: list[Tile] = []
    tile = TILE // unit * unit if unit <= TILE else TILE
    span = SPAN // unit * unit if _joins_units(unit) else min(unit, SPAN)
    begin = 0
    while begin < n:
        end = min(begin + tile, n if unit <= TILE else begin - begin % unit + unit)
        spans = []
        at = begin
        while at < end:
            stop = min(at + span, end if _joins_units(unit) else min(end, at - at % unit + unit))
            spans.append((at, stop))
            at = stop
        tiles.append((begin, end, spans))
        begin = end
    return tiles


def strips(rows: int, cols: int) -> list[Tile]:
    """The tiles of a matrix with a scale for each block of 128x128 weights."""
    tiles: list[Tile] = []
    for first in range(0, rows, STRIP_ROWS):
        last = min(first + STRIP_ROWS, rows)
        spans = [
            (row * cols + col, row * cols + min(col + STRIP_COLS, cols))
            for col in range(0, cols, STRIP_COLS)
            for row in range(first, last)
        ]
        tiles.append((first * cols, last * cols, spans))
    return tiles


def _fold(lanes: npt.NDArray[Any]) -> Sums:
    """Lanes, along the last axis, added up in their own dtype: the upper half to the lower one, until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    folded: Sums = lanes[..., 0].astype(np.float64)
    return folded


def _span_sums(x: F32, y: F32, spans: list[tuple[int, int]]) -> tuple[Sums, np.float32]:
    """(sum x^2, sum e^2, sum x*e), e = y - x, of each span, of shape (spans, 3), and the largest |e| of them all."""
    steps = -(-max(end - begin for begin, end in spans) // LANES)
    padded = np.zeros((2, len(spans), steps * LANES), np.float32)
    for row, (begin, end) in enumerate(spans):
        padded[0, row, : end - begin], padded[1, row, : end - begin] = x[begin:end], y[begin:end]
    xs, ys = np.moveaxis(padded.reshape(2, len(spans), steps, LANES), 2, 1)
    with np.errstate(all="ignore"):
        error = ys - xs
        factors = np.stack([np.stack([xs, xs]), np.stack([error, error]), np.stack([xs, error])])
        lanes = np.zeros((3, len(spans), LANES), np.float32)
        for step in range(steps):
            lanes = fused(factors[:, 0, step], factors[:, 1, step], lanes)
        sums = _fold(lanes).T
        outside = ~((sums[:, 0] > SUM_LOW) & (sums[:, 0] < SUM_HIGH) & (sums[:, 1] < SUM_HIGH))
        wide = factors[..., outside, :].astype(np.float64)
        sums[outside] = _fold(np.add.accumulate(wide[:, 0] * wide[:, 1], axis=1)[:, -1]).T
    magnitude = np.abs(error).view(np.uint32).max()
    return sums, np.uint32(magnitude).view(np.float32)


def sums(x: F32, y: F32, unit: int, tiles: list[Tile] | None = None) -> Sums:
    """The layer's (sum x^2, sum e^2, sum x*e, largest |e|), from flat weights ``x`` and dequantized ``y``.

    The tiles are those of the units, unless others are given.
    """
    total = np.zeros(4)
    for _, _, spans in bounds(x.size, unit) if tiles is None else tiles:
        parts, largest = _span_sums(x, y, spans)
        tile = np.add.accumulate(parts, axis=0)[-1]
        total[3] = largest if np.isnan(largest) or largest > total[3] else total[3]
        total[:3] += tile
    return total


def _log10(ratios: Sums) -> Sums:
    """The C library's logarithm, as the kernels use it: NumPy's own differs in the last bit on some processors."""
    return np.array([math.log10(value) if value > 0 else -np.inf if value == 0 else np.nan for value in ratios])


def columns(totals: Sums) -> tuple[F32, F32, F32]:
    """``sqnr_db``, ``cosine`` and ``max_abs_error`` (float32) of layers with ``totals`` of shape (layers, 4).

    ``sqnr_db = 10 log10(sum x^2 / sum e^2)``, infinite where there is no error; ``cosine`` is 1 where both the
    weights and the dequantized weights are all zero, 0 where only one of them is.
    """
    x2, e2, xe, largest = np.asarray(totals, np.float64).reshape(-1, 4).T
    with np.errstate(all="ignore"):
        undefined = np.isnan(x2 + e2)
        sqnr = np.where(e2 == 0, np.inf, 10.0 * _log10(x2 / e2))
        sqnr = np.where(undefined, np.nan, sqnr)
        y2 = x2 + 2.0 * xe + e2
        cosine = np.where(e2 == 0, 1.0, np.where((x2 > 0) & (y2 > 0), (x2 + xe) / np.sqrt(x2 * y2), 0.0))
        cosine = np.where(undefined, np.nan, np.clip(cosine, -1.0, 1.0))
        return sqnr.astype(np.float32), cosine.astype(np.float32), largest.astype(np.float32)
