"""What a row may ask for, what it gets back, and how a bad row is told without harm to its neighbours."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import (
    at_alignment,
    check_row,
    reference_layer,
    request,
    same_bits,
    stored_as,
    weights_type,
)

from flightquant.cython_core.engine import Engine, Limits
from flightquant.errors import DeadlineError, InvalidRequestError, LayerError, TooLargeError
from flightquant.spec import Command

INT4 = Command.build(scheme="int4", group_size=32)
INT8 = Command.build(scheme="int8")
GOOD = stored_as(np.random.default_rng(11).standard_normal((3, 128)), "float32")
WIDE = stored_as(np.random.default_rng(12).standard_normal((32, 128)), "float32")
ANSWERS_OF_OK = ("quantized_data", "scales", "sqnr_db", "cosine", "max_abs_error", "zero_points")


def quantize(engine: Engine, batch: pa.RecordBatch, command: Command = INT4, **limits: Any) -> pa.RecordBatch:
    return engine.session(batch.schema, command, Limits(**limits)).quantize(batch).batch


def check_failed(answers: pa.RecordBatch, i: int, status: str, *words: str) -> None:
    row = {name: answers.column(name)[i].as_py() for name in answers.schema.names}
    assert row["status"] == status, row
    for word in words:
        assert word in row["error"], row
    assert all(row[name] is None for name in ANSWERS_OF_OK), row
    assert row["bytes_out"] == 0
    assert len(row["error"].encode()) < 1024


def check_neighbours(answers: pa.RecordBatch, bad: int, command: Command = INT4) -> None:
    for i in range(answers.num_rows):
        if i != bad:
            check_row(answers, i, reference_layer(GOOD, "float32", command))


def around(weights: Any, dtype: str = "float32") -> dict[str, Any]:
    """A layer between two good ones."""
    good = GOOD if dtype == "float32" else stored_as(GOOD, dtype)
    return {"before": good, "bad": weights, "after": good}


NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE.keys())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_non_finite_weight_is_told_with_its_index(isa_engine: Engine, dtype: str, value: float) -> None:
    for command in (
        INT4,
        INT8,
        Command.build(scheme="int8", granularity="tensor"),
        Command.build(scheme="int4", granularity="channel", symmetric=False),
        Command.build(scheme="int8", granularity="tensor", symmetric=False),
        Command.build(scheme="q8_0"),
        Command.build(scheme="q4_0"),
        Command.build(scheme="q5_1"),
        Command.build(scheme="iq4_nl"),
        Command.build(scheme="mxfp4"),
        Command.build(scheme="nvfp4"),
        Command.build(scheme="fp8_e4m3", granularity="block"),
        Command.build(scheme="nf4"),
        Command.build(scheme="fp4", group_size=4096),
    ):
        good = reference_layer(stored_as(GOOD, dtype), dtype, command)
        for size, places in ((128, (0, 1, 63, 64, 126, 127)), (70_016, (0, 35_000, 65_535, 65_536, 70_015))):
            weights = np.asarray(np.random.default_rng(0).standard_normal(size))
            for place in places:
                marred = weights.copy()
                marred[place] = value
                marred[place + 1 :: 97] = math.nan  # only the first is told
                if dtype == "bfloat16":
                    stored = (marred.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
                else:
                    stored = marred.astype(dtype)
                answers = quantize(isa_engine, request(around(stored, dtype), dtype), command)
                check_failed(answers, 1, "non_finite", f"weight {place} ")
            for i in (0, 2):
                check_row(answers, i, good)


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0xFF800000])
def test_every_pattern_of_nan_and_infinity_is_found(isa_engine: Engine, bits: int) -> None:
    weights = GOOD.copy()
    weights.view(np.uint32)[1, 77] = bits
    check_failed(quantize(isa_engine, request(around(weights))), 1, "non_finite", str(128 + 77))


def test_a_float64_that_overflows_float32_is_not_finite(any_engine: Engine) -> None:
    weights = np.ones((2, 128))
    weights[1, 5] = 1e39
    check_failed(quantize(any_engine, request({"w": weights}, "float64")), 0, "non_finite", "133")
    weights[1, 5] = 3.4028235e38
    answers = quantize(any_engine, request({"w": weights}, "float64"))
    check_row(answers, 0, reference_layer(weights, "float64", INT4))


SHAPES: list[list[Any]] = [
    [2, 128],
    [383],
    [3, 127],
    [-3, -128],
    [3, -128],
    [0],
    [3, 0, 128],
    [],
    [2**32, 2**32],
    [2**63 - 1, 2**63 - 1],
    [2**62, 4],
    [2**31, 2**33, 384],
    [-(2**63)],
    [1] * 8 + [384],
    [1] * 100 + [384],
    [3, None],
    [None],
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())], ids=["list", "large_list"])
def test_a_shape_that_does_not_fit_is_told(any_engine: Engine, kind: pa.DataType, shape: list[Any]) -> None:
    shapes = pa.array([[3, 128], shape, [3, 128]], kind)
    batch = request(around(GOOD), columns={"shape": shapes})
    answers = quantize(any_engine, batch)
    check_failed(answers, 1, "shape_mismatch", "384")
    check_neighbours(answers, 1)


def test_eight_dimensions_are_allowed(any_engine: Engine) -> None:
    shape = [1, 3, 1, 1, 2, 1, 1, 64]
    batch = request(around(GOOD), columns={"shape": pa.array([[3, 128], shape, [384]])})
    answers = quantize(any_engine, batch)
    check_row(answers, 1, reference_layer(GOOD.reshape(shape), "float32", INT4))
    check_row(answers, 2, reference_layer(GOOD.reshape(384), "float32", INT4))


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_null_weights_are_told(any_engine: Engine, kind: str) -> None:
    field = weights_type("float32", kind, size=384)
    cells = [GOOD.reshape(-1).tolist(), None, GOOD.reshape(-1).tolist()]
    shapes = pa.array([[3, 128]] * 3)
    batch = pa.record_batch(
        [pa.array(["a", "b", "c"]), pa.array(cells, field.type), shapes],
        schema=pa.schema([("layer_name", pa.utf8()), field, ("shape", pa.list_(pa.int64()))]),
    )
    answers = quantize(any_engine, batch)
    check_failed(answers, 1, "null_weights")
    check_neighbours(answers, 1)
    assert quantize(any_engine, batch.slice(2)).column("status").to_pylist() == ["ok"]


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("place", [0, 200, 383])
def test_a_null_inside_weights_is_told(any_engine: Engine, kind: str, place: int) -> None:
    field = weights_type("float32", kind, size=384)
    holed: list[Any] = GOOD.reshape(-1).tolist()
    holed[place] = None
    cells = [GOOD.reshape(-1).tolist(), holed, GOOD.reshape(-1).tolist()]
    batch = pa.record_batch(
        [pa.array(["a", "b", "c"]), pa.array(cells, field.type), pa.array([[3, 128]] * 3)],
        schema=pa.schema([("layer_name", pa.utf8()), field, ("shape", pa.list_(pa.int64()))]),
    )
    answers = quantize(any_engine, batch)
    check_failed(answers, 1, "null_weights", str(place))
    check_neighbours(answers, 1)
    assert quantize(any_engine, batch.slice(2)).column("status").to_pylist() == ["ok"]


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int8(), pa.utf8())], ids=str)
def test_an_empty_name_is_told(any_engine: Engine, kind: pa.DataType) -> None:
    batch = request(around(GOOD), columns={"layer_name": pa.array(["a", "", "c"]).cast(kind)})
    answers = quantize(any_engine, batch)
    check_failed(answers, 1, "empty_name")
    check_neighbours(answers, 1)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int8(), pa.utf8())], ids=str)
def test_a_null_name_is_told(any_engine: Engine, kind: pa.DataType) -> None:
    batch = request(around(GOOD), columns={"layer_name": pa.array(["a", None, "c"]).cast(kind)})
    answers = quantize(any_engine, batch)
    check_failed(answers, 1, "empty_name")
    check_neighbours(answers, 1)


@pytest.mark.parametrize(
    ("command", "shape", "words"),
    [
        (Command.build(scheme="int4"), [3, 100], ("128", "100")),
        (Command.build(scheme="int8", group_size=32), [300], ()),
        (Command.build(scheme="int4", group_size=256), [384], ("256", "384")),
        (Command.build(scheme="q8_0"), [4, 33], ("32", "33")),
        (Command.build(scheme="q4_0"), [], ("32", "1")),
    ],
)
def test_a_group_that_does_not_divide_the_row_is_unsupported(
    any_engine: Engine, command: Command, shape: list[int], words: tuple[str, ...]
) -> None:
    weights = stored_as(np.ones(shape), "float32")
    answers = quantize(any_engine, request({"good": np.ones((2, 768), np.float32), "bad": weights}), command)
    check_failed(answers, 1, "unsupported", *words)
    assert answers.column("status")[0].as_py() == "ok"


@pytest.mark.parametrize("shape", [(31, 64), (48, 96), (64, 33), (64,), (2, 31, 32)])
@pytest.mark.parametrize("packing", ["gptq", "gptq-v2", "awq"])
def test_a_matrix_that_does_not_fill_whole_words_is_unsupported(
    any_engine: Engine, packing: str, shape: tuple[int, ...]
) -> None:
    command = Command.build(scheme="int4", packing=packing, granularity="channel")
    answers = quantize(any_engine, request({"good": WIDE, "bad": np.ones(shape, np.float32)}), command)
    check_row(answers, 0, reference_layer(WIDE, "float32", command))
    check_row(answers, 1, reference_layer(np.ones(shape, np.float32), "float32", command))
    assert "multiples of 32" in answers.column("error")[1].as_py()


def test_a_zero_point_that_gptqs_first_version_cannot_hold_is_said(any_engine: Engine) -> None:
    positive = WIDE.copy()
    positive[3, 64:96] = np.abs(positive[3, 64:96])
    options = {"scheme": "int4", "group_size": 32, "symmetric": False}
    command = Command.build(packing="gptq", **options)
    answers = quantize(any_engine, request({"good": WIDE, "bad": positive, "after": WIDE}), command)
    for i, weights in enumerate((WIDE, positive, WIDE)):
        check_row(answers, i, reference_layer(weights, "float32", command))
    assert answers.column("status").to_pylist() == ["ok", "unsupported", "ok"]
    assert answers.column("error")[1].as_py().startswith("zero point 14 is 0")
    second = quantize(any_engine, request({"bad": positive}), Command.build(packing="gptq-v2", **options))
    assert second.column("status")[0].as_py() == "ok"


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
OVERRIDE_TYPES = {
    "scheme": pa.utf8(),
    "bit_width": pa.uint8(),
    "packing": pa.utf8(),
    "granularity": pa.large_utf8(),
    "group_size": pa.int64(),
    "symmetric": pa.bool_(),
    "scale_dtype": pa.utf8(),
}


def override_columns(rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
    return {name: pa.array([row.get(name) for row in rows], kind) for name, kind in OVERRIDE_TYPES.items()}


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


@pytest.mark.parametrize(
    "row",
    [
        {"scheme": "int5x"},
        {"scheme": ""},
        {"bit_width": 3},
        {"bit_width": 0},
        {"bit_width": 8, "scheme": "int4"},
        {"granularity": "block"},
        {"granularity": "channel", "group_size": 32},
        {"group_size": 0},
        {"group_size": -128},
        {"group_size": 2**62},
        {"scale_dtype": "float64"},
        {"scheme": "q8_0", "symmetric": False},
    ],
    ids=str,
)
def test_an_override_that_does_not_exist_is_unsupported(any_engine: Engine, row: dict[str, Any]) -> None:
    batch = request(around(GOOD), columns=override_columns([{}, row, {}]))
    answers = quantize(any_engine, batch)
    check_failed(answers, 1, "unsupported")
    check_neighbours(answers, 1)


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_global_amax_that_is_no_magnitude_is_told(any_engine: Engine, value: float) -> None:
    column = pa.array([None, value, 4.0], pa.float32())
    batch = request({"a": GOOD, "b": GOOD, "c": GOOD}, columns={"global_amax": column})
    answers = quantize(any_engine, batch, Command.build(scheme="int8", granularity="tensor"))
    check_failed(answers, 1, "unsupported", "global_amax")
    assert answers.column("status")[0].as_py() == answers.column("status")[2].as_py() == "ok"


BAD_ROWS: dict[str, Any] = {
    "non_finite": {"weights": [math.nan] * 128},
    "null_weights": {"weights": None},
    "shape_mismatch": {"shape": [5, 5]},
    "empty_name": {"layer_name": ""},
    "unsupported": {"scheme": "int5x"},
}


def batch_of_rows(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    full = [{"layer_name": "w", "weights": GOOD[0].tolist(), "shape": [128], "scheme": None, **row} for row in rows]
    kinds = [
        ("layer_name", pa.utf8()),
        ("weights", pa.list_(pa.float32())),
        ("shape", pa.list_(pa.int64())),
        ("scheme", pa.utf8()),
    ]
    return pa.record_batch(
        [pa.array([row[name] for row in full], kind) for name, kind in kinds], schema=pa.schema(kinds)
    )


@pytest.mark.parametrize("status", BAD_ROWS)
def test_abort_ends_the_call_at_the_first_bad_layer(any_engine: Engine, status: str) -> None:
    command = Command.build(scheme="int4", group_size=32, on_error="abort")
    good = batch_of_rows([{}, {}])
    bad = batch_of_rows([{}, BAD_ROWS[status], {}])
    session = any_engine.session(bad.schema, command)
    assert session.quantize(good).batch.column("status").to_pylist() == ["ok", "ok"]
    with pytest.raises(LayerError) as caught:
        session.quantize(bad)
    assert caught.value.status == status
    assert len(caught.value.wire_message().encode()) < 1024


def test_an_abort_says_why_however_long_the_name(any_engine: Engine) -> None:
    command = Command.build(scheme="int4", group_size=32, on_error="abort")
    batch = request({"n" * 1024: np.full((1, 32), np.inf, np.float32)})
    with pytest.raises(LayerError) as caught:
        quantize(any_engine, batch, command)
    assert "non_finite: weight 0" in caught.value.wire_message()


def test_every_kind_of_bad_row_in_one_batch(any_engine: Engine) -> None:
    rows = [{}, *({**bad} for bad in BAD_ROWS.values()), {}]
    batch = batch_of_rows(rows)
    session = any_engine.session(batch.schema, INT4)
    answers = session.quantize(batch).batch
    assert answers.column("status").to_pylist() == ["ok", *BAD_ROWS, "ok"]
    assert answers.column("layer_name").to_pylist() == [row.get("layer_name", "w") for row in rows]
    assert session.end.failed_rows == len(BAD_ROWS)


def test_the_end_message_counts_the_whole_call(any_engine: Engine) -> None:
    batch = request({"a": GOOD, "b": GOOD})
    session = any_engine.session(batch.schema, INT4)
    answers = [session.quantize(batch).batch, session.quantize(batch.slice(1)).batch]
    table = pa.Table.from_batches(answers)
    end = session.end
    assert (end.rows, end.batches, end.failed_rows, end.bytes_copied) == (3, 2, 0, 0)
    assert end.bytes_in == sum(table.column("bytes_in").to_pylist()) == 3 * GOOD.nbytes
    assert end.bytes_out == sum(table.column("bytes_out").to_pylist())
    assert end.kernel_ns == sum(table.column("kernel_ns").to_pylist()) > 0
    assert table.column("bytes_copied").to_pylist() == [0, 0, 0]
    data, scales = table.column("quantized_data")[0].as_py(), table.column("scales")[0].as_py()
    assert table.column("bytes_out")[0].as_py() == len(data) + 4 * len(scales)


def test_limits_of_rows_and_bytes(any_engine: Engine) -> None:
    batch = request({f"w{i}": GOOD for i in range(4)})
    quantize(any_engine, batch, max_rows=4)
    with pytest.raises(TooLargeError, match="4"):
        quantize(any_engine, batch, max_rows=3)
    quantize(any_engine, batch, max_batch_bytes=4 * GOOD.nbytes + 4096)
    with pytest.raises(TooLargeError):
        quantize(any_engine, batch, max_batch_bytes=GOOD.nbytes)


def test_a_layer_over_its_limit_is_told(any_engine: Engine) -> None:
    layers = {"small": GOOD, "large": np.concatenate([GOOD, GOOD]), "again": GOOD}
    answers = quantize(any_engine, request(layers), max_layer_bytes=GOOD.nbytes)
    check_failed(answers, 1, "too_large", str(2 * GOOD.nbytes), str(GOOD.nbytes))
    check_neighbours(answers, 1)


def test_a_call_over_its_limit_ends(any_engine: Engine) -> None:
    batch = request({"a": GOOD})
    session = any_engine.session(batch.schema, INT4, Limits(max_call_bytes=3 * GOOD.nbytes))
    for _ in range(2):
        session.quantize(batch)
    large = request({"a": np.concatenate([GOOD, GOOD])})
    with pytest.raises(TooLargeError):
        session.quantize(large)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int8(), pa.utf8())], ids=str)
def test_a_name_over_its_limit_is_refused(any_engine: Engine, kind: pa.DataType) -> None:
    names = ["a" * 64, "b" * 65, "\N{SNOWMAN}" * 21]
    batch = request(around(GOOD), columns={"layer_name": pa.array(names).cast(kind)})
    with pytest.raises(TooLargeError, match="65 bytes long; expected at most 64"):
        quantize(any_engine, batch, max_name_bytes=64)
    assert quantize(any_engine, batch, max_name_bytes=65).column("layer_name").to_pylist() == names


def test_more_dimensions_than_the_limit_are_told(any_engine: Engine) -> None:
    batch = request({"a": GOOD, "b": GOOD.reshape(1, 3, 128)})
    check_failed(quantize(any_engine, batch, max_dims=2), 1, "shape_mismatch")


def test_a_batch_of_no_rows_is_refused(any_engine: Engine) -> None:
    batch = request({"a": GOOD})
    session = any_engine.session(batch.schema, INT4)
    with pytest.raises(InvalidRequestError, match="no rows"):
        session.quantize(batch.slice(0, 0))
    assert (session.end.rows, session.end.batches) == (0, 0)


def test_a_batch_of_another_schema_is_refused(any_engine: Engine) -> None:
    session = any_engine.session(request({"a": GOOD}).schema, INT4)
    for other in (
        request({"a": GOOD.astype(np.float64)}, "float64"),
        request({"a": GOOD}, kind="large_list"),
        request({"a": GOOD}, columns={"x_more": pa.array([1])}),
        request({"a": GOOD}).select(["layer_name", "weights"]),
    ):
        with pytest.raises(InvalidRequestError):
            session.quantize(other)
    assert session.quantize(request({"a": GOOD})).batch.num_rows == 1


def test_a_schema_that_breaks_the_contract_is_refused_before_any_batch(any_engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="status"):
        any_engine.session(request({"a": GOOD}, columns={"status": pa.array(["ok"])}).schema, INT4)


def test_a_large_call_can_be_stopped(any_engine: Engine) -> None:
    """Between slices of a few milliseconds: a batch of one slice may end first."""
    weights = np.ones((5 << 13, 1 << 10), np.float16)
    batch = request({"a": weights}, "float16")
    session = any_engine.session(batch.schema, INT4)
    with pytest.raises(DeadlineError):
        session.quantize(batch, should_stop=lambda: True)
    assert session.end.rows == 0
    asked: list[int] = []
    answers = session.quantize(batch, should_stop=lambda: bool(asked.append(1))).batch
    assert answers.column("status").to_pylist() == ["ok"]
    assert len(asked) >= 4


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
