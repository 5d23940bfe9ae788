"""``calibration``: the kernels' search is the reference's, bit for bit, and what it finds is better."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import KINDS, answer_bytes, check_row, reference_layer, request, stored_as, weights_like

import flightquant
from flightquant import reference
from flightquant.cython_core.engine import Engine
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.reference import QuantizedLayer, hqq, integer
from flightquant.spec import Command

PROXIMAL = [(8, 64), (4, 32), (4, 64), (4, 128), (3, 32), (2, 64), (2, 128)]
"""Bits and group sizes."""
FLOATS = pa.list_(pa.float32())
UNITS: list[dict[str, Any]] = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 32}]
OPTIONS: list[dict[str, Any]] = [
    *(
        {"scheme": scheme, "symmetric": symmetric, **unit}
        for scheme, symmetric, unit in itertools.product(("int8", "int4"), (True, False), UNITS)
    ),
    {"scheme": "int2", "group_size": 256},
    {"scheme": "int3", "symmetric": False, "granularity": "channel"},
    {"scheme": "int4", "packing": "awq", "symmetric": False, "group_size": 64},
    {"scheme": "int4", "group_size": 128, "scale_dtype": "float16"},
]


def shapes(command: Command) -> list[tuple[int, ...]]:
    """Units of whole and broken spans, several tiles, one weight, none."""
    if command.packing is not None:
        return [(32, 64), (64, 192)]
    if command.group_size is not None:
        unit = command.group_size
        return [(1, unit), (3, 5 * unit), (2, 2048 + unit), (0, unit)]
    return [(), (1,), (3, 31), (5, 96), (2, 2049), (3, 700), (1, 65536), (2, 66_000)]


def check_on_all(
    engines: list[Engine], batch: pa.RecordBatch, command: Command, expected: list[QuantizedLayer | LayerError]
) -> None:
    """Every engine answers with the reference's rows, and all with the same bytes."""
    first = None
    for engine in engines:
        answer = engine.session(batch.schema, command).quantize(batch).batch
        if first is None or answer_bytes(answer) != first:
            for i, layer in enumerate(expected):
                check_row(answer, i, layer, f"{engine.isa} x{engine.n_threads}")
        first = first or answer_bytes(answer)
        assert answer_bytes(answer) == first, engine.isa


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_engine_is_the_reference(dtype: str, options: dict[str, Any], all_engines: list[Engine]) -> None:
    command = Command.build(calibration="mse", **options)
    rng = np.random.default_rng(17)
    layers, given = {}, []
    for i, (shape, kind) in enumerate(zip([*shapes(command), *[(2, 256)] * len(KINDS)], itertools.cycle(KINDS))):
        if command.packing is not None and shape == (2, 256):
            shape = (32, 128)
        size = int(np.prod(shape, dtype=np.int64))
        layers[f"{i}-{kind}-{shape}"] = weights_like(kind, size, dtype, rng).reshape(shape)
        cols = shape[-1] if shape else 1
        given.append(None if i % 3 == 0 else (rng.standard_normal(cols) ** 2).astype(np.float32))
    expected = [
        reference_layer(weights, dtype, command, importance=importance)
        for weights, importance in zip(layers.values(), given, strict=True)
    ]
    batch = request(layers, dtype, columns={"importance": pa.array(given, FLOATS)})
    check_on_all(all_engines, batch, command, expected)


@pytest.mark.parametrize(("bits", "group_size"), PROXIMAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_proximal_steps_are_the_references(dtype: str, bits: int, group_size: int, all_engines: list[Engine]) -> None:
    """Weights of every kind, errors below and above where they shrink to 0, spans and tiles whole and broken."""
    command = Command.build(scheme=f"hqq{bits}", group_size=group_size, calibration="proximal")
    rng = np.random.default_rng(23)
    layers = {kind: weights_like(kind, 8 * 3 * group_size, dtype, rng).reshape(8, -1) for kind in KINDS}
    layers["wide"] = stored_as(rng.standard_normal((4, 2048 + group_size)) * 10.0 ** rng.uniform(-2, 4, (4, 1)), dtype)
    layers["small"] = stored_as(rng.standard_normal((4, 65536 // 4 + group_size)) * 0.02, dtype)
    layers["one group each"] = stored_as(rng.standard_normal((4, group_size)) * 0.5, dtype)
    layers["zero points at the end of float32"] = stored_as(np.full((4, group_size), 1e38), dtype)
    layers["bad"] = layers["wide"].copy()
    layers["bad"][2, 5] = stored_as(np.array([1.0]), dtype)[0] if dtype == "bfloat16" else np.nan
    if dtype == "bfloat16":
        layers["bad"][2, 5] = 0x7FC0
    expected = [reference_layer(weights, dtype, command) for weights in layers.values()]
    batch = request(layers, dtype)
    check_on_all(all_engines, batch, command, expected)


def test_steps_end_where_the_mean_error_no_longer_falls(monkeypatch: pytest.MonkeyPatch, any_engine: Engine) -> None:
    """Early, in the middle, or not at all, and the kernels count as many."""
    rng = np.random.default_rng(1)
    layers = {
        "grid": np.resize(np.arange(16, dtype=np.float32), (2, 64)),
        "ties": weights_like("ties", 256, "float32", rng).reshape(4, 64),
        "few": (rng.standard_normal((2, 64)) * 0.02).astype(np.float32),
        "many": (rng.standard_normal((64, 256)) * 3).astype(np.float32),
    }
    counted = []
    mean = hqq.mean_magnitude
    monkeypatch.setattr(hqq, "mean_magnitude", lambda errors: (counted.append(0), mean(errors))[1])
    command = Command.build(scheme="hqq4", calibration="proximal")
    batch = request(layers)
    answer = any_engine.session(batch.schema, command).quantize(batch).batch
    steps = []
    for i, weights in enumerate(layers.values()):
        counted.clear()
        check_row(answer, i, reference_layer(weights, "float32", command))
        steps.append(len(counted))
    assert steps[0] < 4
    assert 2 < steps[2] < hqq.STEPS
    assert steps[3] == hqq.STEPS


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_proximal_steps_leave_less_error(bits: int, spread: float) -> None:
    weights = (np.random.default_rng(6).standard_normal((64, 512)) * spread).astype(np.float32)
    weights[::7, ::50] *= 6

    def errors(**options: Any) -> tuple[float, float]:
        made = flightquant.dequantize(flightquant.quantize({"w": weights}, f"hqq{bits}", **options))["w"]
        return float(np.abs(made - weights).mean()), float(((made - weights) ** 2).mean())

    plain, moved = errors(), errors(calibration="proximal")
    assert moved[0] < 0.98 * plain[0]
    assert moved[1] < 0.98 * plain[1]


def test_the_power_is_the_correctly_rounded_one() -> None:
    """All but where float64's error decides a tie: NumPy's own float64 power, rounded, as the judge."""
    rng = np.random.default_rng(8)
    sizes = np.concatenate([rng.uniform(0.17, 3, 100_000), 10 ** rng.uniform(-0.76, 38.5, 100_000)]).astype(np.float32)
    sizes = np.append(sizes, np.float32([0.17000002, 1.4142135, 1.4142137, 2, 3.4028235e38]))
    wanted = (sizes.astype(np.float64) ** np.float64(np.float32(-0.3))).astype(np.float32)
    assert (hqq.power(sizes) != wanted).sum() <= 1


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("scheme", ["int2", "int4"])
def test_it_finds_less_error(scheme: str, unit: dict[str, Any]) -> None:
    weights = np.random.default_rng(3).standard_normal((16, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 2, 1, 0.001).astype(np.float32)

    def error(**options: Any) -> tuple[float, float]:
        made = flightquant.dequantize(flightquant.quantize({"w": weights}, scheme, **unit, **options))["w"]
        return float(((made - weights) ** 2).sum()), float((importance * (made - weights) ** 2).sum())

    plain, searched = error(), error(calibration="mse")
    weighed = error(calibration="mse", importance={"w": importance})
    assert searched[0] < 0.95 * plain[0]
    assert weighed[1] <= searched[1]


def test_the_best_factor_is_the_one_that_a_plain_search_finds() -> None:
    """By the final codes, in float64, group by group: the reference's sums may pick another only where errors tie."""
    weights = np.random.default_rng(4).standard_normal((8, 128)).astype(np.float32)
    spec = Command.build(scheme="int4", group_size=128, calibration="mse").layer_spec()
    groups = integer.grouped(weights, spec)
    errors = []
    for factor in integer.SHRINKS:
        scales = np.abs(groups).max(axis=-1, keepdims=True).astype(np.float64) * factor / 7.5
        made = np.clip(np.rint(groups / scales), -8, 7) * scales
        errors.append(((made - groups) ** 2).sum(axis=-1))
    chosen = integer.best_shrinks(groups, spec, "float32", 128, None)
    for row in range(8):
        least = min(error[row, 0] for error in errors)
        picked = errors[integer.SHRINKS.tolist().index(chosen[row, 0])][row, 0]
        assert picked <= least * (1 + 1e-5)


def test_a_given_magnitude_is_used_as_it_is(any_engine: Engine) -> None:
    weights = np.random.default_rng(5).standard_normal((4, 128)).astype(np.float32)
    command = Command.build(scheme="int4", granularity="tensor", calibration="mse")
    batch = request({"a": weights, "b": weights}, columns={"global_amax": pa.array([9.0, None], pa.float32())})
    answer = any_engine.session(batch.schema, command).quantize(batch).batch
    check_row(answer, 0, reference_layer(weights, "float32", Command.build(scheme="int4", granularity="tensor"), 9.0))
    check_row(answer, 1, reference_layer(weights, "float32", command))
    assert answer.column("scales")[1].as_py()[0] < float(np.abs(weights).max()) / 7.5


def test_other_schemes_have_no_such_calibration(any_engine: Engine) -> None:
    for scheme in ("q4_k", "nf4", "fp8_e4m3"):
        with pytest.raises(InvalidRequestError, match="calibration"):
            Command.build(scheme=scheme, calibration="mse")
    for scheme, calibration in (("int4", "best"), ("int4", "proximal"), ("hqq4", "mse")):
        with pytest.raises(InvalidRequestError, match="calibration"):
            Command.build(scheme=scheme, calibration=calibration)
    with pytest.raises(InvalidRequestError, match="calibration"):
        Command.build(scheme="int4", packing="onnx", calibration="mse")
    weights = np.ones((2, 256), np.float32)
    batch = request({"a": weights, "b": weights}, columns={"scheme": pa.array(["q8_0", None])})
    command = Command.build(scheme="int8", calibration="mse")
    answer = any_engine.session(batch.schema, command).quantize(batch).batch
    assert answer.column("status").to_pylist() == ["ok", "ok"]
    check_row(answer, 0, reference_layer(weights, "float32", Command.build(scheme="q8_0")))


def test_a_bad_weight_is_told(isa_engine: Engine) -> None:
    for unit in UNITS:
        weights = np.ones((3, 70_016), np.float32)
        weights[2, 70_001] = np.nan
        batch = request({"w": weights})
        command = Command.build(scheme="int8", calibration="mse", **unit)
        answer = isa_engine.session(batch.schema, command).quantize(batch).batch
        assert answer.column("status").to_pylist() == ["non_finite"]
        assert f"weight {2 * 70_016 + 70_001} " in answer.column("error")[0].as_py()


def test_the_reference_refuses_nothing_more() -> None:
    spec = Command.build(scheme="int8", calibration="mse").layer_spec()
    made = reference.quantize(np.zeros((2, 5), np.float32), spec, "float32")
    assert made.scales is not None
    assert (made.scales == np.float32(2.0**-23)).all()
