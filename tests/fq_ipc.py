"""Arrow IPC streams with single facts changed, which pyarrow's writer would never write and its reader lets through."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa

RECORD_BATCH, DICTIONARY_BATCH = 3, 2


@dataclass
class Parts:
    """Where a record batch message keeps its facts: byte positions in the stream.

    ``nodes`` and ``buffers`` are positions of pairs of int64 (length, null count) and (offset, length).
    """

    rows: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    body: int = 0


def serialized(batch: pa.RecordBatch) -> bytes:
    """The batch as an IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def read_first(stream: bytes) -> pa.RecordBatch:
    """The first batch of a stream, read as a Flight server's reader does: nothing validated."""
    with pa.ipc.open_stream(stream) as reader:
        return reader.read_next_batch()


def _names(path: str, kind: pa.DataType) -> tuple[list[str], list[str]]:
    """Names of a column's nodes and buffers, depth first as in the message."""
    if pa.types.is_null(kind):
        return [path], []
    if pa.types.is_dictionary(kind):
        return [path], [f"{path}.validity", f"{path}.values"]
    if pa.types.is_fixed_size_list(kind):
        own = [f"{path}.validity"]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        own = [f"{path}.validity", f"{path}.offsets"]
    elif kind in (pa.utf8(), pa.large_utf8(), pa.binary(), pa.large_binary()):
        return [path], [f"{path}.validity", f"{path}.offsets", f"{path}.values"]
    else:
        return [path], [f"{path}.validity", f"{path}.values"]
    nodes, buffers = _names(f"{path}.item", kind.value_type)
    return [path, *nodes], [*own, *buffers]


def _table_field(data: bytes, table: int, index: int) -> int:
    """Position of a flatbuffer table's field; 0 if it is absent, at its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * index >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = int(struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0])
    return table + offset if offset else 0


def _follow(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def locate(stream: bytes, schema: pa.Schema, kind: int = RECORD_BATCH) -> Parts:
    """The facts of the stream's first record batch, or of its first dictionary (whose node is ``dictionary``)."""
    at = 0
    while True:
        size = struct.unpack_from("<I", stream, at + 4)[0]
        message = _follow(stream, at + 8)
        body = at + 8 + size
        header_type = stream[_table_field(stream, message, 1)]
        header = _follow(stream, _table_field(stream, message, 2))
        if header_type == kind:
            break
        length_at = _table_field(stream, message, 3)
        at = body + (struct.unpack_from("<q", stream, length_at)[0] if length_at else 0)
    if kind == DICTIONARY_BATCH:
        header = _follow(stream, _table_field(stream, header, 1))
        columns = [("dictionary", next(f.type.value_type for f in schema if pa.types.is_dictionary(f.type)))]
    else:
        columns = [(f.name, f.type) for f in schema]
    parts = Parts(rows=_table_field(stream, header, 0), body=body)
    nodes, buffers = _follow(stream, _table_field(stream, header, 1)), _follow(stream, _table_field(stream, header, 2))
    found = [_names(name, type_) for name, type_ in columns]
    node_names = chain.from_iterable(each for each, _ in found)
    buffer_names = chain.from_iterable(each for _, each in found)
    parts.nodes = {name: nodes + 4 + 16 * i for i, name in enumerate(node_names)}
    parts.buffers = {name: buffers + 4 + 16 * i for i, name in enumerate(buffer_names)}
    assert struct.unpack_from("<I", stream, nodes)[0] == len(parts.nodes)
    assert struct.unpack_from("<I", stream, buffers)[0] == len(parts.buffers)
    return parts


def crafted(
    batch: pa.RecordBatch,
    *,
    rows: int | None = None,
    lengths: dict[str, int] | None = None,
    nulls: dict[str, int] | None = None,
    sizes: dict[str, int] | None = None,
    starts: dict[str, int] | None = None,
    contents: dict[str, bytes] | None = None,
    message: int = RECORD_BATCH,
) -> bytes:
    """The batch as a stream in which some facts are not what the buffers say.

    Parameters
    ----------
    rows : int, optional
        The batch's number of rows.
    lengths, nulls : dict of node name to int
        Lengths and null counts: ``weights``, ``weights.item``, ...
    sizes, starts : dict of buffer name to int
        Sizes and body offsets of buffers: ``weights.offsets``, ``weights.item.values``, ...
    contents : dict of buffer name to bytes
        What stands at the buffer's beginning, no longer than it.
    """
    stream = bytearray(serialized(batch))
    parts = locate(bytes(stream), batch.schema, message)
    for name, data in (contents or {}).items():
        start, size = struct.unpack_from("<qq", stream, parts.buffers[name])
        assert len(data) <= size, f"{name} has {size} bytes, not {len(data)}"
        stream[parts.body + start : parts.body + start + len(data)] = data
    if rows is not None:
        struct.pack_into("<q", stream, parts.rows, rows)
    for at, values in ((parts.nodes, lengths), (parts.buffers, starts)):
        for name, value in (values or {}).items():
            struct.pack_into("<q", stream, at[name], value)
    for at, values in ((parts.nodes, nulls), (parts.buffers, sizes)):
        for name, value in (values or {}).items():
            struct.pack_into("<q", stream, at[name] + 8, value)
    return bytes(stream)
