"""From layers to request batches: small layers joined, large ones cut by rows, so that a message has 4 to 16 MiB.

A message far below that pays for its round trip, one far above for page faults of fresh receive buffers; one over 2 GiB
is lost by Arrow Flight without an error. Whatever is cut here is joined again by :mod:`flightquant.client.joining`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd, lcm, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flightquant import wire
from flightquant.errors import InvalidRequestError, TooLargeError
from flightquant.layers import Layer, layers_batch
from flightquant.reference import fits_groups, fits_transpose, matrix_shape, unit_length
from flightquant.reference.quality import TILE
from flightquant.schemes import BLOCK_EDGE, LayerSpec
from flightquant.spec import OVERRIDE_KEYS, Command

MIN_BYTES = 4 << 20
"""Small layers are joined until a message has as much; a layer of this size is sent alone, without a copy."""
TARGET_BYTES = 8 << 20
"""Size of the parts of a layer that is cut."""
MAX_BYTES = 16 << 20
"""A layer above this is cut, if it can be."""
MAX_ROWS = 4096
"""Layers in one message: bounds the answer's own columns and the wait for it."""
MESSAGE_LIMIT = (1 << 31) - (1 << 20)
"""Flight loses a message above 2 GiB and reports success; this leaves room for its other columns."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of a cut layer a request holds.

    Attributes
    ----------
    first, last : int
        The range of the layer's first axis.
    shape : tuple of int
        The whole layer's.
    row_offset : int or None
        What the caller gave as the layer's own ``row_offset``.
    one_scale : bool
        Whether all parts share one scale (granularity ``tensor``).
    whole_scale : bool
        Whether the last of each part's scales is one that all share.
    """

    first: int
    last: int
    shape: tuple[int, ...]
    row_offset: int | None
    one_scale: bool
    whole_scale: bool = False

    @property
    def ends(self) -> bool:
        """Whether this part is the layer's last one."""
        return self.last == self.shape[0]


@dataclass(frozen=True, slots=True)
class Request:
    """One message: a batch of whole layers, or a single row that is a part of one.

    ``nbytes`` counts the weights alone.
    """

    batch: pa.RecordBatch
    nbytes: int
    part: Part | None = None

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        names: list[str] = self.batch.column("layer_name").to_pylist()
        return names


def least_row(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The first row, of its weights none where that is a layer too: any that is given as a list, with a shape."""
    row = batch.slice(0, 1)
    if not {"weights", "shape"} <= set(row.schema.names) or "quantized_data" in row.schema.names:
        return row
    weights, shape = row.column("weights"), row.column("shape")
    if not (pa.types.is_list(weights.type) or pa.types.is_large_list(weights.type)) or not shape[0].as_py():
        return row
    empty = {
        "weights": pa.array([[]], weights.type),
        "shape": pa.array([[0, *shape[0].as_py()[1:]]], shape.type),
    }
    columns = [empty.get(name, column) for name, column in zip(row.schema.names, row.columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=row.schema)


def cut(shape: tuple[int, ...], itemsize: int, spec: LayerSpec) -> list[tuple[int, int]]:
    """Ranges of the first axis in which a layer is sent; one range if it fits or cannot be cut.

    Parts begin where the quality sums begin a tile, if that leaves them small enough: the joined sums are then made of
    the same float32 numbers as those of the whole layer.
    """
    whole = [(0, shape[0] if shape else 1)]
    if prod(shape) * itemsize <= MAX_BYTES or not _can_cut(shape, spec):
        return whole
    count = shape[0]
    width = prod(shape[1:])
    unit = unit_length(spec, shape[-1])
    # Where groups cross rows, a part may begin only at a row that a group begins with.
    step = spec.group_size // gcd(spec.group_size, width) if len(shape) == 1 or spec.scheme.flat else 1
    if spec.granularity == "block":
        # A block never crosses parts, so that the parts' scales, put together, are those of the whole.
        step = BLOCK_EDGE // gcd(BLOCK_EDGE, prod(shape[1:-1]))
    elif spec.scheme.transposed:
        step = 32 // gcd(32, prod(shape[1:-1]))
    if spec.granularity != "block" and unit <= TILE:
        tile = TILE // unit * unit
        aligned = lcm(step, tile // gcd(tile, width))
        if aligned * width * itemsize <= MAX_BYTES:
            step = aligned
    rows = max(1, TARGET_BYTES // (step * width * itemsize)) * step
    return [(first, min(first + rows, count)) for first in range(0, count, rows)] if rows < count else whole


def _can_cut(shape: tuple[int, ...], spec: LayerSpec) -> bool:
    if spec.scheme.nested or spec.scheme.fold > 1 or (spec.scheme.rule == "onnx" and len(shape) == 1):
        # The scales' mean is that of the whole; its groups share bytes; two zero points of a row share a byte.
        return False
    if spec.calibration == "proximal":
        return False  # its steps end by the mean error of the whole
    if spec.granularity == "tensor":
        # One scale for all: the parts can be told the magnitude of the whole, but not its smallest and largest value.
        return spec.symmetric and spec.calibration == "absmax" and len(shape) > 1
    if spec.scheme.transposed:
        return len(shape) > 1 and fits_transpose(spec, *matrix_shape(shape))
    if len(shape) > 1:
        return True
    # One dimension is one row; whole groups of it fill whole words, a row of one scale cannot be cut.
    return len(shape) == 1 and spec.granularity == "group" and fits_groups(spec, shape[0])


def magnitude(data: npt.NDArray[Any], dtype: str) -> float:
    """The largest absolute value as float32 (NaN if there is any), without a copy of the weights."""
    if data.size == 0:
        return 0.0
    if dtype == "bfloat16":
        # Positive bfloat16 numbers stand in the order of their bits, NaN above infinity.
        largest, chunk = np.uint32(0), 1 << 20
        for begin in range(0, data.size, chunk):
            bits = data[begin : begin + chunk] & np.uint16(0x7FFF)
            largest = max(largest, np.uint32(bits.max()))
        return float((largest << np.uint32(16)).view(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.float32(np.maximum(np.abs(data.max()), np.abs(data.min()))))


def pack(layers: Iterable[Layer], command: Command, *, importance: bool = False) -> Iterator[Request]:
    """Layers of one dtype as requests, in order; memory is shared but for small layers that are joined.

    Parameters
    ----------
    importance : bool
        Whether any of the layers may have an importance.

    Raises
    ------
    TooLargeError
        A layer that cannot be cut is larger than a message can be.
    """
    spec = command.layer_spec()
    with_amax = spec.takes_magnitude
    pending: list[Layer] = []
    for layer in layers:
        ranges = cut(layer.shape, layer.data.itemsize, spec)
        amax = None
        if len(ranges) > 1 and with_amax:
            amax = magnitude(layer.data, layer.dtype) if layer.global_amax is None else layer.global_amax
            if not np.isfinite(amax):
                # The server names the bad weight; a scale of infinity or NaN would only hide it.
                ranges = [(0, layer.shape[0])]
        held = sum(held.nbytes for held in pending)
        if pending and (layer.nbytes >= MIN_BYTES or held + layer.nbytes > MAX_BYTES or len(pending) == MAX_ROWS):
            yield _joined(pending, with_amax, importance)
            pending, held = [], 0
        if len(ranges) > 1:
            for first, last in ranges:
                batch = layers_batch([layer.part(first, last)], [first], importance=importance)
                if with_amax:
                    batch = _with_column(batch, "global_amax", pa.array([amax], pa.float32()))
                yield Request(batch, batch_bytes(batch), _part(first, last, layer.shape, None, spec))
            continue
        check_message(layer.name, layer.nbytes)
        pending.append(layer)
        if held + layer.nbytes >= MIN_BYTES:
            yield _joined(pending, with_amax, importance)
            pending = []
    if pending:
        yield _joined(pending, with_amax, importance)


def _part(first: int, last: int, shape: tuple[int, ...], row_offset: int | None, spec: LayerSpec) -> Part:
    return Part(first, last, shape, row_offset, spec.granularity == "tensor", spec.scheme.whole_scale)


def _joined(layers: list[Layer], with_amax: bool, importance: bool) -> Request:
    batch = layers_batch(layers, [None] * len(layers), importance=importance)
    if with_amax:
        batch = _with_column(batch, "global_amax", pa.array([layer.global_amax for layer in layers], pa.float32()))
    return Request(batch, sum(layer.nbytes for layer in layers))


def check_message(name: str, nbytes: int) -> None:
    """Raise TooLargeError for a layer of more bytes than a message can have."""
    if nbytes > MESSAGE_LIMIT:
        raise TooLargeError(
            f'layer "{name}" has {nbytes} bytes and cannot be sent in parts with this scheme, granularity and shape; '
            f"expected at most {MESSAGE_LIMIT} (quantize it in-process, or with a scheme that can be cut)",
            field="weights",
            got=nbytes,
            expected=MESSAGE_LIMIT,
        )


def reslice(batches: Iterable[pa.RecordBatch], command: Command) -> Iterator[Request]:
    """Request batches of the caller's own as messages of bounded size: slices, without a copy of the weights.

    Batches are cut but never joined, so that a caller who waits for an answer before giving the next batch gets it.
    Empty batches are left out.

    Raises
    ------
    InvalidRequestError
        The columns are not the contract's.
    TooLargeError
        A layer that cannot be cut is larger than a message can be.
    """
    for batch in batches:
        wire.check_request_schema(batch.schema)
        if batch.num_rows:
            yield from _reslice_batch(_normal(batch), command)


def _reslice_batch(batch: pa.RecordBatch, command: Command) -> Iterator[Request]:
    sizes = _row_bytes(batch)
    begin, held = 0, 0
    for row, nbytes in enumerate(sizes.tolist()):
        parts = _row_parts(batch, row, command) if nbytes > MAX_BYTES else []
        full = held + nbytes > MAX_BYTES or row - begin == MAX_ROWS
        if row > begin and (full or parts):
            yield Request(batch.slice(begin, row - begin), held)
            begin, held = row, 0
        if parts:
            yield from parts
            begin = row + 1
            continue
        if nbytes > MAX_BYTES:
            check_message(str(batch.column("layer_name")[row]), nbytes)
        held += nbytes
    if begin < batch.num_rows:
        yield Request(batch.slice(begin), held)


def _normal(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with every column that a part may need, since a stream has one schema for all its batches."""
    names = batch.column("layer_name")
    if pa.types.is_dictionary(names.type):
        batch = _with_column(batch, "layer_name", names.cast(names.type.value_type))
    weights = batch.column("weights")
    kind = weights.type
    if pa.types.is_fixed_size_list(kind) and kind.list_size * kind.value_type.bit_width // 8 > MAX_BYTES:
        batch = _with_column(batch, "weights", _as_list(weights), batch.schema.field("weights").metadata)
    if "shape" not in batch.schema.names:
        lengths = pc.fill_null(pc.list_value_length(weights), 0).cast(pa.int64())
        offsets = pa.array(np.arange(batch.num_rows + 1, dtype=np.int32))
        batch = _with_column(batch, "shape", pa.ListArray.from_arrays(offsets, lengths))
    for name, kind in (("row_offset", pa.int64()), ("global_amax", pa.float32())):
        if name not in batch.schema.names:
            batch = _with_column(batch, name, pa.nulls(batch.num_rows, kind))
    return batch


def _as_list(weights: pa.FixedSizeListArray) -> pa.ListArray:
    size = weights.type.list_size
    values = weights.values.slice(weights.offset * size, len(weights) * size)
    offsets = pa.array(np.arange(len(weights) + 1, dtype=np.int64) * size)
    kind = pa.large_list(weights.type.value_field)
    mask = weights.is_null() if weights.null_count else None
    return pa.LargeListArray.from_arrays(offsets, values, type=kind, mask=mask)


def _with_column(
    batch: pa.RecordBatch, name: str, column: pa.Array, metadata: dict[bytes, bytes] | None = None
) -> pa.RecordBatch:
    """The batch with one column set or added at the end."""
    field = pa.field(name, column.type, metadata=metadata)
    position = batch.schema.get_field_index(name)
    if position < 0:
        return batch.append_column(field, column)
    return batch.set_column(position, field, column)


def _row_bytes(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    weights = batch.column("weights")
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(weights), 0).to_numpy().astype(np.int64)
    return lengths * np.int64(weights.type.value_type.bit_width // 8)


def batch_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of a request batch's weights."""
    return int(_row_bytes(batch).sum())


def _row_parts(batch: pa.RecordBatch, row: int, command: Command) -> list[Request]:
    """The parts of one large row; none if it cannot be cut, or is not right: then the server says what is wrong."""
    weights = batch.column("weights")
    shape_row = batch.column("shape")[row].as_py()
    lo, hi = _bounds(weights, row)
    if not shape_row or None in shape_row or min(shape_row) < 1 or prod(shape_row) != hi - lo:
        return []
    try:
        spec = _row_spec(batch, row, command)
    except InvalidRequestError:
        return []
    shape = tuple(shape_row)
    itemsize = weights.type.value_type.bit_width // 8
    values = weights.values.slice(lo, hi - lo)
    ranges = cut(shape, itemsize, spec)
    if len(ranges) == 1 or values.null_count:
        return []
    amax = batch.column("global_amax")[row].as_py()
    if spec.takes_magnitude and amax is None:
        amax = magnitude(_as_numpy(values), wire.weights_dtype(batch.schema.field("weights")))
        if not np.isfinite(amax):
            return []
    given = batch.column("row_offset")[row].as_py()
    width = prod(shape[1:])
    single = batch.slice(row, 1)
    # Of one axis, each part has its own columns; a wrong length is for the server to refuse, of every part.
    importance = batch.column("importance")[row].values if "importance" in batch.schema.names else None
    metadata = batch.schema.field("weights").metadata
    array_type = pa.LargeListArray if pa.types.is_large_list(weights.type) else pa.ListArray
    offset_type = np.int64 if pa.types.is_large_list(weights.type) else np.int32
    parts = []
    for first, last in ranges:
        size = (last - first) * width
        offsets = pa.array(np.array([0, size], offset_type))
        held = array_type.from_arrays(offsets, values.slice(first * width, size), type=weights.type)
        part = _with_column(single, "weights", held, metadata)
        part = _with_column(part, "shape", pa.array([[last - first, *shape[1:]]], batch.schema.field("shape").type))
        part = _with_column(part, "row_offset", pa.array([(given or 0) + first], pa.int64()))
        part = _with_column(part, "global_amax", pa.array([amax], pa.float32()))
        if len(shape) == 1 and importance is not None and len(importance) == shape[0]:
            counts = importance[first:last]
            part = _with_column(part, "importance", pa.array([counts.to_numpy()], pa.list_(pa.float32())))
        described = _part(first, last, shape, given, spec)
        parts.append(Request(part.cast(batch.schema), size * itemsize, described))
    return parts


def _bounds(weights: pa.Array, row: int) -> tuple[int, int]:
    if pa.types.is_fixed_size_list(weights.type):
        size = weights.type.list_size
        return (weights.offset + row) * size, (weights.offset + row + 1) * size
    return weights.offsets[row].as_py(), weights.offsets[row + 1].as_py()


def _as_numpy(values: pa.Array) -> npt.NDArray[Any]:
    if pa.types.is_fixed_size_binary(values.type):
        bits = np.frombuffer(values.buffers()[1], np.uint16, len(values), values.offset * 2)
        return bits
    array: npt.NDArray[Any] = values.to_numpy(zero_copy_only=True)
    return array


def _row_spec(batch: pa.RecordBatch, row: int, command: Command) -> LayerSpec:
    names = [name for name in OVERRIDE_KEYS if name in batch.schema.names]
    given = {name: batch.column(name)[row].as_py() for name in names}
    return command.override({name: value for name, value in given.items() if value is not None}).layer_spec()


def by_dtype(layers: Iterable[Layer], deferred: dict[str, list[str]], dtype: str | None = None) -> Iterator[Layer]:
    """The layers of the first dtype met (or of ``dtype``); the names of all others are put into ``deferred``."""
    for layer in layers:
        dtype = dtype or layer.dtype
        if layer.dtype == dtype:
            yield layer
        else:
            deferred.setdefault(layer.dtype, []).append(layer.name)
