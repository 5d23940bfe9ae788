"""What a row may ask for, and what it gets back."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_rows import GOOD, INT4, INT8, WIDE, around, check_neighbours, override_columns, quantize
from fq_testing import at_alignment, check_row, reference_layer, request, same_bits, stored_as

from flightquant.cython_core.engine import Engine
from flightquant.spec import Command

OVERRIDES: list[dict[str, Any]] = [
    {"packing": "ct-int32"},
    {"scheme": "int8", "packing": "ct-int8"},
    {"scheme": "int8"},
    {"scheme": "int6"},
    {"scheme": "fp8_e4m3"},
    {"scheme": "q8_0"},
    {"scheme": "q4_0"},
    {"scheme": "mxfp8"},
    {"scheme": "nvfp4"},
    {"scheme": "fp8_e5m2", "granularity": "block"},
    {"scheme": "nf4", "group_size": 64},
    {"bit_width": 8},
    {"granularity": "channel"},
    {"granularity": "tensor"},
    {"group_size": 128},
    {"group_size": 64, "symmetric": False},
    {"symmetric": False},
    {"scale_dtype": "float16"},
    {"scheme": "int8", "granularity": "tensor", "scale_dtype": "bfloat16", "symmetric": False},
    {},
]


def test_every_override_of_a_row(any_engine: Engine) -> None:
    layers = {f"w{i}": GOOD for i in range(len(OVERRIDES))}
    batch = request(layers, columns=override_columns(OVERRIDES))
    answers = quantize(any_engine, batch)
    for i, row in enumerate(OVERRIDES):
        command = INT4.override(row)
        spec = command.layer_spec()
        check_row(answers, i, reference_layer(GOOD, "float32", command), str(row))
        told = {name: answers.column(name)[i].as_py() for name in answers.schema.names}
        assert (told["scheme"], told["packing"]) == (spec.scheme.name, spec.scheme.packing)
        assert (told["bit_width"], told["group_size"]) == (spec.scheme.bits, spec.group_size)
        assert told["scale_dtype"] == spec.scale_dtype_for("float32")
    sliced = quantize(any_engine, batch.slice(3, 5))
    for i in range(5):
        expected = reference_layer(GOOD, "float32", INT4.override(OVERRIDES[3 + i]))
        check_row(sliced, i, expected)


def test_a_rows_own_packing(any_engine: Engine) -> None:
    rows = [{"packing": "awq"}, {}, {"packing": "gptq-v2", "symmetric": False}, {"scheme": "int2", "packing": "gptq"}]
    answers = quantize(any_engine, request({f"w{i}": WIDE for i in range(4)}, columns=override_columns(rows)))
    for i, row in enumerate(rows):
        check_row(answers, i, reference_layer(WIDE, "float32", INT4.override(row)), str(row))
    assert answers.column("packing").to_pylist() == ["awq", "ct-int32", "gptq-v2", "gptq"]


def test_quality_can_be_left_out(any_engine: Engine) -> None:
    layers = {"w": GOOD, "huge": stored_as(np.full((2, 70_016), 1e30), "float32")}
    batch = request(layers)
    for command in (INT4, INT8, Command.build(scheme="q4_0"), Command.build(scheme="int8", granularity="tensor")):
        without = Command.parse({**_options(command), "metrics": False})
        full, bare = quantize(any_engine, batch, command), quantize(any_engine, batch, without)
        for name in ("sqnr_db", "cosine", "max_abs_error"):
            assert bare.column(name).null_count == 2
        for name in ("quantized_data", "scales", "zero_points", "status"):
            assert bare.column(name).equals(full.column(name)), name


def _options(command: Command) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(command.to_json())
    return options


ECHOED = {
    "x_int": pa.array([1, None, 3]),
    "x_text": pa.array(["a", "", None]),
    "x_list": pa.array([[1.5], None, []], pa.list_(pa.float64())),
    "x_struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "z"}]),
    "x_null": pa.nulls(3),
    "x_flag": pa.array([True, None, False]),
    "x_fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
}


def test_echoed_columns_come_back_untouched(any_engine: Engine) -> None:
    columns = {**ECHOED, "row_offset": pa.array([0, None, 2**40], pa.int64())}
    batch = request({"a": GOOD, "b": GOOD, "c": GOOD}, columns=columns)
    for view in (batch, batch.slice(1), batch.slice(0, 2), batch.slice(2, 1)):
        answers = quantize(any_engine, view)
        assert answers.schema.names[-len(ECHOED) :] == list(ECHOED)
        for name in columns:
            assert answers.column(name).equals(view.column(name)), name
    shared = quantize(any_engine, batch).column("x_int").buffers()[1].address
    assert shared == columns["x_int"].buffers()[1].address


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_global_amax_sets_the_scale_of_a_whole_tensor(isa_engine: Engine, dtype: str) -> None:
    weights = stored_as(GOOD, dtype)
    values: list[float | None] = [8.0, None, 0.5]
    batch = request(
        {"a": weights, "b": weights, "c": weights}, dtype, columns={"global_amax": pa.array(values, pa.float32())}
    )
    tensor = Command.build(scheme="int8", granularity="tensor")
    answers = quantize(isa_engine, batch, tensor)
    for i, value in enumerate(values):
        check_row(answers, i, reference_layer(weights, dtype, tensor, value), f"amax {value}")
    whole = Command.build(scheme="nvfp4")
    answers = quantize(isa_engine, batch, whole)
    for i, value in enumerate(values):
        check_row(answers, i, reference_layer(weights, dtype, whole, value), f"amax {value}")
    for command in (INT4, INT8, Command.build(scheme="q8_0"), Command.build(scheme="mxfp4")):
        answers = quantize(isa_engine, batch, command)
        for i in range(3):
            check_row(answers, i, reference_layer(weights, dtype, command))


def test_an_nvfp4_tensor_in_parts_with_its_amax_is_the_tensor_whole(any_engine: Engine) -> None:
    weights = stored_as(np.random.default_rng(5).standard_normal((6, 48)), "float32")
    command = Command.build(scheme="nvfp4")
    whole = reference_layer(weights, "float32", command)
    amax = pa.array([np.abs(weights).max()] * 3, pa.float32())
    parts = {f"p{i}": weights[2 * i : 2 * i + 2] for i in range(3)}
    answers = quantize(any_engine, request(parts, columns={"global_amax": amax}), command)
    assert b"".join(answers.column("quantized_data").to_pylist()) == whole.data.tobytes()
    scales = [np.array(scales, np.float32) for scales in answers.column("scales").to_pylist()]
    same_bits(np.concatenate([part[:-1] for part in scales]), whole.scales[:-1], "scales")
    assert {part[-1] for part in scales} == {whole.scales[-1]}


def test_a_tensor_in_parts_with_its_amax_is_the_tensor_whole(any_engine: Engine) -> None:
    weights = stored_as(np.random.default_rng(5).standard_normal((6, 512)), "float32")
    command = Command.build(scheme="int8", granularity="tensor")
    whole = reference_layer(weights, "float32", command)
    amax = pa.array([np.abs(weights).max()] * 3, pa.float32())
    parts = {f"p{i}": weights[2 * i : 2 * i + 2] for i in range(3)}
    answers = quantize(any_engine, request(parts, columns={"global_amax": amax}), command)
    assert b"".join(answers.column("quantized_data").to_pylist()) == whole.data.tobytes()
    for scales in answers.column("scales").to_pylist():
        same_bits(np.array(scales, np.float32), whole.scales, "scales")


@pytest.mark.parametrize("shape", [[0], [0, 128], [2, 0], [2**40, 0], [0, 2**62]], ids=str)
def test_an_empty_layer_has_an_answer_of_no_bytes(any_engine: Engine, shape: list[int]) -> None:
    empty = np.zeros(0, np.float32)
    for command in (INT4, INT8, Command.build(scheme="int8", granularity="tensor"), Command.build(scheme="q8_0")):
        batch = request(around(empty), columns={"shape": pa.array([[3, 128], shape, [3, 128]])})
        answers = quantize(any_engine, batch, command)
        assert answers.column("status")[1].as_py() == "ok", answers.column("error")[1]
        assert answers.column("quantized_data")[1].as_py() == b""
        assert answers.column("scales")[1].as_py() in (None, [])
        check_neighbours(answers, 1, command)


@pytest.mark.parametrize("error", [1.3e-20, 1.3e-22, 1.3e-30, 1e-44])
def test_the_largest_error_is_told_even_where_its_square_is_nothing(error: float, any_engine: Engine) -> None:
    weights = np.zeros((3, 4096), np.float32)
    weights[:, ::32] = -0.5
    weights[1, 77] = error
    answers = quantize(any_engine, request({"w": weights}), Command.build(scheme="q4_0"))
    same_bits(np.float32(answers.column("max_abs_error")[0].as_py()), np.float32(error), "max_abs_error")


def test_a_sum_of_errors_is_what_the_quality_columns_say(any_engine: Engine) -> None:
    batch = request({"a": GOOD, "zeros": np.zeros((2, 128), np.float32)})
    answer = any_engine.session(batch.schema, INT4).quantize(batch)
    x2, e2, _, largest = answer.sums[0]
    row = {name: answer.batch.column(name)[0].as_py() for name in ("sqnr_db", "max_abs_error")}
    assert row["sqnr_db"] == pytest.approx(10 * math.log10(x2 / e2), rel=1e-6)
    same_bits(np.float32(row["max_abs_error"]), np.float32(largest), "max_abs_error")
    assert answer.batch.column("sqnr_db")[1].as_py() == math.inf
    assert answer.batch.column("cosine")[1].as_py() == 1.0
    assert set(answer.seconds) == {"validate", "queue", "kernel"}
    assert all(value >= 0 for value in answer.seconds.values())


def test_values_before_and_after_the_lists_are_never_read(any_engine: Engine) -> None:
    """NaN around the lists' own ranges: no row may notice."""
    around_nan = np.concatenate([np.full(7, np.nan, np.float32), GOOD.reshape(-1), np.full(9, np.nan, np.float32)])
    offsets = at_alignment(np.array([7, 7 + 384], np.int32), 0)
    column = pa.Array.from_buffers(pa.list_(pa.float32()), 1, [None, offsets], children=[pa.array(around_nan)])
    batch = pa.record_batch({"layer_name": ["w"], "weights": column, "shape": pa.array([[3, 128]])})
    check_row(quantize(any_engine, batch), 0, reference_layer(GOOD, "float32", INT4))
