"""Tables in arrow_quant_v2's columns: made from arrays, made from answers, and turned back into weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flightquant import reference
from flightquant.errors import InvalidRequestError
from flightquant.layers import as_layer
from flightquant.spec import BIT_WIDTHS

RESULT_SCHEMA = pa.schema(
    [
        pa.field("layer_name", pa.utf8()),
        pa.field("quantized_data", pa.binary()),
        pa.field("scales", pa.list_(pa.float32())),
        pa.field("zero_points", pa.list_(pa.float32())),
        pa.field("shape", pa.list_(pa.int64())),
        pa.field("bit_width", pa.uint8()),
    ]
)
GROUP_SIZES = (256, 128, 64, 32)
_REQUEST_SCHEMA = pa.schema(
    [
        pa.field("layer_name", pa.utf8()),
        pa.field("weights", pa.list_(pa.float32())),
        pa.field("shape", pa.list_(pa.int64())),
    ]
)


def numpy_to_arrow_table(weights_dict: Mapping[str, npt.NDArray[np.float32]]) -> pa.Table:
    """A dict of float32 arrays as a table of ``layer_name``, ``weights`` and ``shape``, sharing memory with them.

    Parameters
    ----------
    weights_dict : dict of str to float32 array of any shape

    Returns
    -------
    Table
        One chunk for each layer: nothing is copied, unless an array is not contiguous.

    Raises
    ------
    InvalidRequestError
        It is no dict, an array is empty, or one is not float32.
    """
    if not isinstance(weights_dict, Mapping):
        raise InvalidRequestError(
            f"weights_dict is a {type(weights_dict).__name__}; expected a dict of NumPy arrays", field="weights_dict"
        )
    batches = []
    for name, array in weights_dict.items():
        kind = getattr(array, "dtype", type(array).__name__)
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.size == 0:
            got = "no weights" if getattr(array, "size", 1) == 0 else str(kind)
            raise InvalidRequestError(
                f'layer "{name}" has {got}; expected a float32 array, as array.astype(np.float32) makes one '
                "(quantize_batch takes other float dtypes as they are)",
                field="weights_dict",
                got=got,
            )
        layer = as_layer(name, array)
        offsets = pa.array([0, layer.data.size], pa.int32())
        columns = [
            pa.array([name], pa.utf8()),
            pa.ListArray.from_arrays(offsets, pa.array(layer.data)),
            pa.array([list(layer.shape)], pa.list_(pa.int64())),
        ]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=_REQUEST_SCHEMA))
    return pa.Table.from_batches(batches, schema=_REQUEST_SCHEMA)


def grouping(shape: Sequence[int], group_size: int = 128) -> dict[str, Any]:
    """The ``granularity`` and ``group_size`` for a layer: the largest size, up to that given, that divides its rows."""
    cols = shape[-1] if shape else 1
    fitting = next((size for size in GROUP_SIZES if size <= group_size and cols % size == 0), None)
    return {"granularity": "group", "group_size": fitting} if fitting else {"granularity": "channel"}


def with_groupings(batch: pa.RecordBatch, group_size: int = 128) -> pa.RecordBatch:
    """A request batch of ``layer_name``, ``weights`` and ``shape`` with each row's own grouping.

    Raises
    ------
    InvalidRequestError
        A column is missing or ``weights`` is no list.
    """
    for name in ("layer_name", "weights"):
        if name not in batch.schema.names:
            raise InvalidRequestError(f'column "{name}" is missing', field=name, expected="a column of this name")
    kept = batch.select([name for name in ("layer_name", "weights", "shape") if name in batch.schema.names])
    chosen = [grouping(shape, group_size) for shape in _shapes(kept)]
    for name, kind in (("granularity", pa.utf8()), ("group_size", pa.int32())):
        kept = kept.append_column(name, pa.array([choice.get(name) for choice in chosen], kind))
    return kept


def _shapes(batch: pa.RecordBatch) -> list[list[int]]:
    """Each row's shape as far as it is sound; what is not sound is for the engine to report."""
    weights = batch.column("weights")
    kind = weights.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return [[1]] * batch.num_rows
    lengths = [len(row) if row.is_valid else 1 for row in weights]
    if "shape" not in batch.schema.names:
        return [[length] for length in lengths]
    shapes = batch.column("shape").to_pylist()
    return [
        shape if isinstance(shape, list) and None not in shape else [length]
        for shape, length in zip(shapes, lengths, strict=True)
    ]


def dequantize(
    result: pa.Table | pa.RecordBatch | Mapping[str, Mapping[str, Any]],
) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of a result of this module, as float32 arrays by layer name.

    Parameters
    ----------
    result : Table, RecordBatch or dict
        What any of the quantizing calls gave.

    Raises
    ------
    InvalidRequestError
        A column is missing, or the bytes do not fit the shape.
    """
    if isinstance(result, Mapping):
        rows = [{"layer_name": name, **values} for name, values in result.items()]
        table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    else:
        table = pa.Table.from_batches([result]) if isinstance(result, pa.RecordBatch) else result
        missing = [name for name in RESULT_SCHEMA.names if name not in table.schema.names]
        if missing:
            raise InvalidRequestError(f"the table has no column {missing[0]!r}", field=missing[0])
    shapes = table.column("shape").to_pylist()
    counts = pc.list_value_length(table.column("scales")).to_pylist()
    sizes = [_group_size(shape, count) for shape, count in zip(shapes, counts, strict=True)]
    schemes = [BIT_WIDTHS[width] for width in table.column("bit_width").to_pylist()]
    answers = table.append_column("scheme", pa.array(schemes, pa.utf8()))
    answers = answers.append_column("group_size", pa.array(sizes, pa.int32()))
    answers = answers.append_column("status", pa.array(["ok"] * len(sizes), pa.utf8()))
    return reference.dequantize(answers.append_column("error", pa.nulls(len(sizes), pa.utf8())))


def _group_size(shape: list[int], scales: int) -> int:
    """Weights for each of a layer's scales; 0 where there is one for each row."""
    rows = prod(shape[:-1])
    return shape[-1] * rows // scales if scales > rows > 0 else 0
