"""RecordBatch in, RecordBatch out: checks, plan, kernels, answer. Knows Arrow, not Flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._kernels import active_isa, available_isas
from flightquant.cython_core._quantize import Plan
from flightquant.cython_core.answer import build_answer
from flightquant.cython_core.budget import ThreadBudget, available_cpus
from flightquant.cython_core.plain import plain_call
from flightquant.cython_core.validate import CheckedBatch, Limits, Request, check_content, check_frame, checked_layers
from flightquant.cython_core.work import Work
from flightquant.errors import DeadlineError, InvalidRequestError, LayerError, TooLargeError, clip_text
from flightquant.layers import Layer, weights_field
from flightquant.schemes import WEIGHT_DTYPES
from flightquant.spec import Command
from flightquant.wire import EndMessage, answer_schema

if TYPE_CHECKING:
    from flightquant.cython_core._plain import PlainCall, PlainWork
    from flightquant.cython_core.validate_quantized import CheckedRows

__all__ = ["Answer", "Engine", "Limits", "Session"]

SLICE_TILES = 128
"""Most tiles between two looks at ``should_stop`` and at other callers: 32 MiB of float32, a few milliseconds."""
FIRST_SLICE_TILES = 40
"""The first slice, from whose time the others follow: the whole of a batch of 10 MiB."""
SLICE_S = 0.005
"""What a slice should take at most: formats that search need 10 to 50 times as long for a tile as others."""
MAX_KNOWN_COLUMNS, MAX_KNOWN_BYTES = 64, 16384
"""Of a schema that is remembered from call to call."""
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
    layers : list of (str, str, int, int), optional
        Of a usual batch, for each row its name, scheme, nanoseconds and bytes of weights, as ``costs`` has them.
    """

    batch: pa.RecordBatch
    sums: npt.NDArray[np.float64] | None
    seconds: dict[str, float]
    costs: pa.RecordBatch
    totals: EndMessage
    layers: list[tuple[str, str, int, int]] | None = None


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
        request, answer = _read_schema(schema)
        limits = limits or Limits()
        return Session(self, request, answer, command, limits, plain_call(request, answer, command, limits, self.isa))

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
        if first:
            self.in_slices(plan.reduce, first, should_stop, seconds, lambda share: told(share * first / total))
        if plan.search_tiles:
            self.in_slices(plan.search, plan.search_tiles, should_stop, seconds)
        plan.parameters()
        self.in_slices(
            plan.quantize, plan.tiles, should_stop, seconds, lambda share: told((first + share * plan.tiles) / total)
        )
        for step, tiles in ((plan.repack, plan.repack_tiles), (plan.nest, plan.nested), (plan.compare, plan.compared)):
            if tiles:
                self.in_slices(step, tiles, should_stop, seconds)
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
        first, count = 0, min(FIRST_SLICE_TILES, SLICE_TILES)
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

            self._budget.run(tiles, work, alone=self._alone)
            seconds["queue"] += started - asked
            seconds["kernel"] += ended - started
            if between is not None:
                between(last / tiles)
            fitting = SLICE_S * (last - first) / max(ended - started, 1e-9)
            count = min(max(int(fitting), self.n_threads), SLICE_TILES)
            first = last

    def close(self) -> None:
        """Release the compute threads."""
        self._budget.close()


@lru_cache(maxsize=len(WEIGHT_DTYPES))
def _own_request(dtype: str) -> tuple[Request, pa.Schema]:
    """Request and answer schema of layers that come without a batch."""
    schema = pa.schema([pa.field("layer_name", pa.utf8()), weights_field(dtype)])
    return Request(schema), answer_schema(schema)


class _Schema:
    """A schema that is the same as another if all that is sent of it is, metadata included."""

    def __init__(self, schema: pa.Schema, sent: bytes) -> None:
        self.schema = schema
        self._sent = sent

    def __hash__(self) -> int:
        return hash(self._sent)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Schema) and self._sent == other._sent


def _read_schema(schema: pa.Schema) -> tuple[Request, pa.Schema]:
    """What a schema says about a call's batches, and the schema of their answers."""
    if len(schema) <= MAX_KNOWN_COLUMNS:
        sent = schema.serialize().to_pybytes()
        if len(sent) <= MAX_KNOWN_BYTES:
            return _known_schema(_Schema(schema, sent))
    return Request(schema), answer_schema(schema)


@lru_cache(maxsize=64)
def _known_schema(known: _Schema) -> tuple[Request, pa.Schema]:
    """That of one of the last calls: most calls have the same."""
    return Request(known.schema), answer_schema(known.schema)


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

    def __init__(
        self,
        engine: Engine,
        request: Request,
        schema: pa.Schema,
        command: Command,
        limits: Limits,
        plain: PlainCall | None = None,
    ) -> None:
        self._engine = engine
        self._plain = plain
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
        check_frame(batch, self._request.schema, self._limits)
        plain = None if self._plain is None else self._plain.read(batch)
        if plain is not None:
            self._check_call_bytes(plain.weights)
            answer = self._answer_plain(plain, batch.num_rows, start, should_stop)
            if answer is not None:
                return answer
        checked = check_content(batch, self._request, self._limits)
        self._check_call_bytes(checked.total)
        return self.answer(batch, checked, start, should_stop)

    def _answer_plain(
        self, plain: PlainWork, rows: int, start: float, should_stop: Callable[[], bool] | None
    ) -> Answer | None:
        """Answer a usual batch; None if one of its layers turns out to be bad."""
        seconds = {"validate": time.perf_counter() - start} | self._engine.run(plain.plan, should_stop, None)
        answer = plain.finish()
        if answer is None:
            return None
        bytes_in = plain.weights * self.value_bytes
        totals = EndMessage(rows, 1, bytes_in, plain.bytes_out, kernel_ns=plain.kernel_ns)
        self.end.add(totals)
        return Answer(answer, plain.sums, seconds, answer, totals, plain.layers)

    def answer(
        self,
        batch: pa.RecordBatch,
        checked: CheckedBatch,
        start: float,
        should_stop: Callable[[], bool] | None,
        between: Between | None = None,
    ) -> Answer:
        """Answer a batch that has passed its checks, which began at ``start`` on the clock of ``perf_counter``."""
        work = Work(batch, checked, self._command, self._request)
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

    def _check_call_bytes(self, weights: int) -> None:
        limit = self._limits.max_call_bytes
        if limit is None:
            return
        total = self.end.bytes_in + weights * self.value_bytes
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
