"""The answer batch: the contract's columns around the kernels' output memory, without a copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core.validate import VALUE_BYTES, CheckedBatch
from flightquant.reference import quality
from flightquant.spec import Command, LayerSpec
from flightquant.wire import PASSTHROUGH_PREFIX

if TYPE_CHECKING:
    from flightquant.cython_core.engine import _Work


def with_nulls(valid: npt.NDArray[np.bool_]) -> tuple[pa.Buffer | None, int]:
    """Arrow's validity bitmap and null count; no bitmap where all is valid."""
    nulls = int(valid.size - np.count_nonzero(valid))
    return (pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls else None), nulls


def build_answer(
    batch: pa.RecordBatch, checked: CheckedBatch, work: _Work, command: Command, schema: pa.Schema
) -> pa.RecordBatch:
    """Answer rows for a request batch whose jobs are done."""
    count = batch.num_rows
    ok = np.ones(count, bool)
    ok[list(checked.failures)] = False
    columns: dict[str, pa.Array] = {"layer_name": checked.names, "shape": checked.shapes}
    if "row_offset" in batch.schema.names:
        columns["row_offset"] = batch.column("row_offset")
    else:
        columns["row_offset"] = pa.nulls(count, pa.int64())
    columns |= _status(checked, count)
    columns |= _options(work)
    columns |= _outputs(work, ok)
    columns |= _quality(work, ok if command.metrics else np.zeros(count, bool))
    columns |= _cost(checked, work, ok)
    for name in batch.schema.names:
        if name.startswith(PASSTHROUGH_PREFIX):
            columns[name] = batch.column(name)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _status(checked: CheckedBatch, count: int) -> dict[str, pa.Array]:
    if not checked.failures:
        return {"status": pa.repeat(pa.scalar("ok", pa.utf8()), count), "error": pa.nulls(count, pa.utf8())}
    status: list[str] = ["ok"] * count
    error: list[str | None] = [None] * count
    for i, (code, text) in checked.failures.items():
        status[i], error[i] = code, text
    return {"status": pa.array(status, pa.utf8()), "error": pa.array(error, pa.utf8())}


def _options(work: _Work) -> dict[str, pa.Array]:
    """What was really used, row by row: one value for each distinct spec, spread over the rows."""

    def spread(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        if len(values) == 1:
            return pa.repeat(pa.scalar(values[0], kind), len(work.spec_of_row))
        return pa.array(values, kind).take(pa.array(work.spec_of_row))

    def each(pick: Any) -> list[Any]:
        return [pick(spec) for spec in work.specs]

    def scale_dtype(spec: LayerSpec) -> str:
        return spec.scale_dtype_for(work.dtype)

    return {
        "scheme": spread(each(lambda spec: spec.scheme.name), pa.utf8()),
        "packing": spread(each(lambda spec: spec.scheme.packing), pa.utf8()),
        "bit_width": spread(each(lambda spec: spec.scheme.bits), pa.uint8()),
        "group_size": spread(each(lambda spec: spec.group_size), pa.int32()),
        "scale_dtype": spread(each(scale_dtype), pa.utf8()),
    }


def _outputs(work: _Work, ok: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    apart = np.array([not spec.scheme.block_bytes for spec in work.specs])[work.spec_of_row]
    asymmetric = np.array([not spec.symmetric for spec in work.specs])[work.spec_of_row]
    floats = pa.list_(pa.float32())
    return {
        "quantized_data": work.data.as_lists(pa.binary(), None, ok),
        "scales": work.scales.as_lists(floats, pa.float32(), ok & apart),
        "zero_points": work.zeros.as_lists(floats, pa.float32(), ok & asymmetric),
    }


def _quality(work: _Work, shown: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    names = ("sqnr_db", "cosine", "max_abs_error")
    return {
        name: pa.array(values, pa.float32(), mask=~shown)
        for name, values in zip(names, quality.columns(work.row_sums), strict=True)
    }


def _cost(checked: CheckedBatch, work: _Work, ok: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    count = len(ok)
    kernel_ns = np.zeros(count, np.int64)
    kernel_ns[work.rows] = work.nanoseconds
    bytes_out = np.where(ok, work.data_bytes + 4 * (work.scale_count + work.zero_count), 0)
    return {
        "kernel_ns": pa.array(kernel_ns),
        "bytes_in": pa.array(checked.lengths * VALUE_BYTES[work.dtype]),
        "bytes_out": pa.array(bytes_out),
        "bytes_copied": pa.array(np.zeros(count, np.int64)),
    }
