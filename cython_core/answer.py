"""The answer batch: the contract's columns around the kernels' output memory, without a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._quantize import quality_columns
from flightquant.cython_core.validate import CheckedBatch
from flightquant.spec import Command
from flightquant.wire import ANSWER_FIELDS

_FLOAT = pa.float32()
_FLOATS = pa.list_(_FLOAT)
NO_SCHEME = "none"
"""The scheme, in costs, of rows without one."""
QUALITY = ("sqnr_db", "cosine", "max_abs_error")
"""The answer's columns that are null without ``metrics``."""

if TYPE_CHECKING:
    from flightquant.cython_core.validate_quantized import CheckedRows
    from flightquant.cython_core.work import Work


def with_nulls(valid: npt.NDArray[np.bool_]) -> tuple[pa.Buffer | None, int]:
    """Arrow's validity bitmap and null count; no bitmap where all is valid."""
    nulls = int(valid.size - np.count_nonzero(valid))
    return (pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls else None), nulls


def good_rows(checked: CheckedBatch | CheckedRows, count: int) -> npt.NDArray[np.bool_] | None:
    """Which rows have not failed, of shape (rows,); None where none has."""
    if not checked.failures:
        return None
    good = np.ones(count, bool)
    good[list(checked.failures)] = False
    return good


def build_answer(
    batch: pa.RecordBatch, checked: CheckedBatch, work: Work, command: Command, schema: pa.Schema
) -> pa.RecordBatch:
    """Answer rows for a request batch whose jobs are done."""
    count = batch.num_rows
    ok = good_rows(checked, count)
    columns: dict[str, pa.Array] = {"layer_name": checked.names, "shape": checked.shapes, **usual_columns(count)}
    if "row_offset" in work.request.columns:
        columns["row_offset"] = batch.column("row_offset")
    if checked.failures:
        columns |= status_columns(checked, count)
    columns |= _options(work)
    columns |= _outputs(work, ok)
    if command.metrics:
        columns |= quality(work.row_sums, ok)
    columns |= _cost(checked, work)
    for name in schema.names[len(ANSWER_FIELDS) :]:
        columns[name] = batch.column(name)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _repeat(value: Any, kind: pa.DataType, count: int) -> pa.Array:
    return pa.nulls(count, kind) if value is None else pa.repeat(pa.scalar(value, kind), count)


def _kept_if_short(make: Callable[..., dict[str, pa.Array]]) -> Callable[..., dict[str, pa.Array]]:
    """Remember the columns of short batches, by their number of rows and what else is given.

    Most batches are short and like the last. Nobody changes what comes back.
    """
    kept = lru_cache(maxsize=256)(make)
    return lambda count, *options: (kept if count <= 64 else make)(count, *options)


@_kept_if_short
def usual_columns(count: int) -> dict[str, pa.Array]:
    """Columns of a batch without failures, row offsets, scales, zero points and quality."""
    return {
        "row_offset": _repeat(None, pa.int64(), count),
        "status": _repeat("ok", pa.utf8(), count),
        "error": _repeat(None, pa.utf8(), count),
        "scales": _repeat(None, _FLOATS, count),
        "zero_points": _repeat(None, _FLOATS, count),
        **{name: _repeat(None, pa.float32(), count) for name in QUALITY},
        "bytes_copied": _repeat(0, pa.int64(), count),
    }


@_kept_if_short
def same_options(
    count: int, scheme: str, packing: str, bit_width: int, group_size: int | None, scale_dtype: str | None
) -> dict[str, pa.Array]:
    """The options of a batch whose rows all have the same."""
    return {
        "scheme": _repeat(scheme, pa.utf8(), count),
        "packing": _repeat(packing, pa.utf8(), count),
        "bit_width": _repeat(bit_width, pa.uint8(), count),
        "group_size": _repeat(group_size, pa.int32(), count),
        "scale_dtype": _repeat(scale_dtype, pa.utf8(), count),
    }


def _columns_around(values: npt.NDArray[Any], kind: pa.DataType, names: Sequence[str]) -> dict[str, pa.Array]:
    """Columns around the memory of an array of shape (columns, rows)."""
    memory, count = pa.py_buffer(values), values.shape[1]
    return {name: pa.Array.from_buffers(kind, count, [None, memory], 0, i * count) for i, name in enumerate(names)}


def status_columns(checked: CheckedBatch | CheckedRows, count: int) -> dict[str, pa.Array]:
    """The columns ``status`` and ``error`` of a batch whose failures are known."""
    if not checked.failures:
        usual = usual_columns(count)
        return {"status": usual["status"], "error": usual["error"]}
    status: list[str] = ["ok"] * count
    error: list[str | None] = [None] * count
    for i, (code, text) in checked.failures.items():
        status[i], error[i] = code, text
    return {"status": pa.array(status, pa.utf8()), "error": pa.array(error, pa.utf8())}


def _options(work: Work) -> dict[str, pa.Array]:
    """What was really used, row by row: one value for each distinct spec, spread over the rows."""
    dtype = work.request.dtype
    used = [
        (spec.scheme.name, spec.scheme.packing, spec.scheme.bits, spec.group_size, spec.scale_dtype_for(dtype))
        for spec in work.specs
    ]
    if len(used) == 1:
        return same_options(len(work.spec_of_row), *used[0])
    rows = pa.array(work.spec_of_row)
    each = [same_options(1, *options) for options in used]
    return {name: pa.concat_arrays([columns[name] for columns in each]).take(rows) for name in each[0]}


def _outputs(work: Work, ok: npt.NDArray[np.bool_] | None) -> dict[str, pa.Array]:
    columns = {"quantized_data": work.data.as_lists(pa.binary(), None, ok)}
    has_scales = [not spec.scheme.scales_inside for spec in work.specs]
    has_zeros = [not spec.symmetric for spec in work.specs]
    for name, buffer, having in (("scales", work.scales, has_scales), ("zero_points", work.zeros, has_zeros)):
        if not any(having):
            continue
        # Null in rows that failed and in those whose spec has no such thing.
        valid = ok
        if not all(having):
            mine = np.array(having)[work.spec_of_row]
            valid = mine if ok is None else mine & ok
        columns[name] = buffer.as_lists(_FLOATS, _FLOAT, valid)
    return columns


def quality(sums: npt.NDArray[np.float64], ok: npt.NDArray[np.bool_] | None) -> dict[str, pa.Array]:
    """The quality columns of rows of sums of shape (rows, 4); null where not ``ok``."""
    values = np.empty((len(QUALITY), len(sums)), np.float32)
    quality_columns(sums, *values)
    if ok is None:
        return _columns_around(values, _FLOAT, QUALITY)
    return {name: pa.array(column, _FLOAT, mask=~ok) for name, column in zip(QUALITY, values, strict=True)}


def _cost(checked: CheckedBatch, work: Work) -> dict[str, pa.Array]:
    values = np.zeros((3, len(work.spec_of_row)), np.int64)
    values[0, work.rows] = work.nanoseconds
    np.multiply(checked.lengths, work.request.value_bytes, out=values[1])
    values[2] = work.bytes_out
    return _columns_around(values, pa.int64(), ("kernel_ns", "bytes_in", "bytes_out"))
