"""Whole models through arrow_quant_v2's calls: a folder that is read back, and judged by what it really holds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flightquant.compat import ArrowQuantV2, AsyncArrowQuantV2, DiffusionQuantConfig
from flightquant.errors import InvalidRequestError, LayerError

RNG = np.random.default_rng(6)
WEIGHTS = {f"layers.{i}.weight": RNG.standard_normal((16, 256), dtype=np.float32) for i in range(3)}
WEIGHTS["norm.weight"] = np.ones(256, np.float32)
KEYS = ["quantized_path", "compression_ratio", "cosine_similarity", "model_size_mb", "modality", "bit_width"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("profile", "bits"), [("local", 4), ("cloud", 8)])
def test_a_model_is_converted_and_judged(model: str, tmp_path: Path, profile: str, bits: int) -> None:
    told: list[tuple[str, float]] = []
    quantizer, output = ArrowQuantV2(), str(tmp_path / "out")
    config = DiffusionQuantConfig.from_profile(profile)
    result = quantizer.quantize_from_safetensors(model, output, config, lambda name, share: told.append((name, share)))
    assert list(result) == [*KEYS, "quantization_time_s"]
    assert (result["quantized_path"], result["bit_width"]) == (output, bits)
    assert told[-1][1] == 1.0
    assert len(told) == 3
    assert "layers.0.weight_packed" in load_file(f"{output}/model.safetensors")
    judged = quantizer.validate_quality(model, output)
    assert list(judged["per_layer_accuracy"]) == list(WEIGHTS)[:3]
    assert judged["passed"] is True
    assert judged["cosine_similarity"] == pytest.approx(result["cosine_similarity"], abs=1e-6)
    assert 1.0 < judged["compression_ratio"] < 32 / bits


def test_the_width_of_the_call_comes_before_the_configuration_s(model: str, tmp_path: Path) -> None:
    sizes: dict[int, Any] = {}
    for bits in (2, 4, 8):
        call: dict[str, Any] = {"bit_width": bits, "config": DiffusionQuantConfig(min_accuracy=0.1)}
        sizes[bits] = ArrowQuantV2().quantize_from_safetensors(model, str(tmp_path / f"{bits}"), **call)[
            "model_size_mb"
        ]
    assert sizes[2] < sizes[4] < sizes[8]


def test_what_is_under_min_accuracy_is_said_or_refused(model: str, tmp_path: Path) -> None:
    low = {"bit_width": 2, "min_accuracy": 0.999}
    with pytest.warns(UserWarning, match="under min_accuracy"):
        ArrowQuantV2().quantize_from_safetensors(model, str(tmp_path / "said"), DiffusionQuantConfig(**low))
    assert (tmp_path / "said").exists()
    with pytest.raises(LayerError, match="under min_accuracy"):
        config = DiffusionQuantConfig(**low, fail_fast=True)
        ArrowQuantV2().quantize_from_safetensors(model, str(tmp_path / "refused"), config)
    assert not (tmp_path / "refused").exists()


def test_what_holds_nothing_quantized_is_not_judged(model: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no quantized layer"):
        ArrowQuantV2().validate_quality(model, model)


def test_the_async_twin_converts_several(model: str, tmp_path: Path) -> None:
    async def run() -> None:
        quantizer = AsyncArrowQuantV2()
        models = [(model, str(tmp_path / name), DiffusionQuantConfig()) for name in ("a", "b")]
        results = await quantizer.quantize_multiple_models_async(models)
        assert [result["quantized_path"] for result in results] == [output for _, output, _ in models]
        assert (await quantizer.validate_quality_async(model, models[0][1]))["passed"] is True

    asyncio.run(run())
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
