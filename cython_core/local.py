"""The same operations in-process, with the same arguments and the same answer as the service."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from flightquant import reference
from flightquant.cython_core.engine import Between, Engine, Limits
from flightquant.cython_core.magnitude import AmaxSession, amax_of_layers
from flightquant.cython_core.restore import QuantizedSession, restore_arrays
from flightquant.errors import LayerError
from flightquant.layers import Layer, as_reader, named_layers, refuse_importance
from flightquant.quantized import quantized_batches, with_weights
from flightquant.spec import Command
from flightquant.wire import ANSWER_FIELDS, amax_schema, answer_schema, verified_schema

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
    packing: str | None = None,
    granularity: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    scale_dtype: str | None = None,
    importance: Mapping[str, Any] | None = None,
    calibration: str | None = None,
    fallback: bool | None = None,
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
        A name of ``flightquant schemes``, which tells what each takes; or give ``bit_width`` 2, 4 or 8.
    packing : str, optional
        Layout of the codes, where the scheme has several: ``"gptq"``, ``"awq"``, ``"onnx"``. Default its first.
    granularity : {"tensor", "channel", "group", "block"}, optional
        What one scale covers.
    group_size : int, optional
        Weights for each scale along the last axis, or along the flat tensor for bitsandbytes' schemes.
    symmetric : bool, optional
        False adds zero points. Default true.
    scale_dtype : {"float32", "float16", "bfloat16"}, optional
        Dtype to which scales are rounded; default the weights' own.
    importance : mapping of str to array of shape (columns,), optional
        What an error in each column (input feature) of a layer counts, by layer name: finite numbers of 0 or more, as
        in llama.cpp's importance matrix. For the schemes that search (``q2_k`` to ``q6_k``, ``iq4_nl``); others ignore
        it. Layers that it does not name have none. Arrow data has a column ``importance`` instead.
    calibration : {"absmax", "mse", "proximal"}, optional
        How the range of a scale of ``int2`` to ``int8`` is found: from its extreme weights (default), or shrunk to
        where the squared error, weighed by ``importance``, is the least. ``proximal`` moves the zero points of ``hqq*``
        as hqq's optimizer does.
    fallback : bool, optional
        True: rows that are no multiple of 256, but of 32, get the scheme that llama.cpp takes there in place of a
        k-quant; the answer names it.
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
        packing=packing,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        calibration=calibration,
        fallback=fallback,
        on_error=on_error,
        metrics=metrics,
    )
    engine = shared_engine(n_threads)
    if isinstance(weights, Mapping):
        answers = list(_quantize_mapping(engine, weights, command, importance))
        return pa.Table.from_batches(answers, schema=None if answers else answer_schema(pa.schema([])))
    refuse_importance(importance)
    reader = as_reader(weights)
    session = engine.session(reader.schema, command, _UNLIMITED)
    return pa.Table.from_batches(
        [session.quantize(batch).batch for batch in reader if batch.num_rows], schema=session.schema
    )


MAX_JOINED_BYTES = 64 << 20
MAX_JOINED_LAYERS = 1024
"""Of the layers that are answered as one batch: enough that what a batch costs beside its kernels does not count."""


def _quantize_mapping(
    engine: Engine, weights: Mapping[str, Any], command: Command, importance: Mapping[str, Any] | None
) -> Iterator[pa.RecordBatch]:
    for layers in runs(named_layers(weights, importance)):
        yield answer_run(engine, layers, command)


def answer_run(engine: Engine, layers: list[Layer], command: Command, between: Between | None = None) -> pa.RecordBatch:
    """The answer to layers of one dtype as they lie in memory, apart from one another: to join them would be a copy."""
    answer = engine.quantize_layers(layers, command, between).batch
    if any(layer.copied for layer in layers):
        place = [field.name for field in ANSWER_FIELDS].index("bytes_copied")
        copied = pa.array([layer.copied for layer in layers], pa.int64())
        answer = answer.set_column(place, answer.schema.field(place), copied)
    return answer


def runs(layers: Iterator[Layer], max_bytes: int = MAX_JOINED_BYTES) -> Iterator[list[Layer]]:
    """Runs of layers of one dtype, of bounded size; a larger layer stands alone."""
    run: list[Layer] = []
    nbytes = 0
    for layer in layers:
        full = nbytes + layer.nbytes > max_bytes or len(run) == MAX_JOINED_LAYERS
        if run and (full or layer.dtype != run[0].dtype):
            yield run
            run, nbytes = [], 0
        run.append(layer)
        nbytes += layer.nbytes
    if run:
        yield run


def amax(weights: Any, *, n_threads: int | None = None) -> pa.Table:
    """The largest magnitude of each layer, as float32.

    Layers that a kernel runs as one (query, key and value; gate and up), and parts of one layer, need one scale of the
    whole tensor in ``nvfp4`` and with granularity ``tensor``: the largest of theirs, as ``global_amax`` of each.

    Parameters
    ----------
    weights : mapping, Table, RecordBatch, RecordBatchReader or object with ``__arrow_c_stream__``
        As for ``quantize``.
    n_threads : int, optional
        Compute threads; by default the CPUs that the process may use.

    Returns
    -------
    Table
        One row for each layer: ``layer_name``, ``shape``, ``row_offset``, ``status``, ``error``, ``amax`` (0 of an
        empty layer, null of one that is bad), ``kernel_ns``, ``bytes_in``.

    Raises
    ------
    InvalidRequestError
        A column or a dtype is not what the contract allows.
    """
    engine = shared_engine(n_threads)
    if isinstance(weights, Mapping):
        answers = list(amax_of_layers(engine, runs(named_layers(weights))))
        return pa.Table.from_batches(answers, schema=None if answers else amax_schema(pa.schema([])))
    reader = as_reader(weights)
    session = AmaxSession(engine, reader.schema, Command.build(op="amax"), _UNLIMITED)
    return pa.Table.from_batches(
        [session.quantize(batch).batch for batch in reader if batch.num_rows], schema=session.schema
    )


def dequantize(
    answers: pa.Table | pa.RecordBatch, *, dtype: str = "float32", n_threads: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """The layers of a table of answer rows, as arrays of their own shapes, by name and in order.

    A layer that came in parts (rows of one name with ``row_offset``) is joined again.

    Parameters
    ----------
    answers : Table or RecordBatch
        What ``quantize`` gave, here or from a server; the columns that the scheme needs suffice.
    dtype : {"float32", "float16"}, optional
        Of the arrays.
    n_threads : int, optional
        Compute threads; by default the CPUs that the process may use.

    Raises
    ------
    LayerError
        A row whose status is not ``ok``: it has nothing to give back; or NaN among its scales.
    InvalidRequestError
        A column is missing, or the bytes do not fit the shape.
    """
    command = Command.build(op="dequantize", dtype=dtype)
    engine = shared_engine(n_threads)
    parts: reference.Parts = {}
    for batch in quantized_batches(answers):
        checked, arrays = restore_arrays(engine, batch, command, _UNLIMITED)
        if checked.failures:
            # In the reference's own words: what it raises for the first row that is bad.
            reference.dequantize(batch)
            status, text = checked.failures[min(checked.failures)]
            raise LayerError(status, text)
        offsets = batch.column("row_offset").to_pylist() if "row_offset" in batch.schema.names else [None] * len(arrays)
        for name, offset, array in zip(checked.names.to_pylist(), offsets, arrays, strict=True):
            parts.setdefault(name, []).append((offset, array))
    return reference.join_parts(parts)


def verify(weights: Any, answers: pa.Table | pa.RecordBatch, *, n_threads: int | None = None) -> pa.Table:
    """Compare quantized layers with weights: the quality columns that ``quantize`` gives, bit for bit.

    Parameters
    ----------
    weights : mapping, Table, RecordBatch, RecordBatchReader or object with ``__arrow_c_stream__``
        As for ``quantize``: at least every layer that the answers name.
    answers : Table or RecordBatch
        What ``quantize`` gave, here or from a server: whole layers.
    n_threads : int, optional
        Compute threads; by default the CPUs that the process may use.

    Returns
    -------
    Table
        One row for each row of ``answers``: ``layer_name``, ``shape``, ``status``, ``error`` and the quality columns.

    Raises
    ------
    InvalidRequestError
        A layer has no weights, or a column is missing.
    """
    engine = shared_engine(n_threads)
    command = Command.build(op="verify")
    made = [
        QuantizedSession(engine, batch.schema, command, _UNLIMITED).answer(batch).batch
        for batch in with_weights(weights, answers)
    ]
    return pa.Table.from_batches(made, schema=verified_schema(pa.schema([])))
