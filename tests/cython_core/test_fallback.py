"""Rows that no block divides get llama.cpp's other scheme where that is asked for, and only there."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import check_row, reference_layer, request

import flightquant
from flightquant import reference
from flightquant.cython_core.engine import Engine
from flightquant.errors import InvalidRequestError
from flightquant.spec import Command

# llama.cpp's table (src/llama-quant.cpp, tensor_type_fallback).
TABLE = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
RNG = np.random.default_rng(5)
LAYERS = {f"w{cols}": RNG.standard_normal((3, cols)).astype(np.float32) for cols in (256, 288, 32, 100, 512, 0)}


@pytest.mark.parametrize("scheme", TABLE)
def test_each_row_gets_what_fits_it(any_engine: Engine, scheme: str) -> None:
    command = Command.build(scheme=scheme, fallback=True)
    batch = request(LAYERS)
    answers = any_engine.session(batch.schema, command).quantize(batch).batch
    other = TABLE[scheme]
    assert answers.column("status").to_pylist() == ["ok", "ok", "ok", "unsupported", "ok", "ok"]
    assert answers.column("scheme").to_pylist() == [scheme, other, other, scheme, scheme, scheme]
    for i, weights in enumerate(LAYERS.values()):
        if weights.size:
            check_row(answers, i, reference_layer(weights, "float32", command))
        if answers.column("scheme")[i].as_py() == other:
            check_row(answers, i, reference_layer(weights, "float32", Command.build(scheme=other)))
    back = flightquant.dequantize(pa.Table.from_batches([answers.slice(0, 3)]))
    assert [array.shape for array in back.values()] == [(3, 256), (3, 288), (3, 32)]


def test_without_it_such_rows_are_unsupported() -> None:
    assert flightquant.quantize(LAYERS, "q4_k").column("status").to_pylist()[1:3] == ["unsupported"] * 2
    with pytest.raises(reference.LayerError, match="288"):
        reference.quantize(LAYERS["w288"], Command.build(scheme="q4_k").layer_spec(), "float32")


def test_schemes_of_32_have_nothing_to_fall_back_to(any_engine: Engine) -> None:
    batch = request(LAYERS)
    answers = any_engine.session(batch.schema, Command.build(scheme="iq4_nl", fallback=True)).quantize(batch).batch
    assert answers.column("status").to_pylist() == ["ok", "ok", "ok", "unsupported", "ok", "ok"]
    assert set(answers.column("scheme").to_pylist()) == {"iq4_nl"}


def test_a_rows_own_scheme_falls_back_too(any_engine: Engine) -> None:
    layers = dict.fromkeys("abcd", LAYERS["w288"])
    schemes = pa.array([None, "q6_k", "int8", "q4_0"])
    batch = request(layers, columns={"scheme": schemes})
    answers = any_engine.session(batch.schema, Command.build(scheme="q4_k", fallback=True)).quantize(batch).batch
    assert answers.column("status").to_pylist() == ["ok"] * 4
    assert answers.column("scheme").to_pylist() == ["q5_0", "q8_0", "int8", "q4_0"]


def test_other_schemes_have_no_fallback() -> None:
    with pytest.raises(InvalidRequestError, match="fallback"):
        Command.build(scheme="int4", fallback=True)
