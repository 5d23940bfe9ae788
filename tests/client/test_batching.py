"""Layers to request batches: sizes, order, parts, shared memory; Arrow input of every shape."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from fq_testing import request as fq_request
from hypothesis import given, settings
from hypothesis import strategies as st

from flightquant.client import batching
from flightquant.client.batching import (
    MAX_BYTES,
    MAX_ROWS,
    MIN_BYTES,
    Request,
    cut,
    least_row,
    magnitude,
    pack,
    reslice,
)
from flightquant.cython_core.engine import Engine
from flightquant.errors import InvalidRequestError, TooLargeError
from flightquant.layers import Layer, as_layer, layers_batch
from flightquant.reference.quality import bounds, strips
from flightquant.schemes import SCHEMES
from flightquant.spec import Command

INT4 = Command.build(scheme="int4")
MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a thousandth, so that hypothesis meets parts with small arrays."""
    monkeypatch.setattr(batching, "MIN_BYTES", 4 << 10)
    monkeypatch.setattr(batching, "TARGET_BYTES", 8 << 10)
    monkeypatch.setattr(batching, "MAX_BYTES", 16 << 10)


def weights_of(request: Request, row: int = 0) -> np.ndarray:
    return request.batch.column("weights")[row].values.to_numpy()


def assembled(requests: list[Request]) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """The layers that the requests hold, parts joined: what the server's answers will be joined to."""
    layers: list[tuple[str, tuple[int, ...], np.ndarray]] = []
    held: list[np.ndarray] = []
    for request in requests:
        shapes = request.batch.column("shape").to_pylist()
        if request.part is None:
            assert not held
            for row, (name, shape) in enumerate(zip(request.names, shapes, strict=True)):
                layers.append((name, tuple(shape), weights_of(request, row)))
            continue
        part = request.part
        assert part.first == sum(len(h) for h in held) // prod(part.shape[1:])
        assert shapes == [[part.last - part.first, *part.shape[1:]]]
        assert request.batch.column("row_offset").to_pylist() == [(part.row_offset or 0) + part.first]
        held.append(weights_of(request))
        if part.ends:
            layers.append((request.names[0], part.shape, np.concatenate(held)))
            held = []
    assert not held
    return layers


SHAPES = st.one_of(
    st.tuples(),
    st.tuples(st.integers(0, 9000)),
    st.tuples(st.integers(0, 300), st.integers(0, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 64)),
)
COMMANDS = st.sampled_from(
    [
        INT4,
        Command.build(scheme="int4", group_size=32),
        Command.build(scheme="int8"),
        Command.build(scheme="int8", granularity="tensor"),
        Command.build(scheme="int8", granularity="tensor", symmetric=False),
        Command.build(scheme="int3", group_size=32),
        Command.build(scheme="fp8_e4m3", granularity="tensor"),
        Command.build(scheme="fp8_e4m3", granularity="block"),
        Command.build(scheme="mxfp4"),
        Command.build(scheme="nvfp4"),
        Command.build(scheme="q4_0"),
        Command.build(scheme="nf4", group_size=512),
    ]
)


@pytest.mark.usefixtures("small")
class TestPack:
    @settings(deadline=None)
    @given(st.lists(SHAPES, max_size=12), COMMANDS, st.sampled_from(["float32", "float16", "float64"]))
    def test_every_weight_is_sent_once_in_order(
        self, shapes: list[tuple[int, ...]], command: Command, dtype: str
    ) -> None:
        rng = np.random.default_rng(1)
        layers = [as_layer(f"l{i}", rng.normal(size=shape).astype(dtype)) for i, shape in enumerate(shapes)]
        requests = list(pack(layers, command))
        got = assembled(requests)
        assert [(name, shape) for name, shape, _ in got] == [(layer.name, layer.shape) for layer in layers]
        for (_, _, data), layer in zip(got, layers, strict=True):
            np.testing.assert_array_equal(data, layer.data)
        assert len({str(r.batch.schema) for r in requests}) <= 1
        for request in requests:
            assert request.nbytes == batching.batch_bytes(request.batch)
            # 128 rows of blocks stay together, however long they are, and so do rows that groups cross.
            together = command.granularity == "block" or command.layer_spec().scheme.flat
            uncut = request.batch.num_rows == 1 and (request.part is None or together)
            assert request.nbytes <= batching.MAX_BYTES or uncut
        assert list(pack(layers, command)) == [] or sum(r.nbytes for r in requests) == sum(x.nbytes for x in layers)

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 2000), min_size=2, max_size=60))
    def test_small_layers_fill_a_message(self, sizes: list[int]) -> None:
        layers = [as_layer(f"l{i}", np.ones(n, np.float32)) for i, n in enumerate(sizes)]
        requests = list(pack(layers, INT4))
        for this, following in pairwise(requests):
            first = following.batch.column("weights")[0].values
            full = this.nbytes + len(first) * 4 > batching.MAX_BYTES or len(first) * 4 >= batching.MIN_BYTES
            assert this.nbytes >= batching.MIN_BYTES or full

    def test_number_of_rows_is_bounded(self) -> None:
        layers = [as_layer(f"l{i}", np.zeros(0, np.float32)) for i in range(MAX_ROWS + 1)]
        assert [r.batch.num_rows for r in pack(layers, INT4)] == [MAX_ROWS, 1]


class TestCut:
    def test_limits_are_the_documented_ones(self) -> None:
        assert (MIN_BYTES, MAX_BYTES) == (4 * MIB, 16 * MIB)

    @pytest.mark.parametrize("shape", [(4096, 1024), (1,), (), (0, 5), (2, 3, 4)])
    def test_what_fits_stays_whole(self, shape: tuple[int, ...]) -> None:
        assert cut(shape, 4, INT4.layer_spec()) == [(0, shape[0] if shape else 1)]

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((4096, 11008), {"scheme": "int4"}),
            ((4096, 11008), {"scheme": "int8"}),
            ((4096, 11008), {"scheme": "int4", "packing": "awq"}),
            ((4096, 11008), {"scheme": "int4", "packing": "onnx", "symmetric": False, "group_size": 256}),
            ((32000, 4096), {"scheme": "q8_0"}),
            ((30522, 384), {"scheme": "int4"}),
            ((8, 1024, 4096), {"scheme": "int4", "group_size": 32}),
            ((100, 70000), {"scheme": "int8"}),
            ((1 << 23,), {"scheme": "int4"}),
            ((4096, 11008), {"scheme": "int8", "granularity": "tensor"}),
            ((30522, 384), {"scheme": "nf4"}),
            ((1 << 18, 32), {"scheme": "nf4", "group_size": 4096}),
            (((1 << 23) + 1,), {"scheme": "fp4"}),
            ((5000, 1100), {"scheme": "fp8_e4m3", "granularity": "block"}),
            ((32, 96, 2048), {"scheme": "fp8_e4m3", "granularity": "block"}),
            ((16384, 528), {"scheme": "nvfp4"}),
        ],
    )
    def test_parts_have_4_to_16_mib_and_begin_where_sums_do(
        self, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        spec = Command.build(**options).layer_spec()
        ranges = cut(shape, 4, spec)
        width = prod(shape[1:])
        assert len(ranges) > 1
        assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == shape[0]
        sizes = [(last - first) * width * 4 for first, last in ranges]
        assert all(4 * MIB <= size <= 16 * MIB for size in sizes[:-1])
        assert 0 < sizes[-1] <= 16 * MIB
        made = bounds(prod(shape), max(spec.group_size, 32) if spec.group_size else shape[-1])
        if spec.granularity == "block":
            made = strips(prod(shape[:-1]), shape[-1])
        tiles = {begin for begin, _, _ in made}
        assert all(first * width in tiles for first, _ in ranges)

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((5000, 5000), {"scheme": "int8", "granularity": "tensor", "symmetric": False}),
            ((1 << 23,), {"scheme": "int8"}),
            ((1 << 23,), {"scheme": "int4", "packing": "onnx"}),
            ((4096, 2048), {"scheme": "nf4", "packing": "bnb-nested"}),
            ((1 << 23,), {"scheme": "int8", "granularity": "tensor"}),
            (((1 << 23) + 1,), {"scheme": "int4"}),
            ((1, 1 << 23), {"scheme": "int4"}),
            ((17, 500_003), {"scheme": "nf4"}),
        ],
    )
    def test_what_cannot_be_cut_goes_whole(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        assert cut(shape, 4, Command.build(**options).layer_spec()) == [(0, shape[0])]

    @pytest.mark.parametrize(("group_size", "rows"), [(64, 64), (4096, 4096)])
    def test_parts_begin_where_blocks_of_the_flat_tensor_do(self, group_size: int, rows: int) -> None:
        ranges = cut((20_000, 333), 4, Command.build(scheme="nf4", group_size=group_size).layer_spec())
        assert len(ranges) > 1
        assert ranges[-1][1] == 20_000
        assert all(first % rows == 0 and first * 333 % group_size == 0 for first, _ in ranges)

    def test_rows_larger_than_a_message_go_one_by_one(self) -> None:
        assert cut((3, 1 << 23), 4, INT4.layer_spec()) == [(0, 1), (1, 2), (2, 3)]

    def test_a_layer_beyond_what_flight_can_send_is_refused(self) -> None:
        layer = Layer("huge", (1, 1 << 29), "float32", np.broadcast_to(np.float32(0), (1 << 29,)))
        with pytest.raises(TooLargeError, match='"huge" has 2147483648 bytes'):
            list(pack([layer], INT4))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
class TestMagnitude:
    def test_equals_the_largest_absolute_value(self, dtype: str) -> None:
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        array = np.array([0.5, -3.25, 2.0, -0.0], np.float64).astype(kind)
        layer = as_layer("w", array)
        assert magnitude(layer.data, layer.dtype) == 3.25

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_is_not_finite_if_a_weight_is_not(self, dtype: str, bad: float) -> None:
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        layer = as_layer("w", np.array([1.0, bad, 2.0]).astype(kind))
        assert not np.isfinite(magnitude(layer.data, layer.dtype))

    def test_is_zero_of_nothing(self, dtype: str) -> None:
        assert magnitude(np.zeros(0, np.uint16 if dtype == "bfloat16" else dtype), dtype) == 0


def test_a_large_layer_is_borrowed_not_copied() -> None:
    array = np.zeros((8192, 1024), np.float32)
    starts = [r.batch.column("weights").values.buffers()[1].address for r in pack([as_layer("w", array)], INT4)]
    offsets = [start - array.ctypes.data for start in starts]
    assert len(starts) == 4
    assert all(0 <= offset < array.nbytes for offset in offsets)


def test_tensor_granularity_tells_every_part_the_magnitude_of_the_whole() -> None:
    array = np.zeros((8192, 1024), np.float32)
    array[8000, 5] = -7.5
    command = Command.build(scheme="int8", granularity="tensor")
    requests = list(pack([as_layer("w", array), as_layer("tail", np.ones(4, np.float32))], command))
    assert [r.batch.column("global_amax").to_pylist() for r in requests] == [[7.5]] * 4 + [[None]]
    array[3, 3] = np.nan
    assert [r.part for r in pack([as_layer("w", array)], command)] == [None]


def weights_column(kind: str, rows: list[np.ndarray]) -> tuple[pa.Array, dict[str, str] | None]:
    if kind == "fixed":
        values = pa.array(np.concatenate(rows))
        return pa.FixedSizeListArray.from_arrays(values, rows[0].size), None
    if kind == "bf16_binary":
        raw = b"".join(row.astype(ml_dtypes.bfloat16).tobytes() for row in rows)
        values = pa.Array.from_buffers(pa.binary(2), len(raw) // 2, [None, pa.py_buffer(raw)])
        offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values), {"dtype": "bfloat16"}
    listed = pa.large_list(pa.float32()) if kind == "large" else pa.list_(pa.float32())
    return pa.array([row.tolist() for row in rows], listed), None


@pytest.mark.usefixtures("small")
class TestReslice:
    @settings(deadline=None, max_examples=40)
    @given(
        st.sampled_from(["list", "large", "fixed", "bf16_binary"]),
        st.lists(st.integers(1, 90), min_size=1, max_size=6),
        st.integers(0, 2),
        st.booleans(),
        COMMANDS,
    )
    def test_slices_hold_every_weight_once(
        self, kind: str, rows: list[int], skip: int, with_shape: bool, command: Command
    ) -> None:
        rng = np.random.default_rng(2)
        cols = 96
        if kind == "fixed":
            rows = [rows[0]] * len(rows)
        arrays = [rng.normal(size=(n, cols)).astype(np.float32) for n in rows]
        weights, metadata = weights_column(kind, [a.reshape(-1) for a in arrays])
        fields = [pa.field("layer_name", pa.utf8()), pa.field("weights", weights.type, metadata=metadata)]
        columns: list[pa.Array] = [pa.array([f"l{i}" for i in range(len(rows))]), weights]
        if with_shape:
            fields.append(pa.field("shape", pa.list_(pa.int64())))
            columns.append(pa.array([[n, cols] for n in rows], pa.list_(pa.int64())))
        fields.append(pa.field("x_id", pa.int32()))
        columns.append(pa.array(range(len(rows)), pa.int32()))
        batch = pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields)).slice(skip)
        requests = list(reslice([batch], command))
        assert len({str(r.batch.schema) for r in requests}) <= 1
        wanted = arrays[skip:]
        if kind == "bf16_binary":
            for request in requests:
                request.batch.validate(full=True)
            assert sum(r.nbytes for r in requests) == sum(a.size for a in wanted) * 2
            return
        got = assembled(requests)
        assert [name for name, _, _ in got] == [f"l{i + skip}" for i in range(len(wanted))]
        for (_, shape, data), array in zip(got, wanted, strict=True):
            assert shape == (array.shape if with_shape else (array.size,))
            np.testing.assert_array_equal(data, array.reshape(-1))
        ids = [i for r in requests if r.part is None or r.part.ends for i in r.batch.column("x_id").to_pylist()]
        assert ids == list(range(skip, len(rows)))

    def test_values_are_shared(self) -> None:
        batch = layers_batch([as_layer("a", np.zeros((100, 64), np.float32)), as_layer("b", np.ones(8, np.float32))])
        base = batch.column("weights").values.buffers()[1].address
        requests = list(reslice([batch], INT4))
        assert len(requests) > 2
        assert {r.batch.column("weights").values.buffers()[1].address for r in requests} == {base}

    def test_a_part_keeps_the_offset_that_the_caller_gave(self) -> None:
        batch = layers_batch([as_layer("a", np.zeros((100, 128), np.float32))], [1000])
        parts = list(reslice([batch], INT4))
        offsets = [r.batch.column("row_offset")[0].as_py() for r in parts]
        assert offsets[0] == 1000
        assert offsets[1:] == [1000 + r.part.first for r in parts[1:] if r.part]
        assert {r.part.row_offset for r in parts if r.part} == {1000}

    def test_a_row_may_override_what_decides_about_parts(self) -> None:
        batch = layers_batch([as_layer(n, np.ones((100, 128), np.float32)) for n in "abc"])
        batch = batch.append_column("granularity", pa.array(["tensor", None, "nonsense"]))
        batch = batch.append_column("symmetric", pa.array([False, None, None]))
        requests = list(reslice([batch], Command.build(scheme="int8")))
        whole = [r.names for r in requests if r.part is None]
        assert whole == [["a"], ["c"]]

    def test_wrong_rows_are_left_to_the_server(self) -> None:
        batch = layers_batch([as_layer("a", np.ones((100, 128), np.float32))])
        shape = pa.array([[7, 128]], pa.list_(pa.int64()))
        wrong = batch.set_column(2, batch.schema.field(2), shape)
        assert [r.part for r in reslice([wrong], INT4)] == [None]

    def test_empty_batches_are_left_out(self) -> None:
        batch = layers_batch([as_layer("a", np.ones(4, np.float32))])
        assert len(list(reslice([batch.slice(0, 0), batch, batch.slice(1)], INT4))) == 1

    def test_names_in_a_dictionary_are_sent_as_text(self) -> None:
        batch = layers_batch([as_layer("a", np.ones(4, np.float32)), as_layer("b", np.ones(4, np.float32))])
        batch = batch.set_column(0, "layer_name", batch.column(0).dictionary_encode())
        (request,) = reslice([batch.slice(1)], INT4)
        assert request.batch.column("layer_name").type == pa.utf8()
        assert request.names == ["b"]

    def test_columns_outside_the_contract_are_refused_before_a_call(self) -> None:
        batch = layers_batch([as_layer("a", np.ones(4, np.float32))]).append_column("extra", pa.array([1]))
        with pytest.raises(InvalidRequestError, match='unknown column "extra"'):
            list(reslice([batch], INT4))


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_the_least_row_is_a_layer_without_weights(kind: str) -> None:
    batch = fq_request({name: np.ones((4, 128), np.float32) for name in "vw"}, "float32", kind=kind)
    row = least_row(batch)
    assert row.schema == batch.schema
    assert row.column("layer_name").to_pylist() == ["v"]
    assert row.column("shape").to_pylist() == [[4 if kind == "fixed_size_list" else 0, 128]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_answers_the_least_row(scheme: str) -> None:
    row = least_row(layers_batch([as_layer("w", np.ones((64, 256), np.float32))]))
    options = [{"packing": packing} for packing in SCHEMES[scheme].packings]
    options += [{"granularity": granularity} for granularity in SCHEMES[scheme].granularities]
    for given_ in options:
        command = Command.build(scheme=scheme, on_error="abort", **given_)
        answer = Engine(1).session(row.schema, command).quantize(row).batch
        assert answer.column("status").to_pylist() == ["ok"]
