"""Which calls' batches ``_plain`` can answer, and how their columns come about."""

from __future__ import annotations

from functools import lru_cache, partial

import pyarrow as pa

from flightquant.cython_core._plain import OUTPUT_COLUMNS, Constants, PlainCall
from flightquant.cython_core.answer import QUALITY, same_options, usual_columns
from flightquant.cython_core.validate import Limits, Request
from flightquant.cython_core.work import row_divisor, spec_table
from flightquant.schemes import LayerSpec
from flightquant.spec import Command

_MAX_COLUMNS = 64


def plain_call(request: Request, answer: pa.Schema, command: Command, limits: Limits, isa: str) -> PlainCall | None:
    """What answers the usual batches of a call; None if its schema or command makes every batch unusual."""
    schema, columns = request.schema, request.columns
    usual = (
        "shape" in columns
        and schema.field("layer_name").type == pa.utf8()
        and schema.field("shape").type == pa.list_(pa.int64())
        and not request.overrides
        and columns.isdisjoint(("global_amax", "importance"))
        and len(answer) <= _MAX_COLUMNS
    )
    spec = command.layer_spec()
    if not usual or spec.fallback or spec.scheme.transposed or spec.scheme.fold > 1:
        return None
    made = _made(spec, command.metrics)
    echoed = [name for name in answer.names if name in columns]
    constant = tuple(name for name in answer.names if name not in made and name not in columns)
    where = [
        *((name, (0, constant.index(name))) for name in constant),
        *((name, (1, schema.get_field_index(name))) for name in echoed),
        *((name, (2, OUTPUT_COLUMNS.index(name))) for name in made),
    ]
    places = dict(where)
    used = (
        spec.scheme.name,
        spec.scheme.packing,
        spec.scheme.bits,
        spec.group_size,
        spec.scale_dtype_for(request.dtype),
    )
    weights = schema.field("weights").type
    fixed = pa.types.is_fixed_size_list(weights)
    return PlainCall(
        answer,
        spec.scheme.name,
        [places[name] for name in answer.names],
        tuple(schema.get_field_index(name) for name in ("layer_name", "weights", "shape", "row_offset")),
        spec_table((spec,), request.dtype),
        isa,
        command.metrics,
        request.value_bytes,
        0 if fixed else 8 if pa.types.is_large_list(weights) else 4,
        weights.list_size if fixed else 0,
        row_divisor(spec),
        min(limits.max_layer_bytes, limits.max_batch_bytes),
        limits.max_name_bytes,
        limits.max_dims,
        partial(_constants, constant, used),
    )


def _made(spec: LayerSpec, metrics: bool) -> tuple[str, ...]:
    """The answer's columns that the kernels fill."""
    absent = {
        *(("scales",) if spec.scheme.scales_inside else ()),
        *(("zero_points",) if spec.symmetric else ()),
        *(() if metrics else QUALITY),
    }
    return tuple(name for name in OUTPUT_COLUMNS if name not in absent)


@lru_cache(maxsize=256)
def _constants(names: tuple[str, ...], used: tuple[str, str, int, int | None, str | None], count: int) -> Constants:
    columns = usual_columns(count) | same_options(count, *used)
    return Constants(pa.RecordBatch.from_arrays([columns[name] for name in names], names=list(names)))
