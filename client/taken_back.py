"""Quantized rows that go back to a server: requests of ``op: dequantize`` and ``verify``, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant import wire
from flightquant.client.batching import MAX_BYTES, MAX_ROWS, Request, check_message
from flightquant.errors import LayerError
from flightquant.quantized import quantized_batches, with_weights
from flightquant.reference import Parts, join_parts


def to_restore(answers: pa.Table | pa.RecordBatch, value_bytes: int) -> Iterator[Request]:
    """Requests of ``op: dequantize``, cut so that no answer is much larger than a part of a layer.

    Raises
    ------
    InvalidRequestError
        A column is missing or of a type that cannot be the contract's.
    TooLargeError
        A row stands for more weights than one message can hold.
    """
    for batch in quantized_batches(answers):
        sizes = [_weights(shape) * value_bytes for shape in batch.column("shape").to_pylist()]
        begin = held = 0
        for row, nbytes in enumerate(sizes):
            check_message(str(batch.column("layer_name")[row]), nbytes)
            if row > begin and (held + nbytes > MAX_BYTES or row - begin == MAX_ROWS):
                yield Request(batch.slice(begin, row - begin), held)
                begin, held = row, 0
            held += nbytes
        yield Request(batch.slice(begin), held)


def _weights(shape: list[int | None] | None) -> int:
    """Weights of a shape that nobody has checked yet; a wrong one is for the server to refuse."""
    extents = [extent for extent in shape or [] if extent is not None]
    return prod(extents) if len(extents) == len(shape or []) and all(extent >= 0 for extent in extents) else 0


def to_verify(weights: Any, answers: pa.Table | pa.RecordBatch) -> Iterator[tuple[pa.Schema, Request]]:
    """Requests of ``op: verify`` and their schema, which changes where the weights' dtype does."""
    for batch in with_weights(weights, answers):
        nbytes = batch.column("weights").values.nbytes
        check_message(str(batch.column("layer_name")[0]), nbytes)
        yield batch.schema, Request(batch, nbytes)


def arrays(batches: Iterable[pa.RecordBatch], answers: pa.Table | pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    """The restored layers by name, their parts joined, from the answers to all of :func:`to_restore`'s requests.

    Raises
    ------
    LayerError
        A row could not be restored.
    InvalidRequestError
        The parts of a layer do not follow one another.
    """
    offsets: list[int | None] = [None] * answers.num_rows
    if "row_offset" in answers.schema.names:
        offsets = answers.column("row_offset").to_pylist()
    parts: Parts = {}
    row = 0
    for batch in batches:
        shapes = batch.column("shape").to_pylist()
        for i, name in enumerate(batch.column("layer_name").to_pylist()):
            status, error = (batch.column(column)[i].as_py() for column in ("status", "error"))
            if status != "ok":
                raise LayerError(status, f'layer "{name}" (row {row}): {error}', got=status)
            values = np.array(batch.column("weights")[i].values.to_numpy(zero_copy_only=False))
            parts.setdefault(name, []).append((offsets[row], values.reshape(shapes[i])))
            row += 1
    return join_parts(parts)


def verified(batches: list[pa.RecordBatch]) -> pa.Table:
    """The answers to :func:`to_verify`'s requests as one table."""
    return pa.Table.from_batches(batches, schema=wire.verified_schema(pa.schema([])) if not batches else None)
