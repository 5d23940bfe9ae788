"""Weights as people hold them, without a copy where none is needed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from fq_testing import same_bits, stored_as

from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer, as_layer, as_reader, layers_batch, named_layers
from flightquant.wire import check_request_schema

MATRIX = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("shape", [(), (6,), (4, 6), (2, 3, 4), (0, 4), (4, 0)])
def test_an_array_is_shared_not_copied(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype)
    layer = as_layer("w", array)
    assert (layer.name, layer.shape, layer.dtype, layer.copied) == ("w", shape, dtype, 0)
    assert layer.data.shape == (array.size,)
    assert array.size == 0 or layer.data.ctypes.data == array.ctypes.data


def test_ml_dtypes_bfloat16_is_shared_as_bits() -> None:
    array = MATRIX.astype(ml_dtypes.bfloat16)
    layer = as_layer("w", array)
    assert (layer.dtype, layer.data.dtype, layer.copied) == ("bfloat16", np.uint16, 0)
    assert layer.data.ctypes.data == array.ctypes.data
    same_bits(layer.data, stored_as(MATRIX, "bfloat16").reshape(-1), "bits")


@pytest.mark.parametrize(
    "array",
    [
        MATRIX[:, ::2],
        MATRIX.T,
        MATRIX[::-1],
        np.asfortranarray(MATRIX),
        MATRIX.astype(">f4"),
        MATRIX.astype(">f2"),
        MATRIX.astype(">f8"),
        np.broadcast_to(np.float32(3), (4, 6)),
    ],
)
def test_strided_and_foreign_arrays_are_copied_and_counted(array: np.ndarray) -> None:
    layer = as_layer("w", array)
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    same_bits(layer.data, native.reshape(-1), "values")
    assert layer.data.dtype.isnative
    assert layer.copied == layer.nbytes == native.nbytes


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint16", "bool", "complex64", "longdouble", "S4", "object"])
def test_other_dtypes_are_refused_and_named(dtype: str) -> None:
    with pytest.raises(InvalidRequestError, match="expected float32") as caught:
        as_layer("model.w", np.zeros(4, dtype))
    assert "model.w" in caught.value.message
    assert caught.value.field == "weights"


@pytest.mark.parametrize("name", [None, 3, b"w"])
def test_a_name_must_be_text(name: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        as_layer(name, MATRIX)
    assert caught.value.field == "layer_name"


def test_an_arrow_array_is_shared() -> None:
    array = pa.array(MATRIX.reshape(-1))
    layer = as_layer("w", array)
    assert layer.data.ctypes.data == array.buffers()[1].address
    assert as_layer("again", layer) is layer


def test_a_part_shares_memory_and_keeps_the_inner_shape() -> None:
    layer = as_layer("w", np.arange(60, dtype=np.float32).reshape(5, 3, 4))
    part = layer.part(2, 4)
    assert (part.name, part.shape) == ("w", (2, 3, 4))
    assert part.data.ctypes.data == layer.data.ctypes.data + 2 * 12 * 4
    same_bits(part.data, np.arange(24, 48, dtype=np.float32), "part")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_one_layer_makes_a_batch_that_borrows_it(dtype: str) -> None:
    values = stored_as(MATRIX, dtype)
    layer = Layer("w", (4, 6), dtype, values.reshape(-1))
    batch = layers_batch([layer])
    assert check_request_schema(batch.schema) == dtype
    batch.validate(full=True)
    column = batch.column("weights")
    assert column.values.buffers()[1].address == values.ctypes.data
    assert batch.column("shape").to_pylist() == [[4, 6]]
    assert batch.schema.names == ["layer_name", "weights", "shape"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_several_layers_make_one_batch(dtype: str) -> None:
    layers = [Layer(f"w{n}", (n,), dtype, stored_as(np.arange(n, dtype=np.float32), dtype)) for n in (0, 5, 1, 0, 32)]
    batch = layers_batch(layers, [None, 0, 7, None, 2])
    check_request_schema(batch.schema)
    batch.validate(full=True)
    assert batch.column("layer_name").to_pylist() == ["w0", "w5", "w1", "w0", "w32"]
    assert batch.column("row_offset").to_pylist() == [None, 0, 7, None, 2]
    for i, layer in enumerate(layers):
        values = batch.column("weights")[i].values
        same_bits(values.to_numpy(), layer.data, layer.name)


def test_named_layers_keep_their_order() -> None:
    assert [layer.name for layer in named_layers({"b": MATRIX, "a": MATRIX[0]})] == ["b", "a"]


class StreamOnly:
    """Any Arrow producer: nothing but the stream protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


def test_every_arrow_holder_becomes_a_reader() -> None:
    batch = layers_batch([as_layer("w", MATRIX)])
    table = pa.Table.from_batches([batch, batch])
    for weights, rows in (
        (batch, 1),
        (table, 2),
        (table.to_reader(), 2),
        (StreamOnly(table), 2),
        (pa.Table.from_batches([], batch.schema), 0),
    ):
        reader = as_reader(weights)
        assert reader.schema.equals(batch.schema, check_metadata=True)
        assert reader.read_all().num_rows == rows


@pytest.mark.parametrize("weights", [None, 3, [1.0], "path", MATRIX])
def test_what_holds_no_layers_is_refused(weights: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected a mapping") as caught:
        as_reader(weights)
    assert caught.value.field == "weights"
