"""The answer batch: the contract's columns around the kernels' output memory, without a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._quantize import quality_columns
from flightquant.cython_core.validate import CheckedBatch
from flightquant.spec import Command, LayerSpec
from flightquant.wire import ANSWER_FIELDS

if TYPE_CHECKING:
    from flightquant.cython_core.engine import _Buffer, _Work
    from flightquant.cython_core.validate_quantized import CheckedRows


def with_nulls(valid: npt.NDArray[np.bool_]) -> tuple[pa.Buffer | None, int]:
    """Arrow's validity bitmap and null count; no bitmap where all is valid."""
    nulls = int(valid.size - np.count_nonzero(valid))
    return (pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls else None), nulls


def build_answer(
    batch: pa.RecordBatch, checked: CheckedBatch, work: _Work, command: Command, schema: pa.Schema
) -> pa.RecordBatch:
    """Answer rows for a request batch whose jobs are done."""
    count = batch.num_rows
    ok = None
    if checked.failures:
        ok = np.ones(count, bool)
        ok[list(checked.failures)] = False
    columns: dict[str, pa.Array] = {"layer_name": checked.names, "shape": checked.shapes}
    if "row_offset" in work.request.columns:
        columns["row_offset"] = batch.column("row_offset")
    else:
        columns["row_offset"] = repeated(None, pa.int64(), count)
    columns |= status_columns(checked, count)
    columns |= _options(work)
    columns |= _outputs(work, ok)
    columns |= _quality(work, ok, command.metrics)
    columns |= _cost(checked, work)
    for name in schema.names[len(ANSWER_FIELDS) :]:
        columns[name] = batch.column(name)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _repeat(value: Any, kind: pa.DataType, count: int) -> pa.Array:
    return pa.nulls(count, kind) if value is None else pa.repeat(pa.scalar(value, kind), count)


_repeat_short = lru_cache(maxsize=1024)(_repeat)


def repeated(value: Any, kind: pa.DataType, count: int) -> pa.Array:
    """A column of one value. Most batches are short and like the last, so that short columns are kept."""
    return (_repeat_short if count <= 64 else _repeat)(value, kind, count)


def _plain(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A column around an array's memory."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)], 0)


def status_columns(checked: CheckedBatch | CheckedRows, count: int) -> dict[str, pa.Array]:
    """The columns ``status`` and ``error`` of a batch whose failures are known."""
    if not checked.failures:
        return {"status": repeated("ok", pa.utf8(), count), "error": repeated(None, pa.utf8(), count)}
    status: list[str] = ["ok"] * count
    error: list[str | None] = [None] * count
    for i, (code, text) in checked.failures.items():
        status[i], error[i] = code, text
    return {"status": pa.array(status, pa.utf8()), "error": pa.array(error, pa.utf8())}


def _options(work: _Work) -> dict[str, pa.Array]:
    """What was really used, row by row: one value for each distinct spec, spread over the rows."""
    dtype = work.request.dtype
    values: dict[str, tuple[pa.DataType, list[Any]]] = {
        "scheme": (pa.utf8(), [spec.scheme.name for spec in work.specs]),
        "packing": (pa.utf8(), [spec.scheme.packing for spec in work.specs]),
        "bit_width": (pa.uint8(), [spec.scheme.bits for spec in work.specs]),
        "group_size": (pa.int32(), [spec.group_size for spec in work.specs]),
        "scale_dtype": (pa.utf8(), [spec.scale_dtype_for(dtype) for spec in work.specs]),
    }
    count = len(work.spec_of_row)
    if len(work.specs) == 1:
        return {name: repeated(each[0], kind, count) for name, (kind, each) in values.items()}
    rows = pa.array(work.spec_of_row)
    return {name: pa.array(each, kind).take(rows) for name, (kind, each) in values.items()}


def _outputs(work: _Work, ok: npt.NDArray[np.bool_] | None) -> dict[str, pa.Array]:
    floats = pa.list_(pa.float32())

    def floats_where(buffer: _Buffer, has: Callable[[LayerSpec], bool]) -> pa.Array:
        """The memory as lists; null in rows that failed and in those whose spec has no such thing."""
        having = [has(spec) for spec in work.specs]
        if not any(having):
            return repeated(None, floats, len(work.spec_of_row))
        valid = ok
        if not all(having):
            mine = np.array(having)[work.spec_of_row]
            valid = mine if ok is None else mine & ok
        return buffer.as_lists(floats, pa.float32(), valid)

    return {
        "quantized_data": work.data.as_lists(pa.binary(), None, ok),
        "scales": floats_where(work.scales, lambda spec: not spec.scheme.block_bytes),
        "zero_points": floats_where(work.zeros, lambda spec: not spec.symmetric),
    }


def _quality(work: _Work, ok: npt.NDArray[np.bool_] | None, metrics: bool) -> dict[str, pa.Array]:
    names = ("sqnr_db", "cosine", "max_abs_error")
    count = len(work.spec_of_row)
    if not metrics:
        return {name: repeated(None, pa.float32(), count) for name in names}
    columns = [np.empty(count, np.float32) for _ in names]
    quality_columns(work.row_sums, *columns)
    if ok is None:
        return {name: _plain(column, pa.float32()) for name, column in zip(names, columns, strict=True)}
    return {name: pa.array(column, pa.float32(), mask=~ok) for name, column in zip(names, columns, strict=True)}


def _cost(checked: CheckedBatch, work: _Work) -> dict[str, pa.Array]:
    count = len(work.spec_of_row)
    kernel_ns = work.nanoseconds
    if len(work.rows) != count:
        kernel_ns = np.zeros(count, np.int64)
        kernel_ns[work.rows] = work.nanoseconds
    return {
        "kernel_ns": _plain(kernel_ns, pa.int64()),
        "bytes_in": _plain(checked.lengths * work.request.value_bytes, pa.int64()),
        "bytes_out": _plain(work.bytes_out, pa.int64()),
        "bytes_copied": repeated(0, pa.int64(), count),
    }
