"""The weight synchronisation example: what an engine would load, and only what has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flightquant
from flightquant.client import QuantClient
from flightquant.errors import FlightquantError

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = {f"layers.{i}.weight": np.random.default_rng(i).standard_normal((200, 300), np.float32) for i in range(3)}


@pytest.fixture
def weight_sync(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import weight_sync

    return weight_sync.WeightSync


def test_blocks_come_back_with_what_multiplies_them(weight_sync: type) -> None:
    with QuantClient("local") as client:
        tensors = dict(weight_sync(client).push(WEIGHTS))
    assert list(tensors) == [name for layer in WEIGHTS for name in (layer, f"{layer}_scale_inv")]
    answer = flightquant.quantize(WEIGHTS, "fp8_e4m3", granularity="block", scale_dtype="float32")
    restored = flightquant.dequantize(answer)
    for row, name in enumerate(WEIGHTS):
        assert tensors[name].tobytes() == answer["quantized_data"][row].as_py()
        scales = tensors[f"{name}_scale_inv"]
        assert scales.shape == (2, 3)
        assert scales.dtype == np.float32
        ml_dtypes = pytest.importorskip("ml_dtypes")
        codes = tensors[name].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        spread = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[:200, :300]
        np.testing.assert_array_equal(codes * spread, restored[name])


def test_only_what_has_changed_is_sent_again(weight_sync: type) -> None:
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    with QuantClient("local") as client:
        sync = weight_sync(client)
        assert len(dict(sync.push(weights, changed_only=True))) == 6
        assert dict(sync.push(weights, changed_only=True)) == {}
        weights["layers.1.weight"][0, 0] += 1
        assert list(dict(sync.push(weights, changed_only=True))) == ["layers.1.weight", "layers.1.weight_scale_inv"]
        assert len(dict(sync.push(weights))) == 6


def test_what_did_not_come_is_sent_again(weight_sync: type) -> None:
    weights = {**WEIGHTS, "layers.2.weight": np.full((2, 2), np.nan, np.float32)}
    with QuantClient("local") as client:
        sync = weight_sync(client)
        with pytest.raises(FlightquantError):
            dict(sync.push(weights, changed_only=True))
        assert len(dict(sync.push(WEIGHTS, changed_only=True))) >= 2


def test_it_measures_itself() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "weight_sync.py"), "local", "2", "1"],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["all layers", "1 layer in 10"]
