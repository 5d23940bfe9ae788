"""``op: amax``: the largest magnitude of each layer, for scales that several layers or parts share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from flightquant.cython_core._quantize import JOB_WIDTH, Plan, lay_out
from flightquant.cython_core.answer import NO_SCHEME, good_rows, status_columns
from flightquant.cython_core.engine import Answer, Between, Engine, Session
from flightquant.cython_core.validate import CheckedBatch, Limits, Request, checked_layers
from flightquant.cython_core.work import spec_table
from flightquant.layers import Layer, weights_field
from flightquant.spec import Command
from flightquant.wire import amax_schema

# Ranges are what a scale of the whole tensor begins with.
_TENSOR = Command.build(scheme="int8", granularity="tensor").layer_spec()


class AmaxSession(Session):
    """One call that asks for magnitudes."""

    def __init__(self, engine: Engine, schema: pa.Schema, command: Command, limits: Limits) -> None:
        super().__init__(engine, Request(schema), amax_schema(schema), command, limits)

    def answer(
        self,
        batch: pa.RecordBatch,
        checked: CheckedBatch,
        start: float,
        should_stop: Callable[[], bool] | None,
        between: Between | None = None,
    ) -> Answer:
        """Answer a batch that has passed its checks."""
        self._abort_on(checked)
        count = batch.num_rows
        failed = np.zeros(count, np.uint8)
        failed[list(checked.failures)] = 1
        jobs, rows = np.empty((count, JOB_WIDTH), np.int64), np.empty(count, np.int64)
        made, *_ = lay_out(
            spec_table((_TENSOR,), self._request.dtype),
            np.zeros(count, np.int64),
            checked.starts,
            checked.lengths,
            np.zeros(count, np.int64),
            checked.matrix,
            failed,
            jobs,
            rows,
            np.empty((3, count + 1), np.int64),
            np.empty(count, np.int64),
        )
        # Only ranges are taken: nothing is written to the outputs, whose addresses are those of nothing.
        unknown = np.full(made, np.nan, np.float32)
        plan = Plan(jobs[:made], unknown, self._engine.isa, False, 0, 0, 0, 0, (checked, batch))
        seconds = {"validate": time.perf_counter() - start, "queue": 0.0, "kernel": 0.0}
        self._engine.in_slices(plan.reduce, plan.reduce_tiles, should_stop, seconds, between)
        found, first_bad = np.empty(made, np.float32), np.empty(made, np.int64)
        spent = np.empty(made, np.int64)
        plan.magnitudes(found, first_bad, spent)
        for k in np.flatnonzero(first_bad >= 0):
            text = f"weight {first_bad[k]} is NaN or infinite as float32; expected finite weights"
            checked.failures.setdefault(int(rows[k]), ("non_finite", text))
        self._abort_on(checked)
        amax, kernel_ns = np.zeros(count, np.float32), np.zeros(count, np.int64)
        amax[rows[:made]], kernel_ns[rows[:made]] = found, spent
        good = good_rows(checked, count)
        columns = {"layer_name": checked.names, "shape": checked.shapes, **status_columns(checked, count)}
        columns["amax"] = pa.array(amax, mask=None if good is None else ~good)
        columns["kernel_ns"] = pa.array(kernel_ns)
        columns["bytes_in"] = pa.array(checked.lengths * self._request.value_bytes)
        columns["row_offset"] = pa.nulls(count, pa.int64())
        for name in self.schema.names:
            if name in batch.schema.names and name not in ("layer_name", "shape"):
                columns[name] = batch.column(name)
        answer = pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
        costs = answer.append_column("scheme", pa.repeat(pa.scalar(NO_SCHEME), count))
        totals = self._add_up(checked, bytes_out=4 * count, kernel_ns=int(kernel_ns.sum()))
        return Answer(answer, None, seconds, costs, totals)


def amax_of_layers(engine: Engine, runs: Iterable[list[Layer]]) -> Iterator[pa.RecordBatch]:
    """Answer batches of runs of layers of one dtype, of this process's own memory."""
    command = Command.build(op="amax")
    for layers in runs:
        start = time.perf_counter()
        batch, checked = checked_layers(layers)
        schema = pa.schema([*batch.schema, weights_field(layers[0].dtype)])
        yield AmaxSession(engine, schema, command, Limits()).answer(batch, checked, start, None).batch
