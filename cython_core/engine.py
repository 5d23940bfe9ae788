"""RecordBatch in, RecordBatch out: checks, plan, kernels, answer. Knows Arrow, not Flight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._quantize import DTYPES, FAMILIES, JOB_FIELDS, Plan, active_isa, available_isas
from flightquant.cython_core.answer import build_answer, with_nulls
from flightquant.cython_core.budget import ThreadBudget, available_cpus
from flightquant.cython_core.validate import (
    VALUE_BYTES,
    CheckedBatch,
    Limits,
    check_batch,
    check_parts,
    read_global_amax,
    read_overrides,
)
from flightquant.errors import DeadlineError, InvalidRequestError, LayerError, TooLargeError, clip_text
from flightquant.reference import packed_bytes
from flightquant.spec import Command, LayerSpec
from flightquant.wire import EndMessage, answer_schema, check_request_schema

__all__ = ["Answer", "Engine", "Limits", "Session"]

SLICE_TILES = 64
"""Tiles between two looks at ``should_stop`` and at other callers: 16 MiB of float32, a few milliseconds."""
MAX_ANSWER_BYTES = 2**31 - 1
_COLUMN = {name: index for index, name in enumerate(JOB_FIELDS)}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered batch.

    Attributes
    ----------
    batch : RecordBatch
        The contract's answer columns, one row for each request row.
    sums : float64 array of shape (rows, 4)
        Each row's quality sums (``reference.quality``), from which the quality of a layer in parts can be joined.
    seconds : dict
        Time of the stages ``validate``, ``queue`` (waiting for the thread budget) and ``kernel``.
    """

    batch: pa.RecordBatch
    sums: npt.NDArray[np.float64]
    seconds: dict[str, float]


class Engine:
    """The kernels with a thread budget: one for a process, shared by all its calls.

    Parameters
    ----------
    n_threads : int, optional
        Compute threads; by default the CPUs that the process may use.
    isa : str, optional
        Instruction set; by default the active one.
    """

    def __init__(self, n_threads: int | None = None, isa: str | None = None) -> None:
        threads = available_cpus() if n_threads is None else n_threads
        if threads < 1:
            raise InvalidRequestError(
                f"n_threads is {threads}; expected 1 or more", field="n_threads", got=threads, expected="1 or more"
            )
        if isa is not None and isa not in available_isas():
            raise InvalidRequestError(
                f'isa is "{isa}"; expected one of {", ".join(available_isas())} on this machine',
                field="isa",
                got=isa,
                expected=available_isas(),
            )
        self.isa = isa or active_isa()
        self._budget = ThreadBudget(threads)

    @property
    def n_threads(self) -> int:
        """Compute threads."""
        return self._budget.n_threads

    def session(self, schema: pa.Schema, command: Command, limits: Limits | None = None) -> Session:
        """The start of one call.

        Raises
        ------
        InvalidRequestError
            The schema is not the contract's.
        """
        return Session(self, schema, command, Limits() if limits is None else limits)

    def run(self, plan: Plan, should_stop: Callable[[], bool] | None) -> dict[str, float]:
        """Run a plan in slices, taking turns with other callers; the seconds spent waiting and computing."""
        seconds = {"queue": 0.0, "kernel": 0.0}

        def in_slices(step: Callable[[int, int, int], None], tiles: int) -> None:
            for first in range(0, tiles, SLICE_TILES):
                if should_stop is not None and should_stop():
                    raise DeadlineError("the call was cancelled or its time is over", field="deadline")
                last = min(first + SLICE_TILES, tiles)
                asked = time.perf_counter()
                started = ended = asked

                def work(n_threads: int, first: int = first, last: int = last) -> None:
                    nonlocal started, ended
                    started = time.perf_counter()
                    step(first, last, n_threads)
                    ended = time.perf_counter()

                self._budget.run(last - first, work)
                seconds["queue"] += started - asked
                seconds["kernel"] += ended - started

        in_slices(plan.reduce, plan.reduce_tiles)
        plan.parameters()
        in_slices(plan.quantize, plan.tiles)
        return seconds

    def close(self) -> None:
        """Release the compute threads."""
        self._budget.close()


class Session:
    """One call: its command, its limits and what it has done so far.

    Attributes
    ----------
    schema : Schema
        Of the answer batches.
    end : EndMessage
        Totals of all answered batches.
    """

    def __init__(self, engine: Engine, schema: pa.Schema, command: Command, limits: Limits) -> None:
        self._engine = engine
        self._request_schema = schema
        self._command = command
        self._limits = limits
        self.dtype = check_request_schema(schema)
        self.schema = answer_schema(schema)
        self.end = EndMessage()

    def quantize(self, batch: pa.RecordBatch, should_stop: Callable[[], bool] | None = None) -> Answer:
        """Answer one batch.

        Raises
        ------
        InvalidRequestError, TooLargeError
            The batch as a whole breaks the contract or a limit.
        LayerError
            A layer is bad and the command says ``on_error: abort``.
        DeadlineError
            ``should_stop`` returned true; it is asked every few milliseconds.
        """
        start = time.perf_counter()
        if batch.schema != self._request_schema:
            raise InvalidRequestError("the schema changed within the stream", field="schema", expected="one schema")
        checked = check_batch(batch, self.dtype, self._limits)
        check_parts(batch)
        self._check_call_bytes(checked)
        work = _Work(batch, checked, self._command, self.dtype)
        self._abort_on(checked)
        seconds = {"validate": time.perf_counter() - start, "queue": 0.0, "kernel": 0.0}
        if work.jobs.shape[0]:
            plan = Plan(work.jobs, work.given_amax, self._engine.isa)
            seconds |= self._engine.run(plan, should_stop)
            plan.finish(work.sums, work.first_bad, work.nanoseconds)
        work.note_non_finite()
        self._abort_on(checked)
        answer = build_answer(batch, checked, work, self._command, self.schema)
        self._add_up(answer, checked)
        return Answer(answer, work.row_sums, seconds)

    def _check_call_bytes(self, checked: CheckedBatch) -> None:
        limit = self._limits.max_call_bytes
        total = self.end.bytes_in + int(checked.lengths.sum()) * VALUE_BYTES[self.dtype]
        if limit is not None and total > limit:
            raise TooLargeError(
                f"the call has sent {total} bytes of weights; expected at most {limit}",
                field="weights",
                got=total,
                expected=limit,
            )

    def _abort_on(self, checked: CheckedBatch) -> None:
        if self._command.on_error == "abort" and checked.failures:
            row = min(checked.failures)
            status, text = checked.failures[row]
            name = clip_text(checked.names[row].as_py(), 200)
            raise LayerError(status, f'layer "{name}" (row {self.end.rows + row}): {status}: {text}', got=status)

    def _add_up(self, answer: pa.RecordBatch, checked: CheckedBatch) -> None:
        self.end.rows += answer.num_rows
        self.end.batches += 1
        self.end.failed_rows += len(checked.failures)
        for name in ("bytes_in", "bytes_out", "bytes_copied", "kernel_ns"):
            total = int(answer.column(name).to_numpy().sum())
            setattr(self.end, name, getattr(self.end, name) + total)


class _Work:
    """One batch's jobs: what every row asks for, the output memory, the results.

    The jobs are the rows that can be quantized; ``rows`` holds their row indices. Every output buffer is one piece of
    memory for the whole batch, in row order, so that it becomes an Arrow column as it is.
    """

    def __init__(self, batch: pa.RecordBatch, checked: CheckedBatch, command: Command, dtype: str) -> None:
        self.checked = checked
        self.dtype = dtype
        self.specs: list[LayerSpec] = []
        self.spec_of_row = self._resolve(batch, command)
        amax = read_global_amax(batch, checked.failures)
        self._refuse_uneven()
        count = batch.num_rows
        good = np.ones(count, bool)
        good[list(checked.failures)] = False
        self.data_bytes, self.scale_count, self.zero_count = self._sizes(good)
        self.data = _Buffer(self.data_bytes, 1)
        self.scales = _Buffer(self.scale_count, 4)
        self.zeros = _Buffer(self.zero_count, 4)
        self.rows = np.flatnonzero(good & (checked.lengths > 0))
        self.jobs = self._jobs(command.metrics)
        self.given_amax = np.ascontiguousarray(amax[self.rows])
        self.sums = np.zeros((len(self.rows), 4))
        self.first_bad = np.full(len(self.rows), -1, np.int64)
        self.nanoseconds = np.zeros(len(self.rows), np.int64)

    def _resolve(self, batch: pa.RecordBatch, command: Command) -> npt.NDArray[np.int64]:
        """Index into ``specs`` of every row; a row that asks for what does not exist fails."""
        overrides = read_overrides(batch)
        self.specs.append(command.layer_spec())
        chosen = np.zeros(batch.num_rows, np.int64)
        if overrides is None:
            return chosen
        known: dict[LayerSpec, int] = {self.specs[0]: 0}
        for i, given in enumerate(overrides):
            if not given:
                continue
            try:
                spec = command.override(given).layer_spec()
            except InvalidRequestError as error:
                self.checked.failures.setdefault(i, ("unsupported", error.message))
                continue
            chosen[i] = known.setdefault(spec, len(known))
            if chosen[i] == len(self.specs):
                self.specs.append(spec)
        return chosen

    def _refuse_uneven(self) -> None:
        """A group never crosses a row, so it must divide it."""
        sizes = np.array([spec.group_size or 1 for spec in self.specs])[self.spec_of_row]
        cols = self.checked.matrix[:, 1]
        for i in np.flatnonzero((cols > 0) & (cols % sizes != 0)):
            spec = self.specs[self.spec_of_row[i]]
            text = (
                f"a row of {cols[i]} weights is no multiple of {spec.scheme.name}'s group size {sizes[i]}; expected "
                f"a last axis that {sizes[i]} divides, or another granularity or scheme"
            )
            self.checked.failures.setdefault(int(i), ("unsupported", text))

    def _sizes(
        self, good: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bytes of packed data, scales and zero points of every row; 0 for rows that failed or are empty."""
        rows, cols = self.checked.matrix[:, 0], self.checked.matrix[:, 1]
        data, scales, zeros = (np.zeros(len(rows), np.int64) for _ in range(3))
        for index, spec in enumerate(self.specs):
            mine = np.flatnonzero((self.spec_of_row == index) & good & (self.checked.lengths > 0))
            if not mine.size:
                continue
            data[mine] = packed_bytes(spec, rows[mine], cols[mine])
            if spec.scheme.block_bytes:
                continue
            if spec.granularity == "tensor":
                scales[mine] = 1
            else:
                scales[mine] = rows[mine] * (cols[mine] // spec.group_size if spec.group_size else 1)
            zeros[mine] = 0 if spec.symmetric else scales[mine]
        return data, scales, zeros

    def _jobs(self, measure: bool) -> npt.NDArray[np.int64]:
        """The plan's job matrix, column by column."""
        rows, checked = self.rows, self.checked
        jobs = np.zeros((len(rows), len(JOB_FIELDS)), np.int64)

        def fill(name: str, values: Any) -> None:
            jobs[:, _COLUMN[name]] = values

        cols = checked.matrix[rows, 1]
        fill("weights", checked.starts[rows])
        fill("n", checked.lengths[rows])
        fill("cols", cols)
        fill("measure", measure)
        fill("data", self.data.address + self.data.offsets[rows])
        fill("data_bytes", self.data_bytes[rows])
        fill("scale_count", self.scale_count[rows])
        fill("row_bytes", self.data_bytes[rows] // np.maximum(checked.matrix[rows, 0], 1))
        for index, spec in enumerate(self.specs):
            mine = np.flatnonzero(self.spec_of_row[rows] == index)
            options = {
                "family": FAMILIES[spec.scheme.name],
                "dtype": DTYPES[self.dtype],
                "arithmetic": DTYPES[spec.arithmetic_for(self.dtype)],
                "scale_dtype": DTYPES[spec.scale_dtype_for(self.dtype)],
                "bits": spec.scheme.bits,
                "symmetric": spec.symmetric,
                "shared_scale": spec.granularity == "tensor",
            }
            for name, value in options.items():
                jobs[mine, _COLUMN[name]] = value
            jobs[mine, _COLUMN["unit"]] = spec.group_size or cols[mine]
            if not spec.scheme.block_bytes:
                jobs[mine, _COLUMN["scales"]] = self.scales.address + self.scales.offsets[rows[mine]] * 4
            if not spec.symmetric:
                jobs[mine, _COLUMN["zeros"]] = self.zeros.address + self.zeros.offsets[rows[mine]] * 4
        return jobs

    def note_non_finite(self) -> None:
        """Turn rows in which the kernels met NaN or infinity into failures."""
        for k in np.flatnonzero(self.first_bad >= 0):
            text = f"weight {self.first_bad[k]} is NaN or infinite as float32; expected finite weights"
            self.checked.failures.setdefault(int(self.rows[k]), ("non_finite", text))
            self.sums[k] = 0

    @cached_property
    def row_sums(self) -> npt.NDArray[np.float64]:
        """Quality sums of every row of the batch, of shape (rows, 4)."""
        sums = np.zeros((len(self.checked.lengths), 4))
        sums[self.rows] = self.sums
        return sums


class _Buffer:
    """Memory from Arrow's pool for one output column: rows of ``counts`` values of ``width`` bytes."""

    def __init__(self, counts: npt.NDArray[np.int64], width: int) -> None:
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        nbytes = int(self.offsets[-1]) * width
        if nbytes > MAX_ANSWER_BYTES:
            raise TooLargeError(
                f"the answer to one batch would have {nbytes} bytes; expected at most {MAX_ANSWER_BYTES} "
                "(send fewer layers at a time, or a layer in parts with row_offset)",
                field="weights",
                got=nbytes,
                expected=MAX_ANSWER_BYTES,
            )
        self.buffer = pa.allocate_buffer(nbytes)
        self.address = self.buffer.address

    def as_lists(self, kind: pa.DataType, values: pa.DataType | None, valid: npt.NDArray[np.bool_]) -> pa.Array:
        """The memory as a column of ``kind``: binary, or a list of ``values``; null where not ``valid``."""
        offsets = pa.py_buffer(self.offsets.astype(np.int32))
        mask, nulls = with_nulls(valid)
        if values is None:
            return pa.Array.from_buffers(kind, len(valid), [mask, offsets, self.buffer], nulls)
        child = pa.Array.from_buffers(values, int(self.offsets[-1]), [None, self.buffer])
        return pa.Array.from_buffers(kind, len(valid), [mask, offsets], nulls, children=[child])
