"""Answer rows that are taken back: to make weights of them again, or to compare them with weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer, as_layer, as_reader, layers_batch, weights_field
from flightquant.wire import ANSWER_FIELDS, check_quantized_schema, weights_dtype

NEEDED = ("layer_name", "shape", "scheme", "quantized_data")
"""Columns that every scheme needs."""
TAKEN = (*NEEDED, "status", "error", "packing", "bit_width", "group_size", "scales", "zero_points", "row_offset")
"""Columns that are looked at, if they are there."""
JOINED_BYTES = 4 << 20
"""Small layers to verify are joined until they have as many bytes of weights."""


def quantized_batches(answers: pa.Table | pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The columns of answers that are looked at, in the contract's types; batches without rows are left out.

    Raises
    ------
    InvalidRequestError
        A column is missing or of a type that cannot be the contract's.
    """
    if not isinstance(answers, pa.Table | pa.RecordBatch):
        raise InvalidRequestError(
            f"answers is a {type(answers).__name__}; expected the Table or RecordBatch that quantize gave",
            field="answers",
            got=type(answers).__name__,
        )
    missing = [name for name in NEEDED if name not in answers.schema.names]
    if missing:
        raise InvalidRequestError(f"the table has no column {missing[0]!r}", field=missing[0], expected=NEEDED)
    table = pa.Table.from_batches([answers]) if isinstance(answers, pa.RecordBatch) else answers
    table = table.select([name for name in TAKEN if name in table.schema.names])
    own = {field.name: field.type for field in ANSWER_FIELDS}
    for position, field in enumerate(table.schema):
        try:
            check_quantized_schema(pa.schema([*_least(field.name), field]), "dequantize")
        except InvalidRequestError as error:
            try:
                column = table.column(position).cast(own[field.name])
            except pa.ArrowException:
                raise error from None
            table = table.set_column(position, field.name, column)
    for batch in table.to_batches():
        if batch.num_rows:
            yield batch


def packed_data(batch: pa.RecordBatch, row: int) -> pa.Buffer:
    """The bytes of ``quantized_data`` in one row, sharing the batch's memory: Arrow's scalar would be a copy."""
    cell = batch.column("quantized_data").slice(row, 1)
    _, offsets, data = cell.buffers()
    begin, end = np.frombuffer(offsets, np.int32, 2, cell.offset * 4).tolist()
    return pa.py_buffer(b"") if data is None else data.slice(begin, end - begin)


def _least(besides: str) -> list[pa.Field]:
    """The columns that a schema must have, but for one."""
    return [field for field in ANSWER_FIELDS if field.name in NEEDED and field.name != besides]


def with_weights(weights: Any, answers: pa.Table | pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Requests of ``op: verify``: the rows of answers, each beside its layer's weights.

    Every batch has one dtype. A row alone in its batch borrows the weights; small ones are joined, which copies them.

    Parameters
    ----------
    weights : mapping, Table, RecordBatch, RecordBatchReader or object with ``__arrow_c_stream__``
        As for ``quantize``.

    Raises
    ------
    InvalidRequestError
        A layer has no weights, or a column is missing.
    """
    find = _finder(weights)
    for batch in quantized_batches(answers):
        begin = 0
        held: list[Layer] = []
        names = batch.column("layer_name").to_pylist()
        offsets = batch.column("row_offset").to_pylist() if "row_offset" in batch.schema.names else [None] * len(names)
        for row, (name, offset) in enumerate(zip(names, offsets, strict=True)):
            layer = find(name, offset)
            shape = batch.column("shape")[row].as_py()
            if offset is not None and shape and list(layer.shape) != shape and offset + shape[0] <= layer.shape[0]:
                layer = layer.part(offset, offset + shape[0])
            full = sum(other.nbytes for other in held) + layer.nbytes > JOINED_BYTES
            if held and (full or layer.dtype != held[0].dtype):
                yield _beside(batch.slice(begin, row - begin), held)
                begin, held = row, []
            held.append(layer)
        yield _beside(batch.slice(begin), held)


def _finder(weights: Any) -> Any:
    """A function from a layer's name and row_offset to its weights."""
    if isinstance(weights, Mapping):
        known: Mapping[Any, Any] = weights

        def key(name: str, offset: int | None) -> Any:
            return name
    else:
        known = {(layer.name, offset): layer for layer, offset in _rows(weights)}

        def key(name: str, offset: int | None) -> Any:
            return (name, offset) if (name, offset) in known else (name, None)

    def find(name: str, offset: int | None) -> Layer:
        wanted = key(name, offset)
        if wanted not in known:
            raise InvalidRequestError(f'there are no weights for layer "{name}"', field="weights", got=name)
        return as_layer(name, known[wanted])

    return find


def _rows(weights: Any) -> Iterator[tuple[Layer, int | None]]:
    """The rows of request batches as layers, with their ``row_offset``; memory is shared."""
    for batch in as_reader(weights):
        dtype = weights_dtype(batch.schema.field("weights"))
        for i in range(batch.num_rows):
            name, cell = batch.column("layer_name")[i].as_py(), batch.column("weights")[i]
            if not cell.is_valid or cell.values.null_count:
                raise InvalidRequestError(f'the weights of layer "{name}" are null, or some of them', field="weights")
            values = cell.values
            if pa.types.is_fixed_size_binary(values.type):
                values = pa.Array.from_buffers(pa.uint16(), len(values), [None, values.buffers()[1]], 0, values.offset)
            shape = batch.column("shape")[i].as_py() if "shape" in batch.schema.names else None
            offset = batch.column("row_offset")[i].as_py() if "row_offset" in batch.schema.names else None
            data = values.to_numpy(zero_copy_only=True)
            yield Layer(name, tuple([len(data)] if shape is None else shape), dtype, data), offset


def _beside(rows: pa.RecordBatch, layers: list[Layer]) -> pa.RecordBatch:
    """Answer rows with a column ``weights``."""
    batch = layers_batch(layers)
    large = pa.types.is_large_list(batch.schema.field("weights").type)
    return rows.append_column(weights_field(layers[0].dtype, large=large), batch.column("weights"))
