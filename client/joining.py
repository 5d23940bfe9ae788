"""Answers of a layer that was sent in parts, joined to the one row that the whole layer would have got."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.client.batching import Request
from flightquant.errors import TooLargeError
from flightquant.quantized import packed_data
from flightquant.reference import matrix_shape, packings
from flightquant.reference.quality import columns
from flightquant.schemes import TRANSPOSED
from flightquant.spec import Command
from flightquant.wire import QUALITY_SUMS

MAX_CELL_BYTES = (1 << 31) - 1
_COSTS = ("kernel_ns", "bytes_in", "bytes_copied")
_INDEX = re.compile(r"^weight (\d+) ")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer batch beside its request.

    Attributes
    ----------
    sums : float64 array of shape (rows, 4) or None
        The rows' quality sums, if the server sent them.
    """

    request: Request
    batch: pa.RecordBatch
    sums: npt.NDArray[np.float64] | None


def read_sums(metadata: pa.Buffer | None, rows: int) -> npt.NDArray[np.float64] | None:
    """The quality sums in an answer's ``app_metadata``; None if it holds none."""
    if metadata is None or metadata.size != rows * QUALITY_SUMS * 8:
        return None
    return np.frombuffer(metadata, "<f8").reshape(rows, QUALITY_SUMS)


def join(answers: Iterable[Answer]) -> Iterator[pa.RecordBatch]:
    """Answer batches in which every row is a whole layer; at most the parts of one layer are held."""
    held = _Parts()
    for answer in answers:
        part = answer.request.part
        if part is None:
            yield answer.batch
            continue
        held.answers.append(answer)
        if part.ends:
            yield held.joined()
            held = _Parts()


@dataclass(slots=True)
class _Parts:
    """The answers so far for one layer."""

    answers: list[Answer] = field(default_factory=list)

    def joined(self) -> pa.RecordBatch:
        """The layer's row: the first bad part's verdict, or all parts' bytes, scales and sums."""
        batches = [answer.batch for answer in self.answers]
        statuses = [batch.column("status")[0].as_py() for batch in batches]
        bad = next((i for i, status in enumerate(statuses) if status != "ok"), None)
        base = batches[0 if bad is None else bad]
        part = self.answers[0].request.part
        assert part is not None  # noqa: S101 - join() holds nothing else
        changed: dict[str, Any] = {
            "shape": pa.array([list(part.shape)], base.schema.field("shape").type),
            "row_offset": pa.array([part.row_offset], pa.int64()),
        }
        if bad is None and "amax" in base.schema.names:
            largest = max(batch.column("amax")[0].as_py() for batch in batches)
            changed["amax"] = pa.array([largest], pa.float32())
        elif bad is None:
            if not part.one_scale:
                changed["scales"] = _joined_lists(batches, "scales", shared=int(part.whole_scale))
                changed["zero_points"] = _joined_lists(batches, "zero_points")
            packed = self._packed(batches)
            _check_size(base, len(packed))
            offsets = pa.array([0, len(packed)], pa.int32()).buffers()[1]
            floats = [changed.get(name, base.column(name)) for name in ("scales", "zero_points")]
            changed["quantized_data"] = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(packed)])
            changed["bytes_out"] = pa.array([len(packed) + 4 * sum(map(_length, floats))], pa.int64())
            changed |= self._quality(base)
        else:
            changed["error"] = pa.array([self._error(bad)], pa.utf8())
        for name in set(_COSTS) & set(base.schema.names):
            total = sum(batch.column(name)[0].as_py() or 0 for batch in batches)
            changed[name] = pa.array([total], pa.int64())
        arrays = [changed.get(name, base.column(name)) for name in base.schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=base.schema)

    def _packed(self, batches: list[pa.RecordBatch]) -> bytes:
        """The bytes of the whole layer."""
        parts = [packed_data(batch, 0) for batch in batches]
        base = batches[0]
        packing = base.column("packing")[0].as_py()
        if packing not in (*TRANSPOSED, "onnx"):
            return b"".join(parts)
        spec = Command.build(scheme=base.column("scheme")[0].as_py(), packing=packing)
        shapes = [matrix_shape(tuple(batch.column("shape")[0].as_py())) for batch in batches]
        if packing == "onnx":
            codes = [rows * cols * spec.layer_spec().scheme.bits // 8 for rows, cols in shapes]
            both = list(zip(parts, codes, strict=True))
            return b"".join([*(part[:size] for part, size in both), *(part[size:] for part, size in both)])
        return packings.join(parts, [rows for rows, _ in shapes], spec.layer_spec(), shapes[0][1])

    def _error(self, bad: int) -> str | None:
        """A bad part's sentence, an index in it counted from the layer's beginning."""
        answer = self.answers[bad]
        text: str | None = answer.batch.column("error")[0].as_py()
        part = answer.request.part
        if text is None or part is None:
            return text
        before = part.first * prod(part.shape[1:])
        return _INDEX.sub(lambda found: f"weight {int(found[1]) + before} ", text)

    def _quality(self, base: pa.RecordBatch) -> dict[str, pa.Array]:
        names = ("sqnr_db", "cosine", "max_abs_error")
        sums = [answer.sums for answer in self.answers]
        if not base.column("sqnr_db")[0].is_valid or any(part is None for part in sums):
            # Not asked for, or a server that does not tell its sums: then the whole layer's quality is not known.
            return {name: pa.nulls(1, pa.float32()) for name in names}
        total = np.zeros(QUALITY_SUMS)
        for part in sums:
            total[:-1] += part[0, :-1]  # type: ignore[index]
            total[-1] = np.maximum(total[-1], part[0, -1])  # type: ignore[index]
        return dict(zip(names, map(pa.array, columns(total)), strict=True))


def _check_size(base: pa.RecordBatch, nbytes: int) -> None:
    if nbytes > MAX_CELL_BYTES:
        name = base.column("layer_name")[0].as_py()
        raise TooLargeError(
            f'layer "{name}" has {nbytes} bytes when quantized; one row of a table holds at most {MAX_CELL_BYTES}',
            field="weights",
            got=nbytes,
            expected=MAX_CELL_BYTES,
        )


def _length(column: pa.Array) -> int:
    """Values in the one row of a list column."""
    return len(column[0]) if column[0].is_valid else 0


def _joined_lists(batches: list[pa.RecordBatch], name: str, shared: int = 0) -> pa.Array:
    """One list of all the parts' values, but for so many at their ends that all share; null where they have none."""
    rows = [batch.column(name)[0] for batch in batches]
    kind = batches[0].schema.field(name).type
    if not rows[0].is_valid:
        return pa.nulls(1, kind)
    parts = [row.values.to_numpy(zero_copy_only=True) for row in rows]
    values = np.concatenate([*(part[: part.size - shared] for part in parts), parts[0][parts[0].size - shared :]])
    return pa.ListArray.from_arrays(pa.array([0, values.size], pa.int32()), pa.array(values), type=kind)
