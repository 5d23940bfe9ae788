"""RecordBatch in, RecordBatch out: checks, plan, kernels, answer. Knows Arrow, not Flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._quantize import (
    DTYPES,
    FAMILIES,
    JOB_WIDTH,
    PACKINGS,
    Plan,
    active_isa,
    available_isas,
    lay_out,
)
from flightquant.cython_core.answer import build_answer
from flightquant.cython_core.budget import ThreadBudget, available_cpus
from flightquant.cython_core.output import Buffer, output_memory
from flightquant.cython_core.validate import (
    CheckedBatch,
    Limits,
    Request,
    check_batch,
    checked_layers,
    read_global_amax,
    read_importance,
    read_overrides,
)
from flightquant.errors import DeadlineError, InvalidRequestError, LayerError, TooLargeError, clip_text
from flightquant.layers import Layer, weights_field
from flightquant.reference import fits_transpose, whole_words
from flightquant.schemes import WEIGHT_DTYPES, LayerSpec
from flightquant.spec import Command
from flightquant.wire import EndMessage, answer_schema

if TYPE_CHECKING:
    from flightquant.cython_core.validate_quantized import CheckedRows

__all__ = ["Answer", "Engine", "Limits", "Session"]

SLICE_TILES = 128
"""Most tiles between two looks at ``should_stop`` and at other callers: 32 MiB of float32, a few milliseconds."""
SHORT_SLICE_TILES = 40
"""The first slice, and each one of a format that is slow: more tiles than ever run on their caller's thread."""
SLICE_S = 0.02
"""What a slice should take at most: formats that search need 10 to 50 times as long for a tile as others."""
Between = Callable[[float], None]
"""Told every few milliseconds how great a share of the work is done; what it raises ends the call."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered batch.

    Attributes
    ----------
    batch : RecordBatch
        The contract's answer columns, one row for each request row.
    sums : float64 array of shape (rows, 4)
        Each row's quality sums (``reference.quality``), from which the quality of a layer in parts can be joined;
        None where nothing was measured.
    seconds : dict
        Time of the stages ``validate``, ``queue`` (waiting for the thread budget) and ``kernel``.
    costs : RecordBatch
        Name, status and cost of each row: the answer itself where it has these columns.
    totals : EndMessage
        Of this batch alone.
    """

    batch: pa.RecordBatch
    sums: npt.NDArray[np.float64] | None
    seconds: dict[str, float]
    costs: pa.RecordBatch
    totals: EndMessage


class Engine:
    """The kernels with a thread budget: one for a process, shared by all its calls.

    Parameters
    ----------
    n_threads : int, optional
        Compute threads; by default the CPUs that the process may use.
    isa : str, optional
        Instruction set; by default the active one.
    inline_tiles : int, optional
        Batches of at most so many tiles (256 KiB of float32 each) are computed by the calling thread alone. A service
        whose cores are busy with transport anyway does better with more of them.
    """

    def __init__(self, n_threads: int | None = None, isa: str | None = None, inline_tiles: int = 4) -> None:
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
        self._budget = ThreadBudget(threads, inline_tiles)
        self._alone = False

    @property
    def n_threads(self) -> int:
        """Compute threads."""
        return self._budget.n_threads

    def beside(self) -> Engine:
        """This engine for callers that have a thread for each of several batches: each computes on its own.

        Of the same budget, one thread each: no team is woken and waited for every few milliseconds.
        """
        engine = copy(self)
        engine._alone = True
        return engine

    def session(self, schema: pa.Schema, command: Command, limits: Limits | None = None) -> Session:
        """The start of one call.

        Raises
        ------
        InvalidRequestError
            The schema is not the contract's.
        """
        return Session(self, Request(schema), answer_schema(schema), command, Limits() if limits is None else limits)

    def quantize_layers(self, layers: Sequence[Layer], command: Command, between: Between | None = None) -> Answer:
        """Answer layers of one dtype as one batch: this process's own, which may lie apart and need no checks.

        Raises
        ------
        TooLargeError
            The answer would have more bytes than a column can hold.
        LayerError
            A layer is bad and the command says ``on_error: abort``.
        """
        start = time.perf_counter()
        request, schema = _own_request(layers[0].dtype)
        batch, checked = checked_layers(layers)
        return Session(self, request, schema, command, Limits()).answer(batch, checked, start, None, between)

    def run(self, plan: Plan, should_stop: Callable[[], bool] | None, between: Between | None) -> dict[str, float]:
        """Run a plan in slices, taking turns with other callers; the seconds spent waiting and computing."""
        seconds = {"queue": 0.0, "kernel": 0.0}
        told = between or (lambda share: None)
        first, total = plan.reduce_tiles, plan.reduce_tiles + plan.tiles
        self.in_slices(plan.reduce, first, should_stop, seconds, lambda share: told(share * first / total))
        self.in_slices(plan.search, plan.search_tiles, should_stop, seconds)
        plan.parameters()
        self.in_slices(
            plan.quantize, plan.tiles, should_stop, seconds, lambda share: told((first + share * plan.tiles) / total)
        )
        self.in_slices(plan.repack, plan.repack_tiles, should_stop, seconds)
        self.in_slices(plan.nest, plan.nested, should_stop, seconds)
        self.in_slices(plan.compare, plan.compared, should_stop, seconds)
        return seconds

    def in_slices(
        self,
        step: Callable[[int, int, int], None],
        tiles: int,
        should_stop: Callable[[], bool] | None,
        seconds: dict[str, float],
        between: Between | None = None,
    ) -> None:
        """Call ``step(first, last, n_threads)`` over all tiles, some milliseconds' worth at a time.

        Parameters
        ----------
        seconds : dict
            To whose ``queue`` and ``kernel`` the time spent waiting and computing is added.
        between : callable, optional
            Told after each slice how great a share of the tiles is done.

        Raises
        ------
        DeadlineError
            ``should_stop`` returned true.
        """
        first, count = 0, min(SHORT_SLICE_TILES, SLICE_TILES)
        while first < tiles:
            # Not before the first slice: asking gRPC costs more than a small batch.
            if first and should_stop is not None and should_stop():
                raise DeadlineError("the call was cancelled or its time is over", field="deadline")
            last = min(first + count, tiles)
            asked = time.perf_counter()
            started = ended = asked

            def work(n_threads: int, first: int = first, last: int = last) -> None:
                nonlocal started, ended
                started = time.perf_counter()
                step(first, last, n_threads)
                ended = time.perf_counter()

            self._budget.run(last - first, work, alone=self._alone)
            seconds["queue"] += started - asked
            seconds["kernel"] += ended - started
            if between is not None:
                between(last / tiles)
            fitting = SLICE_S * (last - first) / max(ended - started, 1e-9)
            count = min(max(int(fitting), SHORT_SLICE_TILES), SLICE_TILES)
            first = last

    def close(self) -> None:
        """Release the compute threads."""
        self._budget.close()


@lru_cache(maxsize=len(WEIGHT_DTYPES))
def _own_request(dtype: str) -> tuple[Request, pa.Schema]:
    """Request and answer schema of layers that come without a batch."""
    schema = pa.schema([pa.field("layer_name", pa.utf8()), weights_field(dtype)])
    return Request(schema), answer_schema(schema)


def abort_on(checked: CheckedBatch | CheckedRows, command: Command, rows_before: int) -> None:
    """Raise LayerError for the first bad row if the command says ``on_error: abort``; it is counted from the call's."""
    if command.on_error == "abort" and checked.failures:
        row = min(checked.failures)
        status, text = checked.failures[row]
        name = clip_text(checked.names[row].as_py(), 200)
        raise LayerError(status, f'layer "{name}" (row {rows_before + row}): {status}: {text}', got=status)


class Session:
    """One call: its command, its limits and what it has done so far.

    Attributes
    ----------
    schema : Schema
        Of the answer batches.
    end : EndMessage
        Totals of all answered batches.
    value_bytes : int
        Bytes of one weight as sent.
    """

    def __init__(self, engine: Engine, request: Request, schema: pa.Schema, command: Command, limits: Limits) -> None:
        self._engine = engine
        self._request = request
        self._command = command
        self._limits = limits
        self.schema = schema
        self.end = EndMessage()
        self.value_bytes: int = self._request.value_bytes

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
        checked = check_batch(batch, self._request, self._limits)
        self._check_call_bytes(checked)
        return self.answer(batch, checked, start, should_stop)

    def answer(
        self,
        batch: pa.RecordBatch,
        checked: CheckedBatch,
        start: float,
        should_stop: Callable[[], bool] | None,
        between: Between | None = None,
    ) -> Answer:
        """Answer a batch that has passed its checks, which began at ``start`` on the clock of ``perf_counter``."""
        work = _Work(batch, checked, self._command, self._request)
        self._abort_on(checked)
        seconds = {"validate": time.perf_counter() - start, "queue": 0.0, "kernel": 0.0}
        if work.rows.size:
            plan = work.plan(self._engine.isa, self._command.metrics)
            seconds |= self._engine.run(plan, should_stop, between)
            failed, work.kernel_ns = plan.finish(work.sums, work.first_bad, work.unheld, work.nanoseconds)
            if failed:
                work.note_failures()
                self._abort_on(checked)
        answer = build_answer(batch, checked, work, self._command, self.schema)
        return Answer(answer, work.row_sums, seconds, answer, self._add_up(checked, work.total_out, work.kernel_ns))

    def _check_call_bytes(self, checked: CheckedBatch) -> None:
        limit = self._limits.max_call_bytes
        if limit is None:
            return
        total = self.end.bytes_in + checked.total * self._request.value_bytes
        if total > limit:
            raise TooLargeError(
                f"the call has sent {total} bytes of weights; expected at most {limit}",
                field="weights",
                got=total,
                expected=limit,
            )

    def _abort_on(self, checked: CheckedBatch) -> None:
        abort_on(checked, self._command, self.end.rows)

    def _add_up(self, checked: CheckedBatch, bytes_out: int, kernel_ns: int) -> EndMessage:
        """The totals of a batch, which also join those of the call."""
        batch = EndMessage(
            rows=len(checked.lengths),
            batches=1,
            bytes_in=checked.total * self.value_bytes,
            bytes_out=bytes_out,
            kernel_ns=kernel_ns,
            failed_rows=len(checked.failures),
        )
        self.end.add(batch)
        return batch


class _Work:
    """One batch's jobs: what every row asks for, the output memory, the results.

    The jobs are the rows that can be quantized; ``rows`` holds their row indices. Every output buffer is one piece of
    memory for the whole batch, in row order, so that it becomes an Arrow column as it is.
    """

    def __init__(self, batch: pa.RecordBatch, checked: CheckedBatch, command: Command, request: Request) -> None:
        self.checked = checked
        self.request = request
        self.specs: list[LayerSpec] = [command.layer_spec()]
        self._numbers = {self.specs[0]: 0}
        self.spec_of_row = self._resolve(read_overrides(batch, request), command)
        self._fall_back()
        amax = read_global_amax(batch, request, checked)
        importance, self._importance_holder = read_importance(batch, request, checked)
        self._refuse_uneven()
        count = batch.num_rows
        failed = np.zeros(count, np.uint8)
        if checked.failures:
            failed[list(checked.failures)] = 1
        jobs = np.empty((count, JOB_WIDTH), np.int64)
        rows = np.empty(count, np.int64)
        offsets = np.empty((3, count + 1), np.int64)
        self.bytes_out = np.empty(count, np.int64)
        made, scratch, self.total_out = lay_out(
            spec_table(tuple(self.specs), request.dtype),
            self.spec_of_row,
            checked.starts,
            checked.lengths,
            importance,
            checked.matrix,
            failed,
            jobs,
            rows,
            offsets,
            self.bytes_out,
        )
        self._jobs, self.rows = jobs[:made], rows[:made]
        self._given_amax = amax[self.rows]
        self.data, self.scales, self.zeros = (Buffer(offsets, k, width) for k, width in enumerate((1, 4, 4)))
        self.sums = np.zeros((made, 4))
        self.first_bad = np.empty(made, np.int64)
        self.unheld = np.empty(made, np.int64)
        self.nanoseconds = np.empty(made, np.int64)
        self.kernel_ns = 0
        self._scratch = output_memory(scratch)

    def plan(self, isa: str, measure: bool) -> Plan:
        """The kernels' plan of all jobs."""
        outputs = (self.data.address, self.scales.address, self.zeros.address, self._scratch.address)
        return Plan(self._jobs, self._given_amax, isa, measure, *outputs, self)

    def _resolve(self, overrides: Sequence[Mapping[str, Any]] | None, command: Command) -> npt.NDArray[np.int64]:
        """Index into ``specs`` of every row; a row that asks for what does not exist fails."""
        chosen = np.zeros(len(self.checked.lengths), np.int64)
        if overrides is None:
            return chosen
        for i, given in enumerate(overrides):
            if not given:
                continue
            try:
                spec = command.override(given).layer_spec()
            except InvalidRequestError as error:
                self.checked.failures.setdefault(i, ("unsupported", error.message))
                continue
            chosen[i] = self._number(spec)
        return chosen

    def _number(self, spec: LayerSpec) -> int:
        """Index of a spec in the list, to which it is added."""
        number = self._numbers.setdefault(spec, len(self.specs))
        if number == len(self.specs):
            self.specs.append(spec)
        return number

    def _fall_back(self) -> None:
        """Give rows that no block divides the scheme that takes the place of theirs, where that is asked for."""
        cols = self.checked.matrix[:, 1]
        for number in [k for k, spec in enumerate(self.specs) if spec.fallback]:
            spec = self.specs[number]
            for i in np.flatnonzero((self.spec_of_row == number) & (cols > 0) & (cols % spec.group_size != 0)):
                self.spec_of_row[i] = self._number(spec.fitting(int(cols[i])))

    def _refuse_uneven(self) -> None:
        """A group never crosses a row, so it must divide it, unless groups run over the flat tensor."""
        self._refuse_part_words()
        divisors = [_row_divisor(spec) for spec in self.specs]
        if divisors == [1]:
            return
        sizes = np.array(divisors)[self.spec_of_row]
        cols = self.checked.matrix[:, 1]
        for i in np.flatnonzero((cols > 0) & (cols % sizes != 0)):
            spec = self.specs[self.spec_of_row[i]]
            text = (
                f"a row of {cols[i]} weights is no multiple of {spec.scheme.name}'s group size {sizes[i]}; expected "
                f"a last axis that {sizes[i]} divides, or another granularity or scheme"
            )
            self.checked.failures.setdefault(int(i), ("unsupported", text))

    def _refuse_part_words(self) -> None:
        """Words over several rows need multiples of 32 in both axes, folded bytes as many groups in each part."""
        joining = [spec.scheme.transposed or spec.scheme.fold > 1 for spec in self.specs]
        if not any(joining):
            return
        for i in np.flatnonzero(np.array(joining)[self.spec_of_row]):
            rows, cols = map(int, self.checked.matrix[i])
            spec = self.specs[self.spec_of_row[i]]
            if not fits_transpose(spec, rows, cols):
                text = (
                    f"a matrix of {rows} x {cols} does not fill whole words of {spec.scheme.packing}; expected "
                    f"{whole_words(spec)}"
                )
                self.checked.failures.setdefault(int(i), ("unsupported", text))

    def note_failures(self) -> None:
        """Turn rows in which the kernels met NaN or infinity, or a zero point without a place, into failures."""
        for k in np.flatnonzero(self.first_bad >= 0):
            text = f"weight {self.first_bad[k]} is NaN or infinite as float32; expected finite weights"
            self.checked.failures.setdefault(int(self.rows[k]), ("non_finite", text))
        for k in np.flatnonzero(self.unheld >= 0):
            text = (
                f"zero point {self.unheld[k]} is 0, which GPTQ's first version cannot hold; expected packing "
                '"gptq-v2", symmetric codes, or weights below 0 in every group'
            )
            self.checked.failures.setdefault(int(self.rows[k]), ("unsupported", text))
        for k in np.flatnonzero((self.first_bad >= 0) | (self.unheld >= 0)):
            self.sums[k] = 0
            self.total_out -= int(self.bytes_out[self.rows[k]])
            self.bytes_out[self.rows[k]] = 0

    @cached_property
    def row_sums(self) -> npt.NDArray[np.float64]:
        """Quality sums of every row of the batch, of shape (rows, 4)."""
        if len(self.rows) == len(self.checked.lengths):
            return self.sums
        sums = np.zeros((len(self.checked.lengths), 4))
        sums[self.rows] = self.sums
        return sums


def _row_divisor(spec: LayerSpec) -> int:
    """What a row's length must be a multiple of."""
    if spec.scheme.row_tail:
        return 8 // spec.scheme.bits
    return spec.group_size if spec.granularity == "group" and not spec.scheme.flat else 1


@lru_cache(maxsize=256)
def spec_table(specs: tuple[LayerSpec, ...], dtype: str) -> npt.NDArray[np.int64]:
    """The specs as ``lay_out`` takes them, one row of SPEC_FIELDS each."""
    return np.array(
        [
            (
                FAMILIES[spec.scheme.family],
                DTYPES[dtype],
                DTYPES[spec.arithmetic_for(dtype)],
                DTYPES.get(spec.scale_dtype_for(dtype), DTYPES["float32"]),
                spec.scheme.bits,
                spec.symmetric,
                spec.granularity == "tensor",
                spec.group_size if spec.granularity == "group" else 0,
                spec.scheme.block_bytes,
                spec.scheme.flat,
                spec.granularity == "block",
                spec.scheme.stored_bits or spec.scheme.bits,
                0 if spec.scheme.stored_bits == spec.scheme.bits else PACKINGS.get(spec.scheme.packing, 0),
                spec.scheme.row_tail,
                spec.calibration == "mse",
            )
            for spec in specs
        ],
        np.int64,
    )
