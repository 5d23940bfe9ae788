"""Layers that a loader runs as one share the scale of the whole tensor in nvfp4, wherever their shards are."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

import flightquant
from flightquant.client import QuantClient
from flightquant.client.convert import convert, plan_of
from flightquant.client.recipes import Recipe
from flightquant.client.safetensors import SafetensorsFile
from flightquant.client.sources import open_source
from flightquant.errors import LayerError
from flightquant.server.app import running_server

BLOCK = "model.layers.0"
GROUPS = [
    [f"{BLOCK}.self_attn.{name}_proj" for name in "qkv"],
    [f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"],
    [f"{BLOCK}.self_attn.o_proj"],
    [f"{BLOCK}.mlp.down_proj"],
    ["model.layers.1.self_attn.q_proj"],
]
MODULES = [module for group in GROUPS for module in group]


def weights() -> dict[str, np.ndarray]:
    """Every module with a magnitude of its own."""
    rng = np.random.default_rng(21)
    return {
        f"{module}.weight": (rng.standard_normal((48, 128)) * (i + 1)).astype(ml_dtypes.bfloat16)
        for i, module in enumerate(MODULES)
    }


def folder(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint whose fused layers lie in different shards."""
    path.mkdir()
    place = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(place.values())):
        official.save_file({name: tensors[name] for name in tensors if place[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (path / "config.json").write_text('{"model_type": "none"}')
    return path


def quantized(source: Path, output: Path, location: str) -> dict[str, np.ndarray]:
    with open_source(str(source)) as opened, QuantClient(location) as client:
        convert(
            opened,
            output,
            Recipe.parse({"preset": "vllm-nvfp4"}),
            lambda layers, command: client.stream(layers, **command.options()),
        )
    found: dict[str, np.ndarray] = {}
    for path in output.glob("*.safetensors"):
        file = SafetensorsFile(path)
        found |= {name: np.frombuffer(file.data(name), np.uint8) for name in file.tensors}
    return found


@pytest.mark.parametrize("remote", [False, True], ids=["local", "server"])
def test_fused_layers_share_their_scale(tmp_path: Path, remote: bool) -> None:
    tensors = weights()
    source = folder(tmp_path / "m", tensors)
    with ExitStack() as stack:
        location = stack.enter_context(running_server()).location if remote else "local"
        stored = quantized(source, tmp_path / "q", location)
    for group in GROUPS:
        scales = {stored[f"{module}.weight_global_scale"].tobytes() for module in group}
        # A tensor of all its layers has the scale that they share, and their bytes one after the other.
        joined = np.concatenate([tensors[f"{module}.weight"] for module in group])
        (row,) = flightquant.quantize({"all": joined}, "nvfp4").to_pylist()
        assert scales == {np.float32(row["scales"][-1]).tobytes()}
        packed = b"".join(stored[f"{module}.weight_packed"].tobytes() for module in group)
        assert packed == row["quantized_data"]


def test_a_fused_layer_with_nan_fails_by_name(tmp_path: Path) -> None:
    tensors = weights()
    tensors[f"{GROUPS[0][1]}.weight"][3, 5] = np.nan
    with pytest.raises(LayerError, match=rf"{GROUPS[0][1]}.weight.*weight 389 is NaN"):
        quantized(folder(tmp_path / "m", tensors), tmp_path / "q", "local")
    assert not (tmp_path / "q").exists()


def test_other_schemes_share_nothing(tmp_path: Path) -> None:
    with open_source(str(folder(tmp_path / "m", weights()))) as opened:
        assert plan_of(opened, tmp_path / "q", Recipe.parse({"scheme": "int4"})).fused() == []
        fused = plan_of(opened, tmp_path / "q", Recipe.parse({"preset": "vllm-nvfp4"})).fused()
    wanted = [{f"{module}.weight" for module in group} for group in GROUPS if len(group) > 1]
    assert sorted(map(sorted, fused)) == sorted(map(sorted, wanted))
