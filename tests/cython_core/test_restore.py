"""``op: dequantize`` and ``op: verify``: the reference's weights and the quantizer's own quality, bit for bit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import (
    KINDS,
    at_alignment,
    golden_cases,
    request,
    same_bits,
    stored_as,
    weights_array,
    weights_like,
    weights_type,
)

import flightquant
from flightquant import reference
from flightquant.cython_core.engine import Answer, Engine, Limits
from flightquant.cython_core.restore import QuantizedSession
from flightquant.errors import DeadlineError, InvalidRequestError, LayerError, TooLargeError
from flightquant.schemes import SCHEMES
from flightquant.spec import Command

SHAPES = ((3, 256), (1, 4096), (2, 3, 512), (40, 2048), (512,))
ODD_SHAPES = ((3, 7), (5, 100), (1, 1), (2, 2055), (33,))
SPECS = [
    {"scheme": name, "granularity": granularity, "symmetric": symmetric}
    for name, scheme in SCHEMES.items()
    for granularity in scheme.granularities
    for symmetric in ((True, False) if scheme.asymmetric else (True,))
]
IDS = ["-".join(map(str, spec.values())) for spec in SPECS]
DEQUANTIZE = Command.build(op="dequantize")
VERIFY = Command.build(op="verify")
INT4 = flightquant.quantize({"w": np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)}, "int4")


def layers_for(spec: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(7)
    groups = spec["granularity"] == "group"
    shapes = SHAPES if groups and not SCHEMES[spec["scheme"]].flat else SHAPES + ODD_SHAPES
    layers = {"empty": stored_as(np.zeros((0, 256)), dtype)}
    for i, shape in enumerate(shapes):
        layers[f"l{i}"] = weights_like(KINDS[i % len(KINDS)], int(np.prod(shape)), dtype, rng).reshape(shape)
    return layers


@lru_cache(maxsize=256)
def quantized(index: int, dtype: str = "float32") -> tuple[dict[str, Any], Answer]:
    """The layers for the spec of this index, and the quantizer's answer to them."""
    layers = layers_for(SPECS[index], dtype)
    return layers, answer_to(SPECS[index], layers, dtype)


def answer_to(spec: dict[str, Any], layers: dict[str, Any], dtype: str = "float32") -> Answer:
    batch = request(layers, dtype)
    answer = Engine(n_threads=1).session(batch.schema, Command.build(**spec)).quantize(batch)
    assert set(answer.batch.column("status").to_pylist()) == {"ok"}
    return answer


def restored(engine: Engine, batch: pa.RecordBatch, command: Command = DEQUANTIZE, **limits: Any) -> pa.RecordBatch:
    return QuantizedSession(engine, batch.schema, command, Limits(**limits)).answer(batch).batch


def check_weights(answers: pa.RecordBatch, batch: pa.RecordBatch, dtype: str = "float32") -> None:
    expected = reference.dequantize(batch, dtype=dtype)
    for i, (name, weights) in enumerate(expected.items()):
        row = answers.slice(i, 1).to_pylist()[0]
        assert (row["layer_name"], row["status"], row["error"]) == (name, "ok", None)
        assert row["shape"] == list(weights.shape)
        got = answers.column("weights")[i].values.to_numpy()
        nan = np.isnan(weights.reshape(-1))
        assert (np.isnan(got) == nan).all()
        same_bits(np.where(nan, 0, got).astype(dtype), np.where(nan, 0, weights.reshape(-1)).astype(dtype), name)


@pytest.mark.parametrize("index", range(len(SPECS)), ids=IDS)
def test_weights_are_the_references(isa_engine: Engine, index: int) -> None:
    batch = quantized(index)[1].batch
    for dtype in ("float32", "float16"):
        answers = restored(isa_engine, batch, Command.build(op="dequantize", dtype=dtype))
        check_weights(answers, batch, dtype)
        assert answers.schema.names == ["layer_name", "shape", "weights", "status", "error"]
        assert answers.schema.field("weights").type == pa.list_(pa.float32() if dtype == "float32" else pa.float16())
        answers.validate(full=True)


@pytest.mark.parametrize("index", range(len(SPECS)), ids=IDS)
def test_quality_is_what_quantize_said(isa_engine: Engine, index: int) -> None:
    dtype = ("float32", "float16", "bfloat16", "float64")[index % 4]
    layers, made = quantized(index, dtype)
    field = weights_type(dtype)
    batch = made.batch.append_column(field, weights_array(list(layers.values()), field, 3))
    session = QuantizedSession(isa_engine, batch.schema, VERIFY, Limits())
    answer = session.answer(batch)
    same_bits(answer.sums, made.sums, "sums")
    assert answer.batch.schema.names == [
        *("layer_name", "shape", "status", "error", "sqnr_db", "cosine", "max_abs_error")
    ]
    for name in answer.batch.schema.names:
        got, told = (each.column(name).to_pylist() for each in (answer.batch, made.batch))
        np.testing.assert_equal(got, told, name)  # takes NaN, of a layer whose scale overflows, for NaN
    weight_bytes = sum(layer.nbytes for layer in layers.values())
    floats = sum(made.batch.column(name).flatten().nbytes for name in ("scales", "zero_points"))
    assert session.end.bytes_in >= weight_bytes + floats
    assert (session.end.rows, session.end.failed_rows, session.end.bytes_out) == (len(layers), 0, 0)


VARIANTS: list[dict[str, Any]] = [
    *({"scheme": "nf4", "packing": "bnb-nested", "group_size": size} for size in (32, 4096)),
    {"scheme": "fp4", "packing": "bnb-nested"},
    *({"scheme": f"int{bits}", "packing": "fbgemm"} for bits in (8, 4, 2)),
    {"scheme": "mxfp4", "packing": "gguf"},
]


@pytest.mark.parametrize("spec", SPECS + VARIANTS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_any_bytes_at_any_address_are_what_the_reference_makes_of_them(
    isa_engine: Engine, spec: dict[str, Any]
) -> None:
    """Every code, also those that no quantizer makes: numbers that are none, infinities, the highest negative."""
    rng = np.random.default_rng(11)
    groups = spec.get("granularity") == "group" or spec["scheme"] == "mxfp4"
    shape = (5, 512) if groups else (5, 516) if spec in VARIANTS else (131, 519)
    made = answer_to(spec, {"w": rng.standard_normal(shape).astype(np.float32)}).batch
    size = len(made.column("quantized_data")[0].as_buffer())
    for alignment in (1, 62):
        values = at_alignment(rng.integers(0, 256, size).astype(np.uint8), alignment)
        offsets = pa.py_buffer(np.array([0, size], np.int32))
        data = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, values])
        batch = made.set_column(made.schema.names.index("quantized_data"), "quantized_data", data)
        for name in ("scales", "zero_points"):
            cell = batch.column(name)[0]
            if not cell.is_valid:
                continue
            floats = at_alignment(rng.standard_normal(len(cell)).astype(np.float32), alignment)
            child = pa.Array.from_buffers(pa.float32(), len(cell), [None, floats])
            ends = pa.py_buffer(np.array([0, len(cell)], np.int32))
            column = pa.Array.from_buffers(pa.list_(pa.float32()), 1, [None, ends], children=[child])
            batch = batch.set_column(batch.schema.names.index(name), name, column)
        check_weights(restored(isa_engine, batch), batch)


LAYOUTS: list[dict[str, Any]] = [
    *(
        {"scheme": scheme, "packing": packing, "symmetric": symmetric, **unit}
        for scheme, packing in (
            ("int4", "gptq"),
            ("int4", "awq"),
            ("int8", "gptq-v2"),
            ("int3", "gptq"),
            ("int2", "gptq"),
        )
        for symmetric, unit in ((True, {"group_size": 32}), (False, {"granularity": "channel"}))
    ),
    *({"scheme": scheme, "packing": "onnx", "group_size": 32} for scheme in ("int8", "int4", "int2")),
    *({"scheme": f"int{bits}", "packing": "onnx", "group_size": 16, "symmetric": bits == 4} for bits in (8, 4, 2)),
    *({"scheme": "mlx", "bit_width": bits, "group_size": 32} for bits in (2, 3, 5, 6, 8)),
    *({"scheme": f"hqq{bits}", "group_size": 32} for bits in (8, 4, 3, 2)),
    {"scheme": "nvfp4"},
    *VARIANTS,
]


@pytest.mark.parametrize("spec", LAYOUTS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_other_layouts_and_widths(spec: dict[str, Any], isa_engine: Engine) -> None:
    """Any codes, in parts of tiles and rows that joined spans cross, an odd number of groups of 16, to any address."""
    rng = np.random.default_rng(12)
    shapes = [(32, 64), (64, 192), (96, 96), (32, 2080), (160, 1056)]
    shapes += [(3, 52), (5, 2060), (2, 65540)] if spec.get("packing") in ("fbgemm", "bnb-nested") else []
    shapes += [(3, 48), (1, 16), (5, 2064)] if spec["scheme"] == "nvfp4" or spec.get("group_size") == 16 else []
    for shape in shapes:
        weights = (-np.abs(rng.standard_normal(shape)) - 0.1).astype(np.float32)
        weights[:, 1::2] *= -1  # every group has weights of both signs, which GPTQ's zero points need
        made = answer_to(spec, {"w": weights})
        same = restored(isa_engine, made.batch)
        check_weights(same, made.batch)
        size = len(made.batch.column("quantized_data")[0].as_buffer())
        values = at_alignment(rng.integers(0, 256, size).astype(np.uint8), 3)
        data = pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(np.array([0, size], np.int32)), values])
        mixed = made.batch.set_column(made.batch.schema.names.index("quantized_data"), "quantized_data", data)
        check_weights(restored(isa_engine, mixed), mixed)
        field = weights_type("float32")
        batch = made.batch.append_column(field, weights_array([weights], field, 3))
        same_bits(QuantizedSession(isa_engine, batch.schema, VERIFY, Limits()).answer(batch).sums, made.sums, "sums")


def test_the_first_weight_that_is_not_finite_is_named_in_blocks_too(isa_engine: Engine) -> None:
    """Blocks are taken a piece of columns at a time: a later weight is seen before an earlier one."""
    weights = np.ones((130, 700), np.float32)
    made = answer_to({"scheme": "fp8_e4m3", "granularity": "block"}, {"w": weights}).batch
    weights[2, 650] = weights[5, 3] = np.inf
    field = weights_type("float32")
    answer = restored(isa_engine, made.append_column(field, weights_array([weights], field, 1)), VERIFY)
    assert answer.column("status").to_pylist() == ["non_finite"]
    assert f"weight {2 * 700 + 650} " in answer.column("error")[0].as_py()


def test_golden_answers_become_the_references_weights(any_engine: Engine) -> None:
    tried = 0
    for case in golden_cases():
        command = Command.build(**case.options)
        spec, (rows, cols) = command.layer_spec(), case.weights.shape
        row = {
            "layer_name": ["w"],
            "shape": pa.array([[rows, cols]], pa.list_(pa.int64())),
            "scheme": [spec.scheme.name],
            "group_size": pa.array([spec.group_size], pa.int32()),
            "quantized_data": [case.data.tobytes()],
            "bit_width": pa.array([spec.scheme.bits], pa.uint8()),
            "packing": [spec.scheme.packing],
        }
        for name, values in (("scales", case.scales), ("zero_points", case.zero_points)):
            row[name] = pa.array([values], pa.list_(pa.float32()))
        batch = pa.RecordBatch.from_pydict(row)
        check_weights(restored(any_engine, batch), batch)
        tried += 1
    assert tried > 500


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(n_threads: int) -> None:
    layers = {"w": np.random.default_rng(3).standard_normal((600, 1024)).astype(np.float32)}
    table = flightquant.quantize(layers, "int4", symmetric=False)
    back = flightquant.dequantize(table, n_threads=n_threads)["w"]
    same_bits(back, reference.dequantize(table)["w"], "weights")
    verified = flightquant.verify(layers, table, n_threads=n_threads)
    for name in ("sqnr_db", "cosine", "max_abs_error"):
        assert verified.column(name).equals(table.column(name))


def test_only_what_a_scheme_needs_must_be_there(any_engine: Engine) -> None:
    table = flightquant.quantize({"w": np.ones((2, 64), np.float32)}, "q4_0").to_batches()[0]
    few = table.select(["layer_name", "shape", "quantized_data"])
    answers = restored(any_engine, few, Command.build(op="dequantize", scheme="q4_0"))
    check_weights(answers, table)
    assert restored(any_engine, few).column("status").to_pylist() == ["unsupported"]
    flightquant.dequantize(table.select(["layer_name", "shape", "scheme", "quantized_data"]))


def test_columns_with_wide_offsets_slices_and_echoes(any_engine: Engine) -> None:
    layers = {f"l{i}": np.random.default_rng(i).standard_normal((2, 256)).astype(np.float32) for i in range(5)}
    table = flightquant.quantize(layers, "int8", symmetric=False, granularity="group")
    wide = {"utf8": pa.large_utf8(), "binary": pa.large_binary(), "list": pa.large_list(pa.float32())}
    batch = table.combine_chunks().to_batches()[0]
    for name, kind in (
        ("layer_name", wide["utf8"]),
        ("scheme", wide["utf8"]),
        ("quantized_data", wide["binary"]),
        ("scales", wide["list"]),
        ("zero_points", wide["list"]),
        ("shape", pa.large_list(pa.int64())),
        ("group_size", pa.int64()),
    ):
        batch = batch.set_column(batch.schema.names.index(name), name, batch.column(name).cast(kind))
    batch = batch.append_column("x_note", pa.array(list("abcde")))
    for view in (batch, batch.slice(2), batch.slice(1, 3)):
        answers = restored(any_engine, view)
        check_weights(answers, view)
        assert answers.column("x_note").equals(view.column("x_note"))


def changed(**columns: Any) -> pa.RecordBatch:
    batch = INT4.to_batches()[0]
    for name, value in columns.items():
        at = batch.schema.names.index(name)
        batch = batch.set_column(at, batch.schema.field(at), pa.array([value], batch.schema.field(at).type))
    return batch


@pytest.mark.parametrize(
    ("columns", "status", "words"),
    [
        ({"layer_name": ""}, "empty_name", "name"),
        ({"layer_name": None}, "empty_name", "name"),
        ({"status": "non_finite", "error": "weight 3 is NaN"}, "non_finite", "weight 3"),
        ({"status": "what is this"}, "unsupported", "status"),
        ({"shape": None}, "shape_mismatch", "shape"),
        ({"shape": [4, None]}, "shape_mismatch", "shape"),
        ({"shape": [-4, -256]}, "shape_mismatch", "shape"),
        ({"shape": [2**40, 2**40]}, "shape_mismatch", "shape"),
        ({"shape": [2**31, 2**31, 2**31, 2**31]}, "shape_mismatch", "shape"),
        ({"shape": [1] * 9}, "shape_mismatch", "shape"),
        ({"shape": [2**47]}, "shape_mismatch", "quantized_data"),
        ({"shape": [4, 255]}, "shape_mismatch", "groups of 128"),
        ({"shape": [4, 384]}, "shape_mismatch", "quantized_data"),
        ({"scheme": "int5x"}, "unsupported", "int5x"),
        ({"scheme": None}, "unsupported", "scheme"),
        ({"scheme": "q8_0"}, "unsupported", "expected"),
        ({"packing": "ct-int8"}, "unsupported", "packing"),
        ({"packing": "x" * 5000}, "unsupported", "packing"),
        ({"bit_width": 5}, "unsupported", "bit_width"),
        ({"group_size": 100}, "unsupported", "group_size"),
        ({"group_size": -1}, "unsupported", "group_size"),
        ({"group_size": -(2**31)}, "unsupported", "group_size"),
        ({"group_size": 64}, "shape_mismatch", "scales"),
        ({"quantized_data": None}, "null_weights", "quantized_data"),
        ({"quantized_data": b""}, "shape_mismatch", "quantized_data"),
        ({"quantized_data": bytes(511)}, "shape_mismatch", "511"),
        ({"scales": None}, "shape_mismatch", "scales"),
        ({"scales": [1.0] * 7}, "shape_mismatch", "scales"),
        ({"scales": [1.0] * 9}, "shape_mismatch", "scales"),
        ({"scales": []}, "shape_mismatch", "scales"),
        ({"scales": [1.0] * 3 + [float("nan")] * 5}, "non_finite", "NaN at 3"),
        ({"scales": [None] + [1.0] * 7}, "null_weights", "null at 0"),
        ({"zero_points": [1.0]}, "shape_mismatch", "zero_points"),
        ({"zero_points": [float("nan")] * 8}, "non_finite", "zero_points"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_is_a_typed_error(
    any_engine: Engine, columns: dict[str, Any], status: str, words: str
) -> None:
    bad = changed(**columns)
    both = pa.Table.from_batches([changed(), bad, changed()]).combine_chunks().to_batches()[0]
    answers = restored(any_engine, both)
    assert answers.column("status").to_pylist() == ["ok", status, "ok"]
    text = answers.column("error")[1].as_py()
    assert words in text
    assert len(text) < 700
    assert not answers.column("weights")[1].is_valid
    assert answers.column("weights")[2].equals(answers.column("weights")[0])
    with pytest.raises(LayerError, match=status):
        restored(any_engine, both, Command.build(op="dequantize", on_error="abort"))
    if status != "empty_name":
        with pytest.raises((LayerError, InvalidRequestError)):
            flightquant.dequantize(bad)


def test_infinite_scales_are_what_the_reference_makes_of_them(any_engine: Engine) -> None:
    batch = changed(scales=[float("inf"), float("-inf")] + [1e38] * 6)
    check_weights(restored(any_engine, batch), batch)


def test_verify_names_what_does_not_fit(any_engine: Engine) -> None:
    weights = [np.ones(1024), np.ones(1023), np.full(1024, np.nan), np.where(np.arange(1024) == 7, np.inf, 1.0)]
    rows = pa.Table.from_batches([INT4.to_batches()[0]] * 4).combine_chunks().to_batches()[0]
    column = weights_array([w.astype(np.float32) for w in weights], weights_type("float32"))
    answers = restored(any_engine, rows.append_column("weights", column), VERIFY)
    assert answers.column("status").to_pylist() == ["ok", "shape_mismatch", "non_finite", "non_finite"]
    assert [text and text.split()[1] for text in answers.column("error").to_pylist()] == [None, "weights;", "0", "7"]
    assert [value is None for value in answers.column("cosine").to_pylist()] == [False, True, True, True]
    with pytest.raises(LayerError, match="non_finite"):
        restored(
            any_engine, rows.append_column("weights", column).slice(2), Command.build(op="verify", on_error="abort")
        )


def test_limits_count_the_weights(any_engine: Engine) -> None:
    batch = pa.Table.from_batches([changed(), changed()]).combine_chunks().to_batches()[0]
    assert restored(any_engine, batch, max_layer_bytes=4095).column("status").to_pylist() == ["too_large"] * 2
    assert restored(any_engine, batch, max_layer_bytes=4096).column("status").to_pylist() == ["ok"] * 2
    for limits, command in (
        ({"max_batch_bytes": 8191}, DEQUANTIZE),
        ({"max_batch_bytes": 4095}, Command.build(op="dequantize", dtype="float16")),
        ({"max_call_bytes": 8191}, DEQUANTIZE),
        ({"max_rows": 1}, DEQUANTIZE),
    ):
        with pytest.raises(TooLargeError):
            restored(any_engine, batch, command, **limits)
    session = QuantizedSession(any_engine, batch.schema, DEQUANTIZE, Limits(max_call_bytes=8192))
    session.answer(batch)
    with pytest.raises(TooLargeError, match="call"):
        session.answer(batch)
    assert (session.end.rows, session.end.batches, session.end.bytes_out) == (2, 1, 8192)
    assert session.end.bytes_in == 2 * (512 + 8 * 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (pa.field("quantized_data", pa.list_(pa.uint8())), [[1]]),
        (pa.field("quantized_data", pa.binary_view()), None),
        (pa.field("quantized_data", pa.binary(512)), None),
        (pa.field("scales", pa.list_(pa.float64())), None),
        (pa.field("scales", pa.list_(pa.float32(), 8)), None),
        (pa.field("scheme", pa.dictionary(pa.int8(), pa.utf8())), None),
        (pa.field("group_size", pa.float32()), None),
        (pa.field("bit_width", pa.int64()), None),
        (pa.field("shape", pa.list_(pa.int32())), None),
        (pa.field("weights", pa.list_(pa.float32())), None),
        (pa.field("other", pa.int8()), None),
    ],
    ids=str,
)
def test_other_columns_fail_the_call(any_engine: Engine, field: pa.Field, value: Any) -> None:
    schema = INT4.schema
    if field.name in schema.names:
        schema = schema.set(schema.names.index(field.name), field)
    else:
        schema = schema.append(field)
    with pytest.raises(InvalidRequestError, match=field.name):
        QuantizedSession(any_engine, schema, DEQUANTIZE, Limits())


@pytest.mark.parametrize("column", ["layer_name", "shape", "quantized_data", "weights"])
def test_a_missing_column_fails_the_call(any_engine: Engine, column: str) -> None:
    schema = INT4.schema.append(weights_type("float32"))
    with pytest.raises(InvalidRequestError, match=column):
        QuantizedSession(any_engine, schema.remove(schema.names.index(column)), VERIFY, Limits())


@pytest.mark.parametrize("spec", [SPECS[0], {"scheme": "fp8_e4m3", "granularity": "block", "symmetric": True}], ids=str)
def test_a_call_that_is_over_stops(any_engine: Engine, spec: dict[str, Any]) -> None:
    batch = answer_to(spec, {"a": np.ones((10000, 1024), np.float32)}).batch
    session = QuantizedSession(any_engine, batch.schema, DEQUANTIZE, Limits())
    with pytest.raises(DeadlineError):
        session.answer(batch, should_stop=lambda: True)


def test_verify_finds_the_weights_of_every_row() -> None:
    rng = np.random.default_rng(5)
    weights = {
        "a": rng.standard_normal((4, 256)).astype(np.float32),
        "b": rng.standard_normal((3, 256)).astype(np.float16),
        "c": rng.standard_normal((1200, 1024)).astype(np.float32),
        "d": rng.standard_normal((2, 256)).astype(np.float32),
    }
    table = flightquant.quantize(weights, "int4")
    asked = pa.concat_tables([table.slice(2), table.slice(0, 2)])
    told = ["layer_name", "shape", "sqnr_db", "cosine", "max_abs_error"]
    for name in told:
        assert flightquant.verify(weights, asked).column(name).equals(asked.column(name))
    batch = request({name: array for name, array in weights.items() if array.dtype == np.float32})
    assert flightquant.verify(batch, table.filter(pa.array([True, False, True, True]))).num_rows == 3
    with pytest.raises(InvalidRequestError, match='"b"'):
        flightquant.verify(batch, table)


def test_verify_takes_parts_and_bfloat16_tables() -> None:
    bits = stored_as(np.random.default_rng(5).standard_normal((4, 256)), "bfloat16")
    batch = request({"w": bits}, "bfloat16", storage=pa.binary(2))
    whole = flightquant.quantize(batch, "int8")
    columns = {"layer_name": pa.array(["w", "w"]), "row_offset": pa.array([0, 2])}
    parts = flightquant.quantize(request({"w": bits[:2], "v": bits[2:]}, "bfloat16", columns=columns), "int8")
    assert flightquant.verify(batch, whole).column("cosine").equals(whole.column("cosine"))
    assert flightquant.verify(batch, parts).column("cosine").equals(parts.column("cosine"))
