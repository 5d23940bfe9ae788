"""The checks of quantized rows that come back: everything that stands between them and a pointer, as in ``validate``.

What the rows say of themselves is taken in whole columns: their schemes are looked up once for each combination that
occurs, sizes are compared for all rows of a scheme at once, and Python looks at a single row only to say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flightquant.cython_core._arrow import read_shapes
from flightquant.cython_core.validate import (
    VALUE_BYTES,
    Limits,
    borrow,
    borrow_weights,
    check_frame,
    check_names,
    check_sizes,
)
from flightquant.errors import ROW_STATUSES, InvalidRequestError, clip_text
from flightquant.reference import fits_groups, fits_transpose, packed_bytes, scale_count, stored_spec
from flightquant.schemes import LayerSpec
from flightquant.spec import Command
from flightquant.wire import check_quantized_schema

Ints = npt.NDArray[np.int64]
Failures = dict[int, tuple[str, str]]

_NOT_SAID = -(2**63)
"""Stands for null: a number that no row can mean."""
_SHAPE = pa.list_(pa.int64())


class QuantizedRequest:
    """What a call's schema says about all of its batches.

    Attributes
    ----------
    dtype : str or None
        Of the weights to compare with.
    columns : frozenset of str
        Names of the columns.

    Raises
    ------
    InvalidRequestError
        The schema is not the contract's.
    """

    def __init__(self, schema: pa.Schema, op: str) -> None:
        self.dtype = check_quantized_schema(schema, op)
        self.schema = schema
        self.columns = frozenset(schema.names)


@dataclass(slots=True)
class Cells:
    """The values of one column, row by row.

    Attributes
    ----------
    addresses : int64 array of shape (rows,)
        Of each row's first value, at any alignment.
    counts : int64 array of shape (rows,)
        Number of values; -1 for null.
    held : Any
        Keeps the memory alive.
    """

    addresses: Ints
    counts: Ints
    held: Any = None


@dataclass(slots=True)
class CheckedRows:
    """A batch of quantized rows that passed.

    Attributes
    ----------
    names : StringArray
    shapes : pa.Array of list<int64>
    matrix : int64 array of shape (rows, 2)
        Rows and columns of every tensor; zeros for one that is empty or bad.
    specs, spec_of_row : list of LayerSpec, int64 array of shape (rows,)
        How each row was made.
    data, scales, zeros : Cells
    weights : Cells or None
        To compare with.
    failures : dict
        Row index to (status, error text).
    """

    names: pa.StringArray
    shapes: pa.Array
    matrix: Ints
    specs: list[LayerSpec]
    spec_of_row: Ints
    data: Cells
    scales: Cells
    zeros: Cells
    weights: Cells | None
    failures: Failures = field(default_factory=dict)

    @property
    def lengths(self) -> Ints:
        """Weights of every row; 0 for those that are bad."""
        lengths: Ints = self.matrix[:, 0] * self.matrix[:, 1]
        return lengths

    @property
    def bytes_in(self) -> Ints:
        """Bytes of every row as sent: packed bytes, scales and zero points."""
        floats = np.maximum(self.scales.counts, 0) + np.maximum(self.zeros.counts, 0)
        total: Ints = np.maximum(self.data.counts, 0) + 4 * floats
        return total


def check_rows(
    batch: pa.RecordBatch, request: QuantizedRequest, command: Command, limits: Limits, value_bytes: int
) -> CheckedRows:
    """Check one batch of a call whose schema has passed.

    Parameters
    ----------
    value_bytes : int
        Size of one weight for the limits: of those that are answered, or compared with.

    Raises
    ------
    InvalidRequestError
        The batch breaks Arrow's own rules, so that no row of it can be trusted, or is of another schema.
    TooLargeError
        It has more rows, or stands for more bytes of weights, than the limits allow.
    """
    check_frame(batch, request.schema, limits)
    failures: Failures = {}
    names = check_names(batch.column("layer_name"), limits, failures)
    _check_status(batch, request, failures)
    shapes, matrix = _read_shapes(batch.column("shape"), limits, failures)
    data = _bytes(batch.column("quantized_data"))
    scales, zeros = (_floats(batch, request, name, failures) for name in ("scales", "zero_points"))
    specs, spec_of_row = _read_specs(batch, request, command, (scales, zeros), matrix, failures)
    checked = CheckedRows(names, shapes, matrix, specs, spec_of_row, data, scales, zeros, None, failures)
    weights_read = None
    if request.dtype is not None:
        weights_read = borrow_weights(batch, request.dtype, failures)
        starts = weights_read.address + weights_read.offsets[:-1] * VALUE_BYTES[request.dtype]
        checked.weights = Cells(starts, weights_read.lengths, weights_read)
    _check_contents(checked)
    check_sizes(checked.lengths, value_bytes, limits, failures)
    matrix[list(failures)] = 0
    return checked


def _check_status(batch: pa.RecordBatch, request: QuantizedRequest, failures: Failures) -> None:
    """A row that failed when it was quantized has nothing to give back; it fails the same way again."""
    if "status" not in request.columns:
        return
    column = batch.column("status")
    for i in np.flatnonzero(pc.fill_null(pc.not_equal(column, "ok"), False).to_numpy(zero_copy_only=False)):
        status, reason = clip_text(column[int(i)].as_py(), 80), "no reason given"
        if "error" in request.columns and batch.column("error")[int(i)].is_valid:
            reason = clip_text(batch.column("error")[int(i)].as_py(), 400)
        known = status if status in ROW_STATUSES else "unsupported"
        failures.setdefault(int(i), (known, f'the row\'s own status is "{status}", not "ok": {reason}'))


def _read_shapes(column: pa.Array, limits: Limits, failures: Failures) -> tuple[pa.Array, Ints]:
    borrowed = borrow(column, 8, "shape")
    rows = len(column)
    matrix = np.empty((rows, 2), np.int64)
    read_shapes(borrowed, np.full(rows, -1, np.int64), limits.max_dims, matrix)
    if column.null_count:
        matrix[column.is_null().to_numpy(zero_copy_only=False)] = -1
    if column.values.null_count:
        matrix[list(_rows_with(column.values.is_null().to_numpy(zero_copy_only=False), borrowed.offsets))] = -1
    for i in np.flatnonzero(matrix[:, 0] < 0):
        shown = column[int(i)].as_py() if column[int(i)].is_valid else None
        text = (
            f"shape is {None if shown is None else shown[: limits.max_dims + 1]}; expected at most {limits.max_dims} "
            "axes, none negative, of at most 2^48 weights in all"
        )
        failures.setdefault(int(i), ("shape_mismatch", text))
        matrix[i] = 0
    return column if column.type == _SHAPE else column.cast(_SHAPE), matrix


def _rows_with(marked: npt.NDArray[np.bool_], offsets: Ints) -> dict[int, int]:
    """Rows of a list column that hold a marked value, and the place of the first such value in its row."""
    places = np.flatnonzero(marked)
    rows = np.searchsorted(offsets, places, side="right") - 1
    inside = (rows >= 0) & (rows < len(offsets) - 1)
    rows, places = rows[inside], places[inside]
    found, first = np.unique(rows, return_index=True)
    return {int(row): int(places[at] - offsets[row]) for row, at in zip(found, first, strict=True)}


def _bytes(column: pa.Array) -> Cells:
    """A binary column's cells. Full validation has checked its offsets against its buffer."""
    width = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    rows = len(column)
    _, offsets_buffer, values = column.buffers()
    offsets = np.frombuffer(offsets_buffer, width, rows + 1, column.offset * np.dtype(width).itemsize).astype(np.int64)
    counts = np.diff(offsets)
    if values is not None and not values.is_cpu:
        raise InvalidRequestError('column "quantized_data" is not in main memory', field="quantized_data")
    if column.null_count:
        counts[column.is_null().to_numpy(zero_copy_only=False)] = -1
    return Cells(offsets[:-1] + (0 if values is None else values.address), counts, column)


def _floats(batch: pa.RecordBatch, request: QuantizedRequest, name: str, failures: Failures) -> Cells:
    """The cells of ``scales`` or ``zero_points``; a row with null or NaN among them fails."""
    if name not in request.columns:
        return Cells(np.zeros(batch.num_rows, np.int64), np.full(batch.num_rows, -1, np.int64))
    column = batch.column(name)
    borrowed = borrow(column, 4, name)
    counts = borrowed.lengths
    if column.null_count:
        counts[column.is_null().to_numpy(zero_copy_only=False)] = -1
    if column.values.null_count:
        missing = column.values.is_null().to_numpy(zero_copy_only=False)
        for row, at in _rows_with(missing, borrowed.offsets).items():
            if counts[row] > 0:
                failures.setdefault(row, ("null_weights", f'"{name}" has null at {at}; expected numbers'))
    last = int(borrowed.offsets[-1])
    if last:
        buffer = column.values.buffers()[1]
        values = np.frombuffer(buffer, np.float32, last, column.values.offset * 4)
        if np.isnan(np.max(values)):
            for row, at in _rows_with(np.isnan(values), borrowed.offsets).items():
                if counts[row] > 0:
                    failures.setdefault(row, ("non_finite", f'"{name}" has NaN at {at}; expected numbers'))
    return Cells(borrowed.address + borrowed.offsets[:-1] * 4, counts, borrowed)


def _read_specs(
    batch: pa.RecordBatch,
    request: QuantizedRequest,
    command: Command,
    floats: tuple[Cells, Cells],
    matrix: Ints,
    failures: Failures,
) -> tuple[list[LayerSpec], Ints]:
    """What each row was made with; a row that says what cannot be fails."""
    rows = batch.num_rows
    texts, which = {}, {}
    for name in ("scheme", "packing"):
        if name in request.columns:
            encoded = batch.column(name).dictionary_encode()
            texts[name] = encoded.dictionary
            which[name] = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
        else:
            which[name] = np.full(rows, -1, np.int64)
    for name in ("bit_width", "group_size"):
        which[name] = np.full(rows, _NOT_SAID, np.int64)
        if name in request.columns:
            which[name] = pc.fill_null(batch.column(name).cast(pa.int64()), _NOT_SAID).to_numpy().astype(np.int64)
    scales, zeros = floats
    counted = np.where(scales.counts < 0, 0, np.where((scales.counts == 1) & (matrix[:, 0] != 1), 2, 1))
    key = np.stack([*which.values(), counted, zeros.counts >= 0], axis=1)
    kinds, kind_of_row = np.unique(key, axis=0, return_inverse=True)
    kind_of_row = kind_of_row.reshape(-1)
    specs: list[LayerSpec] = []
    spec_of_kind = np.zeros(len(kinds), np.int64)
    for k, (scheme, packing, bits, size, scaled, asymmetric) in enumerate(kinds.tolist()):
        try:
            spec = stored_spec(
                texts["scheme"][scheme].as_py() if scheme >= 0 else command.scheme,
                texts["packing"][packing].as_py() if packing >= 0 else None,
                bits if bits != _NOT_SAID else None,
                size if size != _NOT_SAID else command.group_size,
                one_scale=(None, False, True)[scaled],
                asymmetric=bool(asymmetric),
            )
        except InvalidRequestError as error:
            for i in np.flatnonzero(kind_of_row == k):
                failures.setdefault(int(i), ("unsupported", error.message))
            continue
        if spec not in specs:
            specs.append(spec)
        spec_of_kind[k] = specs.index(spec)
    return specs, spec_of_kind[kind_of_row]


def _check_contents(checked: CheckedRows) -> None:
    """Packed bytes, scales and zero points (and weights) must be as many as the shape asks for."""
    failures = checked.failures
    matrix = checked.matrix
    matrix[list(failures)] = 0
    weights = checked.weights
    if weights is not None:
        for i in np.flatnonzero(weights.counts != checked.lengths):
            if int(i) not in failures:
                text = f"{weights.counts[i]} weights; expected {checked.lengths[i]}, the product of the shape"
                failures[int(i)] = ("shape_mismatch", text)
    matrix[list(failures)] = 0
    for s, spec in enumerate(checked.specs):
        mine = np.flatnonzero((checked.spec_of_row == s) & (checked.lengths > 0))
        if mine.size:
            _check_sizes_of(checked, spec, mine)
    matrix[list(failures)] = 0


def _check_sizes_of(checked: CheckedRows, spec: LayerSpec, mine: Ints) -> None:
    failures = checked.failures
    # Layers of a model share a few shapes, so that each is asked about once.
    shapes, which = np.unique(checked.matrix[mine], axis=0, return_inverse=True)
    which = which.reshape(-1)
    fitting = [fits_groups(spec, cols) and fits_transpose(spec, rows, cols) for rows, cols in shapes.tolist()]
    fits = np.array(fitting)[which]
    for i in mine[~fits]:
        text = (
            f"a matrix of {checked.matrix[i].tolist()} weights cannot be cut into groups of "
            f"{spec.group_size or 'a row'} and packed as {spec.scheme.packing}"
        )
        failures.setdefault(int(i), ("shape_mismatch", text))

    def of_shape(ask: Callable[[LayerSpec, int, int], int]) -> Ints:
        answers = [ask(spec, *shape) if good else 0 for shape, good in zip(shapes.tolist(), fitting, strict=True)]
        return np.array(answers, np.int64)[which]

    wanted = of_shape(packed_bytes)
    counts = checked.data.counts[mine]
    for at in np.flatnonzero(fits & (counts != wanted)):
        i = int(mine[at])
        if counts[at] < 0:
            failures.setdefault(i, ("null_weights", '"quantized_data" is null; expected packed bytes'))
        else:
            text = f'"quantized_data" has {counts[at]} bytes; expected {wanted[at]} for this shape'
            failures.setdefault(i, ("shape_mismatch", text))
    scales = of_shape(scale_count)
    needed = {"scales": not spec.scheme.scales_inside, "zero_points": not spec.symmetric}
    for (name, needs), cells in zip(needed.items(), (checked.scales, checked.zeros), strict=True):
        counts = cells.counts[mine]
        bad = counts != scales if needs else (counts >= 0) & (counts != scales)
        for at in np.flatnonzero(fits & bad):
            got = "null" if counts[at] < 0 else f"{counts[at]} values"
            text = f'"{name}" is {got}; expected {scales[at]} values for {spec.scheme.name} of this shape'
            failures.setdefault(int(mine[at]), ("shape_mismatch", text))
