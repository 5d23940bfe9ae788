"""The same quantization in-process, with the same arguments and the same answer as the service."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa

from flightquant.cython_core.engine import Engine, Limits
from flightquant.layers import as_reader, layers_batch, named_layers
from flightquant.spec import Command
from flightquant.wire import ANSWER_FIELDS, answer_schema

_UNLIMITED = Limits(max_rows=2**31 - 1, max_layer_bytes=2**62, max_batch_bytes=2**62, max_name_bytes=2**31 - 1)


@lru_cache(maxsize=4)
def shared_engine(n_threads: int | None = None) -> Engine:
    """The process's engine for so many threads; made at first use, and made anew in a forked child."""
    return Engine(n_threads)


# A child has none of its parent's threads.
os.register_at_fork(after_in_child=shared_engine.cache_clear)


def quantize(
    weights: Any,
    scheme: str | None = None,
    *,
    bit_width: int | None = None,
    granularity: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_dtype: str | None = None,
    on_error: str | None = None,
    metrics: bool | None = None,
    n_threads: int | None = None,
) -> pa.Table:
    """Quantize layers in this process.

    Parameters
    ----------
    weights : mapping, Table, RecordBatch, RecordBatchReader or object with ``__arrow_c_stream__``
        Names to NumPy arrays or torch tensors (float32, float16, bfloat16, float64; any shape), or Arrow data with the
        contract's request columns.
    scheme : str
        ``"int8"``, ``"int4"``, ``"q8_0"``, ``"q4_0"``; or give ``bit_width`` 4 or 8.
    granularity : {"tensor", "channel", "group"}, optional
        What one scale covers.
    group_size : int, optional
        Weights for each scale along the last axis: 32, 64, 128 or 256.
    symmetric : bool, optional
        False adds zero points. Default true.
    scale_dtype : {"float32", "float16", "bfloat16"}, optional
        Dtype to which scales are rounded; default the weights' own.
    on_error : {"row", "abort"}, optional
        Whether a bad layer becomes a row that says so (default) or raises.
    metrics : bool, optional
        Fill the quality columns. Default true.
    n_threads : int, optional
        Compute threads; by default the CPUs that the process may use.

    Returns
    -------
    Table
        One answer row for each layer, in order, with the columns of the wire contract.

    Raises
    ------
    InvalidRequestError
        An option, a column or a dtype is not what the contract allows.
    LayerError
        A bad layer, with ``on_error="abort"``.
    """
    command = Command.build(
        scheme=scheme,
        bit_width=bit_width,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        on_error=on_error,
        metrics=metrics,
    )
    engine = shared_engine(n_threads)
    if isinstance(weights, Mapping):
        answers = list(_quantize_mapping(engine, weights, command))
        return pa.Table.from_batches(answers, schema=answer_schema(pa.schema([])))
    reader = as_reader(weights)
    session = engine.session(reader.schema, command, _UNLIMITED)
    return pa.Table.from_batches(
        [session.quantize(batch).batch for batch in reader if batch.num_rows], schema=session.schema
    )


def _quantize_mapping(engine: Engine, weights: Mapping[str, Any], command: Command) -> Iterator[pa.RecordBatch]:
    """One answer batch for each layer: layers lie apart in memory, and to join them would be a copy."""
    copied_column = [field.name for field in ANSWER_FIELDS].index("bytes_copied")
    for layer in named_layers(weights):
        batch = layers_batch([layer])
        answer = engine.session(batch.schema, command, _UNLIMITED).quantize(batch).batch
        if layer.copied:
            copied = pa.array([layer.copied], pa.int64())
            answer = answer.set_column(copied_column, answer.schema.field(copied_column), copied)
        yield answer
