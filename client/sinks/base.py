"""What every sink does: takes answer rows and tensors that stay as they are, and shows nothing before all is there."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from flightquant.client.recipes import Plan
from flightquant.client.sinks.work import Work
from flightquant.client.sources import Place, Source, Tensor
from flightquant.errors import FlightquantError, LayerError
from flightquant.layers import layer_class

LAYOUT_VERSION = 1
"""Changes when the same plan is laid out in other bytes; work begun under another one is not gone on with."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One quantized layer: its size before and after, its error and its cost."""

    name: str
    scheme: str
    weights: int
    bytes_in: int
    bytes_out: int
    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float | None
    kernel_ns: int
    bytes_copied: int

    @property
    def layer_class(self) -> str:
        """The name with its numbers replaced."""
        return layer_class(self.name)


class Sink(ABC):
    """A place that quantized layers are written to; use it in a ``with`` block.

    A block that ends well puts the output in its place. One that ends by an error leaves no output; what is written
    stays for a later call with ``resume`` if that call could go on, which it cannot where the recipe or the source
    is at fault.

    Attributes
    ----------
    plan : Plan
    nbytes : int
        Size of the output, known at the end.
    """

    def __init__(self, place: Place, plan: Plan, source: Source, *, resume: bool) -> None:
        self.plan = plan
        self.nbytes = 0
        self._source = source
        self._work = Work(place, self._digest(), resume=resume)
        try:
            with self._named():
                self._begin()
        except BaseException:
            if self.results:
                self._work.leave()
            else:
                self._work.discard()
            raise

    def _digest(self) -> str:
        facts = {
            "layout": LAYOUT_VERSION,
            "target": self.plan.target,
            "activations": self.plan.recipe.activations,
            "source": self._source.fingerprint(),
            "layers": {name: asdict(command) for name, command in self.plan.commands.items()},
            "kept": list(self.plan.kept),
        }
        if self.plan.importance:
            facts["importance"] = {
                name: hashlib.sha256(vector.tobytes()).hexdigest() for name, vector in self.plan.importance.items()
            }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of writing name the output, of which alone the user knows."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and "Detail: [errno" in str(error.strerror):  # a text of Arrow's own
                error.strerror = os.strerror(error.errno)
            if error.filename is None:
                error.filename = self._work.target.uri
            raise

    @property
    def done(self) -> Collection[str]:
        """The tensors that are written, by this call or by the one that it goes on with."""
        return self._work.done.keys()

    @property
    def results(self) -> list[LayerResult]:
        """What became of each layer, in the source's order."""
        done = self._work.done
        return [LayerResult(name=name, **done[name]) for name in self.plan.commands if name in done]

    @property
    def kept(self) -> list[str]:
        """The tensors that the output holds as they were."""
        return list(self.plan.kept)

    @abstractmethod
    def _begin(self) -> None:
        """Lay out the output, or open what is there of it."""

    @abstractmethod
    def _write_row(self, batch: pa.RecordBatch, row: int, name: str) -> int:
        """Write one good answer row; how many bytes."""

    @abstractmethod
    def _write_kept(self, tensor: Tensor, first: int, data: Any) -> None:
        """Write a part of a tensor that stays as it is, from byte ``first`` on."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what comes last, and close."""

    @abstractmethod
    def _close(self) -> None:
        """Close what is open."""

    def write(self, batch: pa.RecordBatch) -> list[LayerResult]:
        """Write answer rows, in any order; their results.

        Raises
        ------
        LayerError
            A row is not ``ok``.
        OSError
            The disk is full, say.
        """
        results = []
        for row in range(batch.num_rows):
            cells = {name: batch.column(name)[row].as_py() for name in (*_COPIED, *_READ)}
            name, status, error, shape = (cells.pop(key) for key in _READ)
            if status != "ok":
                raise LayerError(
                    status, f'layer "{name}" cannot be quantized: {error}; --keep "{name}" leaves it as it is'
                )
            with self._named():
                nbytes = self._write_row(batch, row, name)
            facts = {**cells, "weights": prod(shape), "bytes_out": nbytes}
            self._work.note(name, **facts)
            results.append(LayerResult(name=name, **facts))
        return results

    def keep(self, tensor: Tensor, window: int = 64 << 20) -> None:
        """Write a tensor as it is, a window at a time, whose memory the source is told to give up."""
        for first in range(0, tensor.meta.nbytes, window):
            last = min(first + window, tensor.meta.nbytes)
            with self._named():
                self._write_kept(tensor, first, memoryview(tensor.data)[first:last])
            self._source.release(tensor.name, first, last)
        self._work.note(tensor.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                with self._named():
                    self._finish()
                    self.nbytes = self._work.commit()
            except BaseException as failure:
                self._leave(failure)
                raise
            return
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Keep what is written for a call that goes on, unless that would fail in the same way, or is nothing."""
        self._close()
        at_fault = isinstance(error, FlightquantError) and isinstance(error, ValueError)
        if at_fault or not self.results or self._work.placed:
            self._work.discard()
            return
        self._work.leave()
        if error is not None:
            error.add_note("what is written stays: repeat the command with --resume to go on")


_READ = ("layer_name", "status", "error", "shape")
_COPIED = ("scheme", "bytes_in", "sqnr_db", "cosine", "max_abs_error", "kernel_ns", "bytes_copied")

Placement = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors of a file: name to safetensors dtype and shape."""
