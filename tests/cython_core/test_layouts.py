"""Every layout in which Arrow may hand over the same weights: alignment, list kinds, storage, slices, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import (
    KINDS,
    Array,
    answer_bytes,
    at_alignment,
    check_row,
    reference_layer,
    request,
    same_bits,
    stored_as,
    weights_array,
    weights_like,
    weights_type,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flightquant.cython_core.engine import Engine
from flightquant.errors import LayerError
from flightquant.spec import Command

DTYPES = ("float32", "float16", "bfloat16", "float64")
COMMANDS = [
    Command.build(**options)
    for options in (
        {"scheme": "int8"},
        {"scheme": "int8", "symmetric": False, "granularity": "tensor"},
        {"scheme": "int4", "group_size": 32},
        {"scheme": "int4", "group_size": 128, "symmetric": False},
        {"scheme": "q8_0"},
        {"scheme": "q4_0"},
        {"scheme": "q5_1"},
        {"scheme": "int2", "group_size": 32, "symmetric": False},
        {"scheme": "int3", "granularity": "channel"},
        {"scheme": "fp8_e4m3"},
        {"scheme": "fp8_e5m2", "granularity": "tensor"},
        {"scheme": "fp8_e4m3", "granularity": "block"},
        {"scheme": "mxfp4"},
        {"scheme": "mxfp8"},
        {"scheme": "nvfp4"},
        {"scheme": "nf4"},
        {"scheme": "nf4", "packing": "bnb-nested"},
        {"scheme": "bnb8", "group_size": 64},
        {"scheme": "iq4_nl"},
        {"scheme": "mxfp4", "packing": "gguf"},
        {"scheme": "int4", "packing": "fbgemm"},
        {"scheme": "int4", "packing": "onnx", "group_size": 32, "symmetric": False},
        {"scheme": "arrowquant", "bit_width": 8},
        {"scheme": "mlx"},
        {"scheme": "hqq4"},
        {"scheme": "hqq3", "group_size": 32},
        {"scheme": "arrowquant", "group_size": 32},
    )
]
WIDE_BLOCKS = [Command.build(scheme=f"q{bits}_k") for bits in range(2, 7)]


def layers_of(dtype: str, shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        f"w{i}": weights_like(KINDS[i % len(KINDS)], int(np.prod(shape)), dtype, rng).reshape(shape)
        for i, shape in enumerate(shapes)
    }


def check(engine: Engine, batch: pa.RecordBatch, layers: dict[str, Array], dtype: str, command: Command) -> None:
    answer = engine.session(batch.schema, command).quantize(batch)
    assert answer.batch.column("layer_name").to_pylist() == list(layers)
    for i, weights in enumerate(layers.values()):
        expected = reference_layer(weights, dtype, command)
        check_row(answer.batch, i, expected)
        if not isinstance(expected, LayerError):
            same_bits(answer.sums[i], expected.sums, f"sums of row {i}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment(isa_engine: Engine, dtype: str) -> None:
    layers = layers_of(dtype, [(2, 128), (1, 256), (1, 384), (1, 2048 + 128)])
    plain = request(layers, dtype)
    for command in (*COMMANDS, *WIDE_BLOCKS):
        expected = [reference_layer(weights, dtype, command) for weights in layers.values()]
        session = isa_engine.session(plain.schema, command)
        for alignment in range(64):
            batch = request(layers, dtype, alignment=alignment)
            assert batch.column("weights").values.buffers()[1].address % 64 == alignment
            answers = session.quantize(batch).batch
            if alignment == 0:
                first = answer_bytes(answers)
            if alignment == 0 or answer_bytes(answers) != first:
                for i, layer in enumerate(expected):
                    check_row(answers, i, layer, f"alignment {alignment}")
            assert answer_bytes(answers) == first


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.scheme)
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_list_kind(any_engine: Engine, dtype: str, kind: str, command: Command) -> None:
    layers = layers_of(dtype, [(2, 384), (6, 128), (768,)])
    check(any_engine, request(layers, dtype, kind=kind, alignment=1), layers, dtype, command)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("storage", [pa.uint16(), pa.binary(2)], ids=str)
def test_both_storages_of_bfloat16(any_engine: Engine, storage: pa.DataType, kind: str) -> None:
    layers = layers_of("bfloat16", [(2, 384), (6, 128)])
    batch = request(layers, "bfloat16", kind=kind, storage=storage, alignment=3)
    assert batch.schema.field("weights").type.value_type == storage
    for command in COMMANDS:
        check(any_engine, batch, layers, "bfloat16", command)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_slice_of_a_batch(any_engine: Engine, dtype: str, kind: str) -> None:
    names = [f"layer {i}" for i in range(5)]
    layers = dict(zip(names, layers_of(dtype, [(2, 128), (1, 256), (2, 128), (1, 256), (256,)]).values(), strict=True))
    whole = request(layers, dtype, kind=kind, alignment=2)
    command = COMMANDS[2]
    for first in range(5):
        for last in range(first + 1, 6):
            some = dict(list(layers.items())[first:last])
            check(any_engine, whole.slice(first, last - first), some, dtype, command)


def test_lists_whose_child_has_an_offset(any_engine: Engine) -> None:
    weights = stored_as(np.random.default_rng(0).standard_normal(256 + 9), "float32")
    child = pa.array(weights)[9:]
    for made in (
        pa.ListArray.from_arrays(pa.array([0, 128, 256], pa.int32()), child),
        pa.LargeListArray.from_arrays(pa.array([0, 128, 256], pa.int64()), child),
        pa.FixedSizeListArray.from_arrays(child, 128),
        pa.FixedSizeListArray.from_arrays(pa.array(weights)[9 - 4 : 9 + 252], 128)[1:],
    ):
        at = 9 + 124 if len(made) == 1 else 9
        layers = {f"w{i}": weights[at + i * 128 : at + (i + 1) * 128] for i in range(len(made))}
        batch = pa.record_batch({"layer_name": list(layers), "weights": made})
        check(any_engine, batch, layers, "float32", COMMANDS[2])


def test_lists_may_leave_gaps_and_begin_late(any_engine: Engine) -> None:
    weights = stored_as(np.arange(-300, 300) / 7, "float32")
    offsets = np.array([8, 40, 40, 72], np.int32)
    column = pa.Array.from_buffers(
        pa.list_(pa.float32()), 3, [None, at_alignment(offsets, 1)], children=[pa.array(weights)]
    )
    layers = {"a": weights[8:40], "b": weights[40:40], "c": weights[40:72]}
    batch = pa.record_batch({"layer_name": list(layers), "weights": column})
    answers = any_engine.session(batch.schema, COMMANDS[2]).quantize(batch).batch
    for i in (0, 2):
        check_row(answers, i, reference_layer(list(layers.values())[i], "float32", COMMANDS[2]))


@pytest.mark.parametrize(
    "kind",
    [
        pa.utf8(),
        pa.large_utf8(),
        *(pa.dictionary(index, pa.utf8()) for index in (pa.int8(), pa.uint16(), pa.int64(), pa.uint64())),
        pa.dictionary(pa.int32(), pa.large_utf8()),
    ],
    ids=str,
)
def test_every_kind_of_name(any_engine: Engine, kind: pa.DataType) -> None:
    names = ["model.layers.0.w", "\N{SNOWMAN}" * 40, "model.layers.0.w", " "]
    weights = [stored_as(np.full(32, i + 1.0), "float32") for i in range(4)]
    field = weights_type("float32")
    batch = pa.record_batch({"layer_name": pa.array(names).cast(kind), "weights": weights_array(weights, field)})
    for view, wanted in ((batch, names), (batch.slice(1), names[1:])):
        answers = any_engine.session(view.schema, COMMANDS[2]).quantize(view).batch
        assert answers.schema.field("layer_name").type == pa.utf8()
        assert answers.column("layer_name").to_pylist() == wanted
        assert answers.column("status").to_pylist() == ["ok"] * len(wanted)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())], ids=str)
def test_every_kind_of_shape(any_engine: Engine, kind: pa.DataType) -> None:
    weights = [stored_as(np.arange(size, dtype=np.float64), "float32") for size in (64, 96, 32, 1, 64)]
    shapes = [[2, 32], None, [1, 1, 1, 1, 1, 1, 1, 32], [], [64]]
    batch = pa.record_batch(
        {
            "layer_name": [f"w{i}" for i in range(5)],
            "weights": weights_array(weights, weights_type("float32")),
            "shape": pa.array(shapes, kind),
        }
    )
    command = COMMANDS[0]
    for first in range(5):
        view = batch.slice(first)
        answers = any_engine.session(view.schema, command).quantize(view).batch
        assert answers.column("shape").to_pylist() == [[2, 32], [96], [1] * 7 + [32], [], [64]][first:]
        for i in range(len(view)):
            shape = answers.column("shape")[i].as_py()
            check_row(answers, i, reference_layer(weights[first + i].reshape(shape), "float32", command))


def test_no_shape_column_means_one_row(any_engine: Engine) -> None:
    weights = stored_as(np.random.default_rng(3).standard_normal(256), "float32")
    batch = request({"w": weights}).drop_columns(["shape"])
    answers = any_engine.session(batch.schema, COMMANDS[0]).quantize(batch).batch
    assert answers.column("shape").to_pylist() == [[256]]
    check_row(answers, 0, reference_layer(weights, "float32", COMMANDS[0]))


SHAPES = st.lists(st.sampled_from([(32,), (1, 32), (3, 64), (2, 2, 32), (5, 96), (1, 2080)]), min_size=1, max_size=6)


@given(
    shapes=SHAPES,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["list", "large_list"]),
    command=st.sampled_from([Command.build(scheme="int4", group_size=32), *COMMANDS[:2], *COMMANDS[4:]]),
    alignment=st.integers(0, 63),
    cut=st.tuples(st.integers(0, 5), st.integers(1, 6)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_in_any_layout(
    any_engine: Engine,
    shapes: list[tuple[int, ...]],
    dtype: str,
    kind: str,
    command: Command,
    alignment: int,
    cut: tuple[int, int],
    seed: int,
) -> None:
    layers: dict[str, Any] = layers_of(dtype, shapes, seed)
    first = min(cut[0], len(shapes) - 1)
    batch = request(layers, dtype, kind=kind, alignment=alignment).slice(first, cut[1])
    some = dict(list(layers.items())[first : first + cut[1]])
    check(any_engine, batch, some, dtype, command)
