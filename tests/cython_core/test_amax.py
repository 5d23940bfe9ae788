"""The largest magnitude of a layer: every dtype, size, instruction set and number of threads; what is bad is told."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import KINDS, check_row, reference_layer, request, stored_as, weights_like

import flightquant
from flightquant.cython_core.engine import Engine, Limits
from flightquant.cython_core.magnitude import AmaxSession
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.reference.numeric import widen
from flightquant.spec import Command

COMMAND = Command.build(op="amax")
SIZES = (1, 15, 17, 2048, 2049, 65536, 65537, 200_003)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_size_on_every_engine(dtype: str, all_engines: list[Engine]) -> None:
    rng = np.random.default_rng(2)
    layers = {
        f"{kind}-{size}": weights_like(kind, size, dtype, rng)
        for kind, size in zip([*KINDS, *KINDS][: len(SIZES)], SIZES, strict=True)
    }
    layers["none"] = stored_as(np.zeros((0, 7)), dtype)
    batch = request(layers, dtype, alignment=5)
    wanted = [float(np.abs(widen(layer, dtype)).max(initial=0)) for layer in layers.values()]
    for engine in all_engines:
        answer = AmaxSession(engine, batch.schema, COMMAND, Limits()).quantize(batch).batch
        assert answer.column("amax").to_pylist() == wanted, engine.isa
        assert answer.column("status").to_pylist() == ["ok"] * len(layers)


def test_what_is_bad_is_told(isa_engine: Engine) -> None:
    good = np.full(70_000, -3.0, np.float32)
    bad = good.copy()
    bad[[66_000, 69_000]] = np.nan, np.inf
    columns = {"row_offset": pa.array([0, 5, None]), "x_id": pa.array(["a", "b", "c"])}
    batch = request({"a": good, "b": bad, "": good}, columns=columns)
    session = AmaxSession(isa_engine, batch.schema, COMMAND, Limits())
    answer = session.quantize(batch).batch
    assert answer.column("status").to_pylist() == ["ok", "non_finite", "empty_name"]
    assert answer.column("amax").to_pylist() == [3.0, None, None]
    assert "weight 66000 " in answer.column("error")[1].as_py()
    assert answer.column("row_offset").to_pylist() == [0, 5, None]
    assert answer.column("x_id").to_pylist() == ["a", "b", "c"]
    assert (session.end.rows, session.end.failed_rows, session.end.bytes_in) == (3, 2, 3 * 280_000)
    abort = AmaxSession(isa_engine, batch.schema, Command.build(op="amax", on_error="abort"), Limits())
    with pytest.raises(LayerError, match="layer"):
        abort.quantize(batch)


@pytest.mark.parametrize("key", ["scheme", "metrics", "group_size", "dtype"])
def test_other_keys_are_refused(key: str) -> None:
    value = {"scheme": "int4", "metrics": True, "group_size": 32, "dtype": "float32"}[key]
    with pytest.raises(InvalidRequestError, match=key):
        Command.build(op="amax", **{key: value})


def test_mixed_dtypes_in_process() -> None:
    layers = {"a": np.array([-2.5], np.float32), "b": np.array([[4, -5]], np.float16), "c": np.float64(-1e300)}
    table = flightquant.amax(layers)
    assert table.column("amax").to_pylist() == [2.5, 5.0, None]
    assert table.column("status").to_pylist() == ["ok", "ok", "non_finite"]


@pytest.mark.parametrize("options", [{"scheme": "nvfp4"}, {"scheme": "int4", "granularity": "tensor"}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_given_magnitude_may_have_nothing_to_do_with_the_weights(
    isa_engine: Engine, dtype: str, options: dict[str, str]
) -> None:
    """Quotients are then anything from zero to infinity."""
    rng, command = np.random.default_rng(7), Command.build(**options)
    weights = rng.integers(0, 2**32, size=(40, 2, 64), dtype=np.uint32).view(np.float32)
    layers = {f"w{i}": stored_as(np.nan_to_num(layer, nan=1), dtype) for i, layer in enumerate(weights)}
    given = (10.0 ** rng.uniform(-44, 38, len(layers))).astype(np.float32)
    batch = request(layers, dtype, columns={"global_amax": pa.array(given)})
    answer = isa_engine.session(batch.schema, command).quantize(batch).batch
    for i, layer in enumerate(layers.values()):
        with np.errstate(all="ignore"):
            check_row(answer, i, reference_layer(layer, dtype, command, float(given[i])), isa_engine.isa)
