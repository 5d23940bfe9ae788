"""Quantized rows back to weights, or compared with the weights that they were made of. Knows Arrow, not Flight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._dequantize import RESTORE_FIELDS, Restorer
from flightquant.cython_core._kernels import DTYPES, FAMILIES, PACKINGS
from flightquant.cython_core._memory import MIN_BYTES, OutputMemory
from flightquant.cython_core.answer import NO_SCHEME, good_rows, quality, status_columns
from flightquant.cython_core.engine import Answer, Engine, abort_on
from flightquant.cython_core.output import Buffer
from flightquant.cython_core.validate import VALUE_BYTES, Limits
from flightquant.cython_core.validate_quantized import CheckedRows, Ints, QuantizedRequest, check_rows
from flightquant.errors import TooLargeError
from flightquant.reference import packed_bytes, unit_length
from flightquant.spec import Command
from flightquant.wire import RESTORED_VALUES, EndMessage, restored_schema, verified_schema

_STORAGE = {"float32": np.float32, "float16": np.float16}


@dataclass(slots=True)
class Results:
    """What came of the rows of one batch: quality sums, nanoseconds of work, seconds of each stage."""

    sums: npt.NDArray[np.float64]
    nanoseconds: Ints
    seconds: dict[str, float]


def restore(
    engine: Engine,
    checked: CheckedRows,
    targets: Ints,
    target_dtype: str,
    weights_dtype: str | None,
    should_stop: Callable[[], bool] | None,
) -> Results:
    """Restore every row that is good and not empty.

    Parameters
    ----------
    targets : int64 array of shape (rows,)
        Address to which each row's weights are written; 0 for rows that are only compared.
    target_dtype : {"float32", "float16"}
        Of the weights written.
    weights_dtype : str or None
        Of the weights to compare with, if there are any; a row whose weights are not finite becomes a failure.
    """
    rows = len(checked.matrix)
    results = Results(np.zeros((rows, 4)), np.zeros(rows, np.int64), {"queue": 0.0, "kernel": 0.0})
    first_bad = np.full(rows, -1, np.int64)
    todo = np.flatnonzero(checked.lengths)
    if todo.size:
        jobs = _jobs(checked, todo, targets, target_dtype, weights_dtype)
        plan = Restorer(jobs, engine.isa, checked)
        engine.in_slices(plan.unpack, plan.unpack_tiles, should_stop, results.seconds)
        engine.in_slices(plan.run, plan.tiles, should_stop, results.seconds)
        sums, bad, spent = np.empty((todo.size, 4)), np.empty(todo.size, np.int64), np.empty(todo.size, np.int64)
        plan.finish(sums, bad, spent)
        results.sums[todo], first_bad[todo], results.nanoseconds[todo] = sums, bad, spent
    for i in np.flatnonzero(first_bad >= 0):
        text = f"weight {first_bad[i]} is NaN or infinite as float32; expected finite weights"
        checked.failures.setdefault(int(i), ("non_finite", text))
        results.sums[i] = 0
    return results


def _jobs(
    checked: CheckedRows, rows: Ints, targets: Ints, target_dtype: str, weights_dtype: str | None
) -> npt.NDArray[np.int64]:
    """The kernels' jobs of these rows, in their order."""
    jobs = np.zeros((rows.size, len(RESTORE_FIELDS)), np.int64)
    columns = {name: jobs[:, k] for k, name in enumerate(RESTORE_FIELDS)}
    columns["data"][:] = checked.data.addresses[rows]
    for name, cells in (("scales", checked.scales), ("zeros", checked.zeros)):
        columns[name][:] = np.where(cells.counts[rows] >= 0, cells.addresses[rows], 0)
    columns["restored"][:] = targets[rows]
    columns["restored_dtype"][:] = DTYPES[target_dtype]
    if checked.weights is not None and weights_dtype is not None:
        columns["weights"][:] = checked.weights.addresses[rows]
        columns["dtype"][:] = DTYPES[weights_dtype]
    columns["n"][:] = checked.lengths[rows]
    cols = columns["cols"]
    cols[:] = checked.matrix[rows, 1]
    for s, spec in enumerate(checked.specs):
        here = checked.spec_of_row[rows] == s
        if not here.any():
            continue
        columns["family"][here] = FAMILIES[spec.scheme.family]
        columns["bits"][here] = spec.scheme.bits
        columns["shared_scale"][here] = spec.granularity == "tensor"
        columns["in_blocks"][here] = spec.granularity == "block"
        columns["packing"][here] = PACKINGS.get(spec.scheme.packing, 0)
        columns["unit"][here] = unit_length(spec, cols[here])
        columns["group"][here] = spec.group_size if spec.granularity == "group" else cols[here]
        if spec.scheme.rule == "onnx" or spec.scheme.transposed:  # their zero points stand behind all rows
            columns["row_bytes"][here] = spec.scheme.row_bytes(cols[here])
        elif not spec.scheme.flat:
            columns["row_bytes"][here] = packed_bytes(spec, np.ones_like(cols[here]), cols[here])
    return jobs


class QuantizedSession:
    """One call that brings quantized rows: ``op: dequantize`` or ``op: verify``.

    Attributes
    ----------
    schema : Schema
        Of the answer batches.
    end : EndMessage
        Totals of all answered batches.
    value_bytes : int
        Bytes of one weight as answered, or as sent to compare with.
    """

    def __init__(self, engine: Engine, schema: pa.Schema, command: Command, limits: Limits) -> None:
        self._engine = engine
        self._request = QuantizedRequest(schema, command.op)
        self._command = command
        self._limits = limits
        self._weight_bytes = 0
        self._verifies = command.op == "verify"
        self.value_bytes: int = VALUE_BYTES[self._request.dtype or command.dtype]
        self.schema = verified_schema(schema) if self._verifies else restored_schema(schema, command.dtype)
        self.end = EndMessage()

    def answer(self, batch: pa.RecordBatch, should_stop: Callable[[], bool] | None = None) -> Answer:
        """Answer one batch.

        Raises
        ------
        InvalidRequestError, TooLargeError
            The batch as a whole breaks the contract or a limit.
        LayerError
            A row is bad and the command says ``on_error: abort``.
        DeadlineError
            ``should_stop`` returned true; it is asked every few milliseconds.
        """
        start = time.perf_counter()
        checked = check_rows(batch, self._request, self._command, self._limits, self.value_bytes)
        weight_bytes = checked.lengths * self.value_bytes
        self._check_call_bytes(int(weight_bytes.sum()))
        abort_on(checked, self._command, self.end.rows)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(checked.lengths)])
        output, targets = None, np.zeros(batch.num_rows, np.int64)
        if not self._verifies:
            output = Buffer(offsets, self.value_bytes, "quantized_data", "send fewer rows at a time")
            targets = output.address + offsets[:-1] * self.value_bytes
        seconds = {"validate": time.perf_counter() - start}
        results = restore(self._engine, checked, targets, self._command.dtype, self._request.dtype, should_stop)
        abort_on(checked, self._command, self.end.rows)
        columns = {"layer_name": checked.names, "shape": checked.shapes, **status_columns(checked, batch.num_rows)}
        good = good_rows(checked, batch.num_rows)
        if output is None:
            columns |= quality(results.sums, good)
        else:
            values = RESTORED_VALUES[self._command.dtype]
            columns["weights"] = output.as_lists(pa.list_(values), values, good)
        for name in self.schema.names[len(columns) :]:
            columns[name] = batch.column(name)
        made = pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
        schemes = np.array([spec.scheme.name for spec in checked.specs] or [NO_SCHEME])
        scheme_of_row = checked.spec_of_row if checked.specs else np.zeros(batch.num_rows, np.int64)
        costs = {
            **{name: columns[name] for name in ("layer_name", "status")},
            "scheme": pa.array(schemes[scheme_of_row], pa.utf8()),
            "kernel_ns": pa.array(results.nanoseconds),
            "bytes_in": pa.array(weight_bytes),
        }
        sums = results.sums if self._verifies else None
        totals = self._add_up(checked, results, weight_bytes)
        return Answer(made, sums, seconds | results.seconds, pa.RecordBatch.from_pydict(costs), totals)

    def _check_call_bytes(self, nbytes: int) -> None:
        self._weight_bytes += nbytes
        limit = self._limits.max_call_bytes
        if limit is not None and self._weight_bytes > limit:
            raise TooLargeError(
                f"the call stands for {self._weight_bytes} bytes of weights; expected at most {limit}",
                field="quantized_data",
                got=self._weight_bytes,
                expected=limit,
            )

    def _add_up(self, checked: CheckedRows, results: Results, weight_bytes: Ints) -> EndMessage:
        """The totals of a batch, which also join those of the call."""
        brought, made = int(checked.bytes_in.sum()), int(weight_bytes.sum())
        batch = EndMessage(
            rows=len(weight_bytes),
            batches=1,
            bytes_in=brought + made if self._verifies else brought,
            bytes_out=0 if self._verifies else made,
            kernel_ns=int(results.nanoseconds.sum()),
            failed_rows=len(checked.failures),
        )
        self.end.add(batch)
        return batch


def restore_arrays(
    engine: Engine, batch: pa.RecordBatch, command: Command, limits: Limits
) -> tuple[CheckedRows, list[npt.NDArray[Any]]]:
    """Every row's weights as an array of its own memory and shape, in this process; nothing useful for a bad row."""
    checked = check_rows(batch, QuantizedRequest(batch.schema, "dequantize"), command, limits, 1)
    dtype = np.dtype(_STORAGE[command.dtype])
    arrays: list[npt.NDArray[Any]] = []
    for i, length in enumerate(checked.lengths.tolist()):
        shape = (0,) if i in checked.failures else tuple(checked.shapes[i].as_py())
        nbytes = length * dtype.itemsize
        memory = bytearray(nbytes) if nbytes < MIN_BYTES else pa.py_buffer(OutputMemory(nbytes))
        flat = np.frombuffer(memory, dtype)
        try:
            arrays.append(flat.reshape(shape))
        except ValueError:  # an empty layer of which another extent is too large for an array
            checked.failures[i] = ("shape_mismatch", f"shape {list(shape)}; expected extents that an array can have")
            arrays.append(flat)
    targets = np.array([array.ctypes.data for array in arrays], np.int64)
    restore(engine, checked, targets, command.dtype, None, None)
    return checked, arrays
