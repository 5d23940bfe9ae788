"""``flightquant.quantize`` and ``flightquant.dequantize`` as people call them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from fq_testing import check_row, reference_layer, request, same_bits, stored_as

import flightquant
from flightquant import FlightquantError
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.reference import dequantize_matrix, matrix_shape
from flightquant.spec import Command
from flightquant.wire import ANSWER_FIELDS

RNG = np.random.default_rng(4)
MATRIX = RNG.standard_normal((4, 256)).astype(np.float32)
OPTIONS: list[dict[str, Any]] = [
    {"scheme": "int8"},
    {"scheme": "int8", "granularity": "tensor"},
    {"scheme": "int8", "group_size": 32, "symmetric": False},
    {"scheme": "int4"},
    {"scheme": "int4", "granularity": "channel", "symmetric": False},
    {"scheme": "int4", "granularity": "tensor", "symmetric": False},
    {"scheme": "int4", "group_size": 256, "scale_dtype": "float16"},
    {"scheme": "int2", "symmetric": False},
    {"scheme": "int5", "granularity": "channel"},
    {"scheme": "fp8_e4m3"},
    {"scheme": "fp8_e5m2", "granularity": "tensor"},
    {"scheme": "q8_0"},
    {"scheme": "q4_0"},
    {"scheme": "q4_1"},
    {"scheme": "q5_0"},
    {"scheme": "q5_1"},
    {"scheme": "iq4_nl"},
    {"scheme": "nvfp4"},
    {"scheme": "nf4"},
    {"scheme": "fp4", "group_size": 1024},
]


class StreamOnly:
    """Any Arrow producer: nothing but the stream protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


def check_table(table: pa.Table, layers: dict[str, Any], dtype: str, **options: Any) -> None:
    command = Command.build(**options)
    assert table.column("layer_name").to_pylist() == list(layers)
    assert table.column("shape").to_pylist() == [list(weights.shape) for weights in layers.values()]
    whole = table.combine_chunks().to_batches()[0]
    for i, weights in enumerate(layers.values()):
        check_row(whole, i, reference_layer(weights, dtype, command))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_dict_of_arrays(options: dict[str, Any], dtype: str) -> None:
    arrays = {
        "a": MATRIX.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype),
        "b.c": MATRIX.reshape(2, 2, 256).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype),
        "flat": MATRIX[0].astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype),
    }
    table = flightquant.quantize(arrays, **options)
    stored = {name: stored_as(array.astype(np.float64), dtype) for name, array in arrays.items()}
    check_table(table, stored, dtype, **options)
    assert table.schema.names == [field.name for field in ANSWER_FIELDS]
    assert table.schema.metadata[b"flightquant.contract"] == b"1"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_dequantize_gives_the_arrays_back(options: dict[str, Any]) -> None:
    command = Command.build(**options)
    layers = {
        "m": MATRIX,
        "cube": MATRIX.reshape(2, 2, 256),
        "row": MATRIX[1],
        "one row": MATRIX[:1],
        "empty": MATRIX[:0],
    }
    table = flightquant.quantize(layers, **options)
    back = flightquant.dequantize(table)
    assert list(back) == list(layers)
    for name, weights in layers.items():
        rows, cols = matrix_shape(weights.shape)
        made = reference_layer(weights, "float32", command)
        assert back[name].shape == weights.shape
        if weights.size:
            spec = command.layer_spec()
            zeros = None if spec.symmetric else made.zero_points
            again = dequantize_matrix(made.data, made.scales, zeros, spec, rows, cols)
            same_bits(back[name], again.reshape(weights.shape), name)
            assert np.abs(back[name] - weights).max() < max(0.6, 6 / 2**spec.scheme.bits)  # a step of the widest range
    for batch in table.to_batches():
        assert flightquant.dequantize(batch).keys() <= back.keys()


def test_a_layer_in_parts_is_joined_by_dequantize() -> None:
    parts = {"row_offset": pa.array([2, 0, 3]), "layer_name": pa.array(["w", "w", "w"])}
    batch = request({"b": MATRIX[2:3], "a": MATRIX[:2], "c": MATRIX[3:]}, columns=parts)
    back = flightquant.dequantize(flightquant.quantize(batch, "int8"))
    whole = flightquant.dequantize(flightquant.quantize({"w": MATRIX}, "int8"))
    assert list(back) == ["w"]
    same_bits(back["w"], whole["w"], "w")


def test_every_arrow_holder() -> None:
    layers = {f"w{i}": MATRIX[i : i + 1] for i in range(4)}
    items = list(layers.items())
    chunks = [request(dict(items[:2])), request(dict(items[2:3])), request(dict(items[3:]))]
    table = pa.Table.from_batches(chunks)
    assert table.column("weights").num_chunks == 3
    empty_chunk = pa.Table.from_batches([chunks[0], chunks[0].slice(0, 0), *chunks[1:]])
    for weights in (
        table,
        table.combine_chunks(),
        table.combine_chunks().to_batches()[0],
        table.to_reader(),
        StreamOnly(table),
        pa.RecordBatchReader.from_batches(chunks[0].schema, iter(chunks)),
        empty_chunk,
        table.slice(0),
    ):
        check_table(flightquant.quantize(weights, "int4"), layers, "float32", scheme="int4")
    sliced = flightquant.quantize(table.slice(1, 2), "int4")
    check_table(sliced, dict(items[1:3]), "float32", scheme="int4")


def test_columns_of_a_table_whose_chunks_do_not_line_up() -> None:
    layers = {f"w{i}": MATRIX[i : i + 1] for i in range(4)}
    batch = request(layers)
    columns = [
        pa.chunked_array([batch.column(0)[:1], batch.column(0)[1:]]),
        pa.chunked_array([batch.column(1)[:3], batch.column(1)[3:]]),
        pa.chunked_array([batch.column(2)]),
    ]
    table = pa.Table.from_arrays(columns, schema=batch.schema)
    check_table(flightquant.quantize(table, "int8"), layers, "float32", scheme="int8")


def test_nothing_to_quantize() -> None:
    for weights in ({}, pa.Table.from_batches([], request({"w": MATRIX}).schema)):
        table = flightquant.quantize(weights, "int4")
        assert table.num_rows == 0
        assert table.schema.names == [field.name for field in ANSWER_FIELDS]
        assert flightquant.dequantize(table) == {}


def test_layers_of_different_dtypes_in_one_dict() -> None:
    arrays = {"a": MATRIX, "b": MATRIX.astype(np.float16), "c": MATRIX.astype(ml_dtypes.bfloat16), "d": MATRIX * 1.0}
    table = flightquant.quantize(arrays, "int8")
    assert table.column("scale_dtype").to_pylist() == ["float32", "float16", "bfloat16", "float32"]
    assert set(table.column("status").to_pylist()) == {"ok"}


@pytest.mark.parametrize(
    "array",
    [
        MATRIX[:, ::-1],
        MATRIX[::2],
        MATRIX.T[:128].T,
        np.asfortranarray(MATRIX),
        MATRIX.astype(">f4"),
        MATRIX.astype(">f8"),
    ],
    ids=["reversed", "every other", "transposed", "fortran", "big-endian 4", "big-endian 8"],
)
def test_strided_and_foreign_arrays(array: Any) -> None:
    dtype = "float64" if array.dtype.itemsize == 8 else "float32"
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    check_table(flightquant.quantize({"w": array}, "int8"), {"w": native}, dtype, scheme="int8")


def test_scalars_and_empty_arrays() -> None:
    arrays = {"scalar": np.float32(3.0), "zero": np.zeros((), np.float32), "none": np.zeros((3, 0), np.float32)}
    table = flightquant.quantize(arrays, "int8")
    assert table.column("shape").to_pylist() == [[], [], [3, 0]]
    back = flightquant.dequantize(table)
    assert back["scalar"] == pytest.approx(3.0, rel=0.01)
    assert back["none"].shape == (3, 0)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_table(n_threads: int) -> None:
    large = {"w": RNG.standard_normal((700, 256)).astype(np.float32)}
    one, many = (flightquant.quantize(large, "int4", n_threads=count) for count in (1, n_threads))
    assert one.drop_columns(["kernel_ns"]).equals(many.drop_columns(["kernel_ns"]))


def test_a_bad_layer_is_a_row_or_an_error() -> None:
    layers = {"good": MATRIX, "bad": np.full((2, 256), np.nan, np.float32)}
    table = flightquant.quantize(layers, "int4")
    assert table.column("status").to_pylist() == ["ok", "non_finite"]
    with pytest.raises(LayerError, match="bad"):
        flightquant.quantize(layers, "int4", on_error="abort")
    with pytest.raises(LayerError, match="bad") as caught:
        flightquant.dequantize(table)
    assert caught.value.status == "non_finite"


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({"w": MATRIX}, {"scheme": "int5x"}, "int5x"),
        ({"w": MATRIX}, {}, "scheme"),
        ({"w": MATRIX}, {"scheme": "int4", "group_size": 100}, "group_size"),
        ({"w": MATRIX}, {"scheme": "int4", "symmetric": "no"}, "symmetric"),
        ({"w": MATRIX}, {"scheme": "q8_0", "symmetric": False}, "symmetric"),
        ({"w": MATRIX}, {"scheme": "int4", "n_threads": 0}, "n_threads"),
        ({"w": MATRIX.astype(np.int32)}, {"scheme": "int4"}, "int32"),
        ({"w": "text"}, {"scheme": "int4"}, "w"),
        ({"w": None}, {"scheme": "int4"}, "w"),
        ({1: MATRIX}, {"scheme": "int4"}, "name"),
        (MATRIX, {"scheme": "int4"}, "ndarray"),
        ([MATRIX], {"scheme": "int4"}, "list"),
        (pa.table({"weights": [[1.0]]}), {"scheme": "int4"}, "layer_name"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(weights: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        flightquant.quantize(weights, **options)


def test_an_error_of_ours_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="unknown scheme"):
        flightquant.quantize({"w": MATRIX}, "nf5")
    with pytest.raises(FlightquantError):
        flightquant.quantize({"w": MATRIX}, "nf5")


@pytest.mark.parametrize("column", ["layer_name", "shape", "scheme", "quantized_data", "scales"])
def test_dequantize_names_a_missing_column(column: str) -> None:
    table = flightquant.quantize({"w": MATRIX}, "int4").drop_columns([column])
    with pytest.raises(InvalidRequestError, match=column):
        flightquant.dequantize(table)


def changed(table: pa.Table, **columns: Any) -> pa.Table:
    for name, value in columns.items():
        index = table.schema.names.index(name)
        table = table.set_column(index, table.schema.field(name), pa.array([value], table.schema.field(name).type))
    return table


@pytest.mark.parametrize("scheme", ["int8", "int4", "q8_0"])
@pytest.mark.parametrize(
    "columns",
    [
        {"quantized_data": b"\0" * 7},
        {"quantized_data": b""},
        {"shape": [4, 255]},
        {"shape": [2**40, 2**40]},
        {"scheme": "int3"},
        {"group_size": 100},
        {"group_size": -1},
        {"quantized_data": None},
        {"shape": None},
        {"shape": [-4, -256]},
        {"shape": [0, 2**62]},
    ],
    ids=str,
)
def test_dequantize_refuses_bytes_that_do_not_fit(scheme: str, columns: dict[str, Any]) -> None:
    table = changed(flightquant.quantize({"w": MATRIX}, scheme), **columns)
    with pytest.raises(InvalidRequestError):
        flightquant.dequantize(table)


@pytest.mark.parametrize("offsets", [[0, 1], [0, 3], [0, 0], [None, 2], [None, None], [1, 3]], ids=str)
def test_dequantize_refuses_parts_that_do_not_follow_one_another(offsets: list[Any]) -> None:
    columns = {"layer_name": pa.array(["w", "w"]), "row_offset": pa.array(offsets, pa.int64())}
    table = flightquant.quantize(request({"a": MATRIX[:2], "b": MATRIX[2:]}, columns=columns), "int8")
    with pytest.raises(InvalidRequestError, match="row_offset"):
        flightquant.dequantize(table)


def test_dequantize_refuses_parts_of_different_widths() -> None:
    columns = {"layer_name": pa.array(["w", "w"]), "row_offset": pa.array([0, 2])}
    table = flightquant.quantize(request({"a": MATRIX[:2], "b": MATRIX[2:, :128]}, columns=columns), "int8")
    with pytest.raises(InvalidRequestError, match="row_offset"):
        flightquant.dequantize(table)


@pytest.mark.parametrize("scales", [None, [], [1.0] * 3, [1.0] * 9, [None] * 8])
def test_dequantize_refuses_scales_that_do_not_fit(scales: Any) -> None:
    table = changed(flightquant.quantize({"w": MATRIX}, "int4"), scales=scales)
    with pytest.raises(InvalidRequestError):
        flightquant.dequantize(table)


def test_dequantize_refuses_zero_points_that_do_not_fit() -> None:
    table = changed(flightquant.quantize({"w": MATRIX}, "int4", symmetric=False), zero_points=[1.0])
    with pytest.raises(InvalidRequestError):
        flightquant.dequantize(table)
