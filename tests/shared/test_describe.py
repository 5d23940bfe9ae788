"""What a scheme is said to take is what it takes: every value, no other, and each default is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flightquant
from flightquant.describe import describe
from flightquant.errors import InvalidRequestError
from flightquant.schemes import GRANULARITIES, SCHEMES
from flightquant.spec import BIT_WIDTHS, CALIBRATIONS, Command

DESCRIBED = {scheme["name"]: scheme for scheme in describe()}
PACKINGS = [(name, packing) for name, scheme in DESCRIBED.items() for packing in scheme["packings"]]
EVERY_PACKING = sorted({packing for _, packing in PACKINGS})
SIZES = (1, 8, 16, 24, 32, 48, 64, 100, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


def is_taken(command: dict[str, Any]) -> bool:
    try:
        return Command.parse(command).layer_spec() is not None
    except InvalidRequestError:
        return False


def values(name: str, packing: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Values of every key of a command, and whether the scheme is said to take them."""
    scheme, facts = DESCRIBED[name], DESCRIBED[name]["packings"][packing]
    for granularity in (None, *GRANULARITIES):
        known = granularity is None or granularity in facts["granularities"]
        yield {"granularity": granularity}, known
        for size in SIZES:
            fits = size in facts["group_sizes"] and granularity in (None, "group")
            yield {"granularity": granularity, "group_size": size}, fits
    for calibration in CALIBRATIONS:
        yield {"calibration": calibration}, calibration in facts["calibrations"]
    for dtype in DTYPES:
        yield {"scale_dtype": dtype}, dtype in facts["scale_dtypes"]
    zero_points = "symmetric" in facts["options"] or not facts["defaults"]["symmetric"]
    yield {"symmetric": True}, True
    yield {"symmetric": False}, zero_points
    short = [bits for bits, meant in BIT_WIDTHS.items() if meant == name]
    for bits in range(1, 17):
        yield {"bit_width": bits}, bits in (scheme["bit_widths"] or short)


@pytest.mark.parametrize(("name", "packing"), PACKINGS)
def test_a_value_is_taken_exactly_if_it_is_described(name: str, packing: str) -> None:
    for given, described in values(name, packing):
        options = {key: value for key, value in given.items() if value is not None}
        assert is_taken({"scheme": name, "packing": packing, **options}) is described, given


def test_every_packing_is_described() -> None:
    assert list(DESCRIBED) == list(SCHEMES)
    for name, scheme in DESCRIBED.items():
        assert scheme["packing"] == next(iter(scheme["packings"]))
        default = scheme["packings"][scheme["packing"]]
        assert {key: scheme[key] for key in default} == default
        for packing in EVERY_PACKING:
            assert is_taken({"scheme": name, "packing": packing}) is (packing in scheme["packings"])
    assert DESCRIBED["int4"]["packings"]["onnx"]["group_sizes"] == [16, 32, 64, 128, 256]


@pytest.mark.parametrize(("name", "packing"), PACKINGS)
def test_an_option_has_more_than_one_meaning(name: str, packing: str) -> None:
    meanings: dict[str, set[Any]] = {"packing": set(DESCRIBED[name]["packings"])}
    for given, described in values(name, packing):
        options = {key: value for key, value in given.items() if value is not None}
        if described and len(options) == 1:
            ((key, value),) = options.items()
            spec = Command.build(scheme=name, packing=packing, **options).layer_spec()
            meanings.setdefault(key, set()).add(spec.symmetric if key == "symmetric" else value)
    for fallback in (False, True):
        if is_taken({"scheme": name, "packing": packing, "fallback": fallback}):
            spec = Command.build(scheme=name, packing=packing, fallback=fallback).layer_spec()
            meanings.setdefault("fallback", set()).add(spec.fitting(96).scheme.name)
    several = {key for key, found in meanings.items() if len(found) > 1}
    assert several == set(DESCRIBED[name]["packings"][packing]["options"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "packing"), PACKINGS)
def test_the_engine_answers_what_is_described(name: str, packing: str, dtype: str) -> None:
    scheme, facts = DESCRIBED[name], DESCRIBED[name]["packings"][packing]
    assert dtype in scheme["weights"]
    weights = {"w": np.random.default_rng(3).standard_normal((64, 256)).astype(DTYPES[dtype])}

    def row(**options: Any) -> dict[str, Any]:
        (answer,) = flightquant.quantize(weights, name, metrics=False, **options).to_pylist()
        assert answer["status"] == "ok", answer["error"]
        return dict(answer)

    plain = row(packing=packing)
    for options, described in values(name, packing):
        if not described:
            continue
        answer = row(packing=packing, **options)
        assert answer["packing"] == packing
        assert answer["bit_width"] == options.get("bit_width", scheme["bits"])
        assert answer["group_size"] == options.get("group_size", answer["group_size"])
    if facts["group_sizes"]:
        assert row(packing=packing, granularity="group")["group_size"] == facts["default_group_size"]
    defaults = {key: value for key, value in facts["defaults"].items() if key in facts["options"]}
    if facts["defaults"]["granularity"] != "group":
        assert defaults.pop("group_size", None) is None
    if facts["defaults"]["scale_dtype"] == "the weights' own":
        assert plain["scale_dtype"] == ("float32" if dtype == "float64" else dtype)
        defaults.pop("scale_dtype", None)
    else:
        assert plain["scale_dtype"] == facts["defaults"]["scale_dtype"]
    named = row(**defaults)
    kept = ("quantized_data", "scales", "zero_points", "packing", "group_size")
    assert {key: named[key] for key in kept} == {key: plain[key] for key in kept}


def test_other_weights_are_refused() -> None:
    assert {tuple(scheme["weights"]) for scheme in DESCRIBED.values()} == {tuple(DTYPES)}
    for dtype in (np.int8, np.int32, np.uint16, ml_dtypes.float8_e4m3fn):
        with pytest.raises(InvalidRequestError):
            flightquant.quantize({"w": np.ones((32, 32), dtype)}, "int8")
