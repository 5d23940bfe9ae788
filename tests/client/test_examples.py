"""The demonstration on a small model of the same kind, and its forward pass against transformers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as official

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "the a of in and was is on to for cat rain server weights".split()  # noqa: SIM905
CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": len(WORDS) + 2,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(41)
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    tensors = {
        f"embeddings.{kind}_embeddings.weight": rng.standard_normal((rows, width), np.float32)
        for kind, rows in (("word", CONFIG["vocab_size"]), ("position", 64), ("token_type", 2))
    }

    def norm(name: str) -> None:
        tensors[f"{name}.LayerNorm.weight"] = rng.uniform(0.5, 1.5, width).astype(np.float32)
        tensors[f"{name}.LayerNorm.bias"] = rng.standard_normal(width, np.float32)

    def linear(name: str, rows: int, cols: int) -> None:
        tensors[f"{name}.weight"] = rng.standard_normal((rows, cols), np.float32) * np.float32(0.1)
        tensors[f"{name}.bias"] = rng.standard_normal(rows, np.float32)

    norm("embeddings")
    for i in range(CONFIG["num_hidden_layers"]):
        for part in ("query", "key", "value"):
            linear(f"encoder.layer.{i}.attention.self.{part}", width, width)
        linear(f"encoder.layer.{i}.attention.output.dense", width, width)
        norm(f"encoder.layer.{i}.attention.output")
        linear(f"encoder.layer.{i}.intermediate.dense", inner, width)
        linear(f"encoder.layer.{i}.output.dense", width, inner)
        norm(f"encoder.layer.{i}.output")
    linear("pooler.dense", width, width)
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    official.save_file(parameters(), tmp_path / "model.safetensors")
    return tmp_path


def test_the_demonstration_runs_and_writes(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, EXAMPLES / "demo.py", "--model", folder, "--out", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encoder.layer.*.intermediate.dense" in done.stdout
    assert "0 bytes of weights between" in done.stdout
    assert "mean cosine 0.9" in done.stdout
    written = {path.suffix: path for path in (folder / "out").iterdir()}
    assert written[".png"].read_bytes().startswith(b"\x89PNG")
    assert "encoder.layer.1.output.dense.weight_packed" in official.load_file(written[".safetensors"])


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_the_forward_pass_is_that_of_transformers(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sentences = ["the cat", "rain on the server and weights of a cat in the rain", "unknown words"]
    minilm = load("minilm").MiniLM(folder)
    ours = minilm.embed(sentences, parameters())
    model = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in parameters().items()}, strict=True)
    lookup = {word: i for i, word in enumerate(WORDS, 2)}
    for row, sentence in enumerate(sentences):
        ids = torch.tensor([[lookup.get(word, 1) for word in sentence.split()]])
        with torch.no_grad():
            pooled = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(ours[row], (pooled / pooled.norm()).numpy(), atol=2e-6)
