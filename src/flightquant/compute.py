"""The schemes as Arrow Compute functions: data set projections and Acero plans quantize while they scan.

>>> import pyarrow as pa, pyarrow.compute as pc, flightquant.compute
>>> "flightquant_int4" in flightquant.compute.register()
True
>>> weights, shape = pa.array([[1.0] * 256], pa.list_(pa.float32())), pa.array([[2, 128]])
>>> pc.call_function("flightquant_int4", [weights, shape]).field("status").to_pylist()
['ok']

An Arrow function has one signature and no options, so :func:`register` makes one for each scheme and dtype, with the
scheme's defaults; :func:`expression` makes what a column's own type and other options need.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flightquant import wire
from flightquant.errors import InvalidRequestError
from flightquant.layers import weights_field
from flightquant.schemes import SCHEMES, WEIGHT_DTYPES
from flightquant.spec import Command

_NOT_COMPUTED = ("layer_name", "shape", "row_offset")
RESULT_TYPE = pa.struct([field for field in wire.ANSWER_FIELDS if field.name not in _NOT_COMPUTED])
"""What a function gives for each row: the answer's columns but for those that the row has itself."""
SHAPE_TYPE = pa.list_(pa.int64())

_registered: set[str] = set()
_lock = Lock()


def register() -> list[str]:
    """Register every scheme with its defaults; to call it again does nothing.

    Returns
    -------
    list of str
        ``flightquant_<scheme>`` for float32 weights, ``flightquant_<scheme>_<dtype>`` for others. Each takes weights
        (``list`` of the dtype; of ``uint16`` for bfloat16) and shapes (``list<int64>``, or a null for one row) and
        gives a struct of :data:`RESULT_TYPE`.
    """
    return [
        _register(
            f"flightquant_{scheme}" + ("" if dtype == "float32" else f"_{dtype}"),
            Command.build(scheme=scheme),
            _nullable(weights_field(dtype)),
        )
        for scheme in SCHEMES
        for dtype in WEIGHT_DTYPES
    ]


def expression(
    schema: pa.Schema,
    scheme: str | None = None,
    *,
    weights: str = "weights",
    shape: str | None = "shape",
    bit_width: int | None = None,
    packing: str | None = None,
    granularity: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_dtype: str | None = None,
    metrics: bool | None = None,
) -> pc.Expression:
    """The quantized layers of a data set or plan, as an expression to project: a struct column of :data:`RESULT_TYPE`.

    Parameters
    ----------
    schema : Schema
        The data set's: the weights' exact type, and their dtype if they are bfloat16, come from there.
    weights, shape : str
        Names of its columns. ``shape=None``, or a schema without that column: each layer is one row.
    scheme, bit_width, packing, granularity, group_size, symmetric, scale_dtype, metrics
        As in :func:`flightquant.quantize`. A layer that cannot be quantized is a row whose ``status`` says so.

    Raises
    ------
    InvalidRequestError
        The options cannot be, or a column is missing or of another type than the contract's.

    Examples
    --------
    >>> columns = {"layer_name": pc.field("layer_name"), "q": expression(data.schema, "int4")}      # doctest: +SKIP
    >>> for batch in data.to_batches(columns=columns, batch_size=16): ...                           # doctest: +SKIP
    """
    command = Command.build(
        scheme=scheme,
        bit_width=bit_width,
        packing=packing,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        metrics=metrics,
    )
    if weights not in schema.names:
        raise InvalidRequestError(f'column "{weights}" is missing', field=weights, expected="a column of this name")
    held = schema.field(weights)
    tagged = held.with_metadata({**(held.metadata or {}), b"dtype": wire.weights_dtype(held).encode()})
    shape_type, shape_argument = SHAPE_TYPE, pc.scalar(pa.scalar(None, SHAPE_TYPE))
    if shape is not None and shape in schema.names:
        shape_type, shape_argument = schema.field(shape).type, pc.field(shape)
    name = f"flightquant {command.to_json().decode()} {held.type} {wire.weights_dtype(held)} {shape_type}"
    _register(name, command, tagged, shape_type)
    return pc.Expression._call(name, [pc.field(weights), shape_argument])


def _nullable(field: pa.Field) -> pa.Field:
    """The field as readers of files and ``pa.array`` make it, whose list items may be null."""
    return pa.field(field.name, pa.list_(field.type.value_type), metadata=field.metadata)


def _register(name: str, command: Command, weights: pa.Field, shape: pa.DataType = SHAPE_TYPE) -> str:
    with _lock:
        if name not in _registered:
            summary = SCHEMES[command.scheme].summary
            pc.register_scalar_function(
                _function(command, weights, shape),
                name,
                {"summary": f"Quantize layers to {summary}", "description": f"Options: {command.to_json().decode()}"},
                {"weights": weights.type, "shape": shape},
                RESULT_TYPE,
            )
            _registered.add(name)
    return name


def _function(command: Command, weights: pa.Field, shape: pa.DataType) -> Callable[..., pa.StructArray]:
    options = command.options()
    schema = pa.schema([pa.field("layer_name", pa.utf8()), weights.with_name("weights"), pa.field("shape", shape)])

    def quantized(context: Any, values: pa.Array, shapes: pa.Array) -> pa.StructArray:
        rows = context.batch_length
        if rows == 0:
            return pa.array([], RESULT_TYPE)
        from flightquant import quantize

        names = pa.array([f"row {row}" for row in range(rows)], pa.utf8())
        columns = [names, *(pa.repeat(arg, rows) if isinstance(arg, pa.Scalar) else arg for arg in (values, shapes))]
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        (answer,) = quantize(batch, **options).to_batches()
        fields = list(RESULT_TYPE)
        return pa.StructArray.from_arrays([answer.column(field.name) for field in fields], fields=fields)

    return quantized
