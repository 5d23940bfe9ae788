"""How a bad row is told, without harm to its neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_rows import GOOD, INT4, INT8, WIDE, around, check_failed, check_neighbours, override_columns, quantize
from fq_testing import check_row, reference_layer, request, stored_as, weights_type

from flightquant.cython_core.engine import Engine
from flightquant.errors import LayerError
from flightquant.spec import Command

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
