"""What errors count: k-quants and iq4_nl search with it, other schemes ignore it, and one that does not fit is told."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import KINDS, Array, answer_bytes, at_alignment, check_row, reference_layer, request, weights_like

import flightquant
from flightquant.cython_core.engine import Engine
from flightquant.errors import InvalidRequestError
from flightquant.spec import Command

SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl")
COLS = 768
FLOATS = pa.list_(pa.float32())


def importances(rng: np.random.Generator) -> list[Array | None]:
    """As activations have it; none; with unused columns; over many decades; nothing at all."""
    usual = rng.standard_normal(COLS) ** 2
    unused = np.where(rng.random(COLS) < 0.5, 0, rng.random(COLS))
    made = [usual, unused, 10.0 ** rng.uniform(-30, 30, COLS), np.zeros(COLS)]
    return [None, *(values.astype(np.float32) for values in made)]


def column(values: list[Array | None], alignment: int = 0) -> pa.Array:
    """The column, with its values at an address of this alignment."""
    plain = pa.array(values, FLOATS)
    moved = at_alignment(plain.values.to_numpy(), alignment)
    child = pa.Array.from_buffers(pa.float32(), len(plain.values), [None, moved])
    return pa.ListArray.from_arrays(plain.offsets, child, mask=plain.is_null())


@pytest.mark.parametrize("scheme", SEARCHED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_is_the_reference(dtype: str, scheme: str, all_engines: list[Engine]) -> None:
    rng = np.random.default_rng(31)
    command = Command.build(scheme=scheme)
    given = importances(rng)
    given += [given[1]] * (len(KINDS) - len(given))
    layers = {kind: weights_like(kind, 5 * COLS, dtype, rng).reshape(5, COLS) for kind in KINDS}
    expected = [
        reference_layer(weights, dtype, command, importance=importance)
        for weights, importance in zip(layers.values(), given, strict=True)
    ]
    batch = request(layers, dtype, columns={"importance": column(given, alignment=3)})
    first = None
    for engine in all_engines:
        answer = engine.session(batch.schema, command).quantize(batch).batch
        first = first or answer_bytes(answer)
        for i, layer in enumerate(expected):
            check_row(answer, i, layer, f"{engine.isa} x{engine.n_threads}")
        assert answer_bytes(answer) == first


@pytest.mark.parametrize("scheme", SEARCHED)
def test_what_counts_comes_out_better(scheme: str) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((16, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 8 == 0, 100, 0.01).astype(np.float32)
    plain = flightquant.dequantize(flightquant.quantize({"w": weights}, scheme))["w"]
    weighted = flightquant.dequantize(flightquant.quantize({"w": weights}, scheme, importance={"w": importance}))["w"]
    errors = [float((importance * (made - weights) ** 2).sum()) for made in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("scheme", ["int4", "int8", "q8_0", "nf4", "mxfp4"])
def test_schemes_that_do_not_search_ignore_it(any_engine: Engine, scheme: str) -> None:
    weights = weights_like("normal", 4 * COLS, "float32", np.random.default_rng(4)).reshape(4, COLS)
    given = importances(np.random.default_rng(5))
    batch = request({f"w{i}": weights for i in range(len(given))}, columns={"importance": column(given)})
    command = Command.build(scheme=scheme)
    answers = any_engine.session(batch.schema, command).quantize(batch).batch
    for i in range(len(given)):
        check_row(answers, i, reference_layer(weights, "float32", command))


BAD: list[tuple[list[float | None], str, str]] = [
    ([1.0] * 255, "shape_mismatch", "255 values; expected 256"),
    ([1.0] * 257, "shape_mismatch", "257 values; expected 256"),
    ([], "shape_mismatch", "0 values; expected 256"),
    ([*[1.0] * 255, None], "null_weights", "null"),
    ([1.0, math.nan] * 128, "unsupported", "nan at index 1"),
    ([1.0, 1.0, math.inf, 1.0] * 64, "unsupported", "inf at index 2"),
    ([-1.0] * 256, "unsupported", "-1.0 at index 0"),
]


@pytest.mark.parametrize("scheme", ["q4_k", "int4"])
@pytest.mark.parametrize(("values", "status", "words"), BAD)
def test_one_that_does_not_fit_is_told(
    any_engine: Engine, values: list[float | None], status: str, words: str, scheme: str
) -> None:
    good = np.ones((2, 256), np.float32)
    batch = request({"a": good, "b": good, "c": good}, columns={"importance": pa.array([None, values, None], FLOATS)})
    answers = any_engine.session(batch.schema, Command.build(scheme=scheme)).quantize(batch).batch
    assert answers.column("status").to_pylist() == ["ok", status, "ok"]
    assert "importance" in answers.column("error")[1].as_py()
    assert words in answers.column("error")[1].as_py()


def test_an_empty_layer_may_have_any(any_engine: Engine) -> None:
    batch = request({"w": np.zeros((0, 256), np.float32)}, columns={"importance": pa.array([[1.0]], FLOATS)})
    answers = any_engine.session(batch.schema, Command.build(scheme="q4_k")).quantize(batch).batch
    assert answers.column("status").to_pylist() == ["ok"]


def test_a_mapping_and_a_column_are_the_same() -> None:
    rng = np.random.default_rng(6)
    layers = {f"w{i}": rng.standard_normal((3, COLS)).astype(np.float32) for i in range(3)}
    given: dict[str, Any] = {"w0": rng.random(COLS), "w2": rng.random(COLS).astype(np.float32).tolist(), "other": [1]}
    values = [np.asarray(given[name], np.float32) if name in given else None for name in layers]
    by_mapping = flightquant.quantize(layers, "q3_k", importance=given)
    by_column = flightquant.quantize(request(layers, columns={"importance": column(values)}), "q3_k")
    timeless = [name for name in by_column.schema.names if name != "kernel_ns"]
    assert by_mapping.select(timeless).equals(by_column.select(timeless))
    assert flightquant.quantize(layers, "q3_k").column("quantized_data") != by_mapping.column("quantized_data")


@pytest.mark.parametrize(
    ("importance", "words"), [([1.0], "mapping"), ({"w": 1.0}, "vector"), ({"w": "x"}, "vector"), ({"w": [[1]]}, "vec")]
)
def test_a_wrong_mapping_is_named(importance: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        flightquant.quantize({"w": np.ones((1, 256), np.float32)}, "q4_k", importance=importance)


def test_arrow_data_has_its_own_column() -> None:
    with pytest.raises(InvalidRequestError, match="column"):
        flightquant.quantize(request({"w": np.ones((1, 256), np.float32)}), "q4_k", importance={"w": np.ones(256)})
