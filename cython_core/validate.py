"""Everything that stands between the wire and a pointer: the checks of one request batch, in the order that is safe.

pyarrow hands a handler offsets, lengths, null counts and text that nobody has looked at. Nothing here touches a value
before the structure that leads to it has been checked, and nothing walks rows before their number has been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flightquant.cython_core._arrow import ListColumn, read_shapes, text_lengths
from flightquant.errors import InvalidRequestError, TooLargeError
from flightquant.layers import Layer
from flightquant.reference import matrix_shape
from flightquant.spec import OVERRIDE_KEYS
from flightquant.wire import MAX_NAME_BYTES, check_request_schema

GIB = 1 << 30
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may bring. Bytes count the weights as they are sent.

    Attributes
    ----------
    max_rows : int
        Rows of one batch.
    max_layer_bytes, max_batch_bytes : int
        Weights of one row, and of one batch.
    max_call_bytes : int or None
        Weights of all batches of a call; None for no limit.
    max_name_bytes, max_dims : int
        Length of a layer's name in UTF-8 bytes, and axes of a shape.
    max_metadata_bytes : int
        Metadata of the schema with its fields, and metadata beside one batch.
    """

    max_rows: int = 65536
    max_layer_bytes: int = GIB
    max_batch_bytes: int = GIB
    max_call_bytes: int | None = None
    max_name_bytes: int = MAX_NAME_BYTES
    max_dims: int = 8
    max_metadata_bytes: int = 256 << 10


class Request:
    """What a call's schema says about all of its batches.

    Attributes
    ----------
    dtype : str
        Of the weights.
    columns : frozenset of str
        Names of the columns.
    overrides : tuple of str
        Those that override the command.

    Raises
    ------
    InvalidRequestError
        The schema is not the contract's.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.dtype = check_request_schema(schema)
        self.schema = schema
        self.columns = frozenset(schema.names)
        self.overrides = tuple(name for name in OVERRIDE_KEYS if name in self.columns)
        self.value_bytes = VALUE_BYTES[self.dtype]


@dataclass(slots=True)
class CheckedBatch:
    """A request batch that passed: where its weights are, and which rows are bad already.

    Attributes
    ----------
    names : StringArray
        Layer names, an empty text where there was none.
    weights : ListColumn or sequence of Layer
        What keeps the weights' memory alive.
    starts, lengths : int64 array of shape (rows,)
        Address of every row's first weight, and number of weights.
    total : int
        Number of weights of all rows.
    matrix : int64 array of shape (rows, 2)
        Rows and columns of every tensor.
    shapes : pa.Array of list<int64>
        As sent, or ``[length]`` where nothing was.
    failures : dict
        Row index to (status, error text).
    """

    names: pa.StringArray
    weights: ListColumn | Sequence[Layer]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    total: int
    matrix: npt.NDArray[np.int64]
    shapes: pa.Array
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)


def check_content(batch: pa.RecordBatch, request: Request, limits: Limits) -> CheckedBatch:
    """Check the rows of a batch that has passed :func:`check_frame`.

    Raises
    ------
    InvalidRequestError
        A column points outside its memory.
    TooLargeError
        The batch has more bytes, or a longer name, than the limits allow.
    """
    failures: dict[int, tuple[str, str]] = {}
    names = check_names(batch.column("layer_name"), limits, failures)
    weights = borrow_weights(batch, request.dtype, failures)
    lengths = weights.lengths
    total = check_sizes(lengths, request.value_bytes, limits, failures)
    starts = weights.address + weights.offsets[:-1] * request.value_bytes
    shapes, matrix = _check_shapes(batch, request, lengths, limits, failures)
    if "row_offset" in request.columns:
        _check_row_offset(batch.column("row_offset"))
    return CheckedBatch(names, weights, starts, lengths, total, matrix, shapes, failures)


def check_frame(batch: pa.RecordBatch, schema: pa.Schema, limits: Limits) -> None:
    """What must hold before anything of a batch may be looked at: its schema, its number of rows, Arrow's own rules.

    Raises
    ------
    InvalidRequestError
        The batch breaks Arrow's own rules, so that no row of it can be trusted, or is of another schema.
    TooLargeError
        It has more rows than the limits allow.
    """
    if batch.schema != schema:
        raise InvalidRequestError("the schema changed within the stream", field="schema", expected="one schema")
    if batch.num_rows == 0:
        raise InvalidRequestError("the batch has no rows; expected at least one", field="num_rows", got=0, expected=1)
    if batch.num_rows > limits.max_rows:
        raise TooLargeError(
            f"the batch has {batch.num_rows} rows; expected at most {limits.max_rows}",
            field="num_rows",
            got=batch.num_rows,
            expected=limits.max_rows,
        )
    try:
        batch.validate(full=True)
    except (pa.ArrowException, ValueError, OverflowError):
        raise InvalidRequestError(
            "the batch is not valid Arrow data: offsets, lengths, null counts or text do not fit its buffers",
            field="batch",
            expected="a batch that passes Arrow's full validation",
        ) from None


def borrow_weights(batch: pa.RecordBatch, dtype: str, failures: dict[int, tuple[str, str]]) -> ListColumn:
    """The ``weights`` column, borrowed; a row that is null has length 0, and one with nulls fails."""
    column = batch.column("weights")
    weights = borrow(column, VALUE_BYTES[dtype], "weights")
    _find_nulls(column, weights, failures)
    if column.null_count:
        weights.lengths[column.is_null().to_numpy(zero_copy_only=False)] = 0
    return weights


def checked_layers(layers: Sequence[Layer]) -> tuple[pa.RecordBatch, CheckedBatch]:
    """Layers of one dtype that lie apart in this process's own memory, as a batch that needs no checks.

    Returns
    -------
    RecordBatch, CheckedBatch
        The batch has the names alone.
    """
    count = len(layers)
    names = pa.array([layer.name for layer in layers], pa.utf8())
    shapes = pa.array([layer.shape for layer in layers], _SHAPE)
    starts = np.fromiter((layer.data.ctypes.data for layer in layers), np.int64, count)
    lengths = np.fromiter((layer.data.size for layer in layers), np.int64, count)
    matrix = np.array([matrix_shape(layer.shape) for layer in layers], np.int64)
    failures: dict[int, tuple[str, str]] = {}
    check_names(names, _OWN, failures)
    batch = pa.RecordBatch.from_arrays([names], names=["layer_name"])
    return batch, CheckedBatch(names, layers, starts, lengths, int(lengths.sum()), matrix, shapes, failures)


_OWN = Limits(max_name_bytes=2**31 - 1)


def borrow(column: pa.Array, value_bytes: int, name: str) -> ListColumn:
    """A list column, borrowed; every range is checked against the buffer's real size."""
    borrowed = ListColumn(column)
    values = column.values
    child = values.buffers()[1]
    # The values start at the child's own offset, which the address includes.
    available = 0 if child is None else child.size - values.offset * value_bytes
    last = int(borrowed.offsets[-1]) if len(column) else 0
    if not borrowed.ordered or last * value_bytes > max(available, 0) or (child is not None and not child.is_cpu):
        raise InvalidRequestError(
            f'column "{name}" points outside its buffer', field=name, expected="offsets inside the values' buffer"
        )
    return borrowed


def check_names(column: pa.Array, limits: Limits, failures: dict[int, tuple[str, str]]) -> pa.StringArray:
    """Names as plain text, none longer than the limit; a dictionary's entries are measured before they are copied."""
    plain = column.dictionary if pa.types.is_dictionary(column.type) else column
    longest, empty = text_lengths(plain)
    if longest > limits.max_name_bytes:
        raise TooLargeError(
            f"a layer name is {longest} bytes long; expected at most {limits.max_name_bytes}",
            field="layer_name",
            got=longest,
            expected=limits.max_name_bytes,
        )
    names = column
    if plain is not column or column.null_count or column.type != pa.utf8():
        decoded = column.dictionary_decode() if plain is not column else column
        names = decoded.cast(pa.utf8()).fill_null("")
        _, empty = text_lengths(names)
    if empty >= 0:
        for i in np.flatnonzero(pc.equal(names, "").to_numpy(zero_copy_only=False)):
            failures[int(i)] = ("empty_name", f"row {i} has no layer name; expected a text of at least one character")
    return names


def _find_nulls(column: pa.Array, weights: ListColumn, failures: dict[int, tuple[str, str]]) -> None:
    if column.null_count:
        for i in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)):
            failures.setdefault(int(i), ("null_weights", f"row {i} has null for weights; expected a list"))
    if not column.values.null_count:
        return
    empty = np.flatnonzero(column.values.is_null().to_numpy(zero_copy_only=False))
    rows = np.searchsorted(weights.offsets, empty, side="right") - 1
    for row, first in zip(*np.unique(rows, return_index=True), strict=True):
        index = int(empty[first] - weights.offsets[row]) if 0 <= row < len(column) else -1
        if index >= 0:
            failures.setdefault(int(row), ("null_weights", f"weight {index} is null; expected a number"))


def check_sizes(
    lengths: npt.NDArray[np.int64], value_bytes: int, limits: Limits, failures: dict[int, tuple[str, str]]
) -> int:
    """Hold rows of so many weights against the limits: a layer that is too large fails, a batch raises.

    Returns
    -------
    int
        Number of weights of all rows.
    """
    total = int(lengths.sum())
    nbytes = total * value_bytes
    if nbytes > limits.max_batch_bytes:
        raise TooLargeError(
            f"the batch has {nbytes} bytes of weights; expected at most {limits.max_batch_bytes}",
            field="weights",
            got=nbytes,
            expected=limits.max_batch_bytes,
        )
    if nbytes <= limits.max_layer_bytes:
        return total
    for i in np.flatnonzero(lengths > limits.max_layer_bytes // value_bytes):
        failures.setdefault(
            int(i),
            (
                "too_large",
                f"the layer has {lengths[i] * value_bytes} bytes of weights; expected at most "
                f"{limits.max_layer_bytes} (send it in parts with row_offset)",
            ),
        )
    return total


def _check_shapes(
    batch: pa.RecordBatch,
    request: Request,
    lengths: npt.NDArray[np.int64],
    limits: Limits,
    failures: dict[int, tuple[str, str]],
) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """The answer's ``shape`` column, and rows and columns of every tensor."""
    column = batch.column("shape") if "shape" in request.columns else None
    if column is None:
        return _flat_shapes(lengths), _flat_matrix(lengths)
    borrowed = borrow(column, 8, "shape")
    matrix = np.empty((batch.num_rows, 2), np.int64)
    read_shapes(borrowed, lengths, limits.max_dims, matrix)
    shapes = column if column.type == _SHAPE else column.cast(_SHAPE)
    if column.null_count:
        missing = column.is_null()
        chosen = missing.to_numpy(zero_copy_only=False)
        matrix[chosen] = _flat_matrix(lengths)[chosen]
        shapes = pc.if_else(missing, _flat_shapes(lengths), shapes)
    if column.values.null_count:
        holes = np.flatnonzero(column.values.is_null().to_numpy(zero_copy_only=False))
        rows = np.searchsorted(borrowed.offsets, holes, side="right") - 1
        matrix[rows[(rows >= 0) & (rows < batch.num_rows)]] = -1
    if batch.num_rows and matrix.min() < 0:
        for i in np.flatnonzero(matrix[:, 0] < 0):
            shown = column[int(i)].as_py()[: limits.max_dims + 1]
            failures.setdefault(
                int(i),
                (
                    "shape_mismatch",
                    f"shape {shown} does not fit {lengths[i]} weights; expected at most {limits.max_dims} axes, none "
                    "negative, whose product is the number of weights",
                ),
            )
    return shapes, matrix


_SHAPE = pa.list_(pa.int64())


def _flat_shapes(lengths: npt.NDArray[np.int64]) -> pa.Array:
    """``[length]`` for every row: the shape of a layer that came without one."""
    offsets = np.arange(len(lengths) + 1, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(lengths))


def _flat_matrix(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.stack([np.minimum(lengths, 1), lengths], axis=1)


def _check_row_offset(column: pa.Array) -> None:
    smallest = pc.min(column).as_py()
    if smallest is not None and smallest < 0:
        raise InvalidRequestError(
            f'"row_offset" is {smallest}; expected 0 or more', field="row_offset", got=smallest, expected="0 or more"
        )


def read_overrides(batch: pa.RecordBatch, request: Request) -> list[Mapping[str, Any]] | None:
    """Each row's non-null option values; None if the batch has no such column."""
    if not request.overrides:
        return None
    columns = {name: batch.column(name).to_pylist() for name in request.overrides}
    return [
        {name: values[i] for name, values in columns.items() if values[i] is not None} for i in range(batch.num_rows)
    ]


def read_global_amax(batch: pa.RecordBatch, request: Request, checked: CheckedBatch) -> npt.NDArray[np.float32]:
    """The ``global_amax`` column, or what the layers say, as float32 of shape (rows,); NaN where there is none."""
    none = np.full(batch.num_rows, np.nan, np.float32)
    if not isinstance(checked.weights, ListColumn):
        for row, layer in enumerate(checked.weights):
            if layer.global_amax is not None:
                none[row] = layer.global_amax
        return none
    if "global_amax" not in request.columns:
        return none
    column = batch.column("global_amax")
    given = column.is_valid().to_numpy(zero_copy_only=False)
    values: npt.NDArray[np.float32] = np.where(given, column.fill_null(0).to_numpy(zero_copy_only=False), none)
    for i in np.flatnonzero(given & ~(np.isfinite(values) & (values >= 0))):
        text = f'"global_amax" is {values[i]}; expected a finite magnitude of 0 or more'
        checked.failures.setdefault(int(i), ("unsupported", text))
        values[i] = np.nan
    return values


def read_importance(
    batch: pa.RecordBatch, request: Request, checked: CheckedBatch
) -> tuple[npt.NDArray[np.int64], object]:
    """Address of every row's importance, 0 where it is null or missing, and what keeps that memory alive.

    One that does not fit its row fails the row.
    """
    addresses = np.zeros(batch.num_rows, np.int64)
    if isinstance(checked.weights, Sequence):
        for i, layer in enumerate(checked.weights):
            if layer.importance is not None:
                _check_importance(i, layer.importance, checked)
                addresses[i] = layer.importance.ctypes.data
        return addresses, checked.weights
    if "importance" not in request.columns:
        return addresses, None
    column = batch.column("importance")
    borrowed = borrow(column, 4, "importance")
    for i in np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)).tolist():
        values = column[i].values
        if values.null_count:
            text = f'"importance" of row {i} holds null; expected a number for each column'
            checked.failures.setdefault(i, ("null_weights", text))
        else:
            _check_importance(i, values.to_numpy(zero_copy_only=True), checked)
            addresses[i] = borrowed.address + borrowed.offsets[i] * 4
    return addresses, borrowed


def _check_importance(row: int, values: npt.NDArray[np.float32], checked: CheckedBatch) -> None:
    """One finite number of 0 or more for each column of a layer that is not empty."""
    cols = int(checked.matrix[row, 1])
    if values.size != cols and checked.lengths[row]:
        text = f'"importance" has {values.size} values; expected {cols}, one for each weight of a row'
        checked.failures.setdefault(row, ("shape_mismatch", text))
    for k in np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[:1]:
        text = f'"importance" is {values[k]} at index {k}; expected finite numbers of 0 or more'
        checked.failures.setdefault(row, ("unsupported", text))
