"""llama.cpp's own library on models of its own architecture: it loads what we write, and its quantizer writes the same.

Needs the `llama` extra; the models are made here.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

PROMPT = [1, 300, 40, 57, 301, 66, 290]


@dataclass(frozen=True)
class Shape:
    """A model: heads of 64 features each."""

    blocks: int = 4
    width: int = 256
    feed: int = 512
    key_heads: int = 2
    tied: bool = False
    experts: int = 0
    dtype: Any = np.float32


def write_model(path: Path, shape: Shape) -> None:
    rng = np.random.default_rng(7)
    heads = shape.width // 64
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁w{i}" for i in range(61))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("made")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if shape.dtype is np.float32 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(128)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(len(tokens))
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 61])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *extents: int) -> None:
        weights = rng.standard_normal(extents, np.float32) / np.float32(np.sqrt(extents[-1]))
        writer.add_tensor(f"{name}.weight", weights.astype(shape.dtype))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", 1 + rng.standard_normal(shape.width, np.float32) / 8)

    add("token_embd", len(tokens), shape.width)
    norm("output_norm")
    if not shape.tied:
        add("output", len(tokens), shape.width)
    for block in range(shape.blocks):
        at = f"blk.{block}"
        norm(f"{at}.attn_norm")
        add(f"{at}.attn_q", shape.width, shape.width)
        add(f"{at}.attn_k", 64 * shape.key_heads, shape.width)
        add(f"{at}.attn_v", 64 * shape.key_heads, shape.width)
        add(f"{at}.attn_output", shape.width, shape.width)
        norm(f"{at}.ffn_norm")
        if shape.experts:
            writer.add_tensor(
                f"{at}.ffn_gate_inp.weight", rng.standard_normal((shape.experts, shape.width), np.float32) / 16
            )
        each, kind = ((shape.experts,), "_exps") if shape.experts else ((), "")
        add(f"{at}.ffn_gate{kind}", *each, shape.feed, shape.width)
        add(f"{at}.ffn_up{kind}", *each, shape.feed, shape.width)
        add(f"{at}.ffn_down{kind}", *each, shape.width, shape.feed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(path: Path) -> np.ndarray:
    """Of every token of the prompt, of shape (tokens, vocabulary)."""
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(PROMPT)
    found = np.array(model.scores[: len(PROMPT)])
    model.close()
    return found


def quantize(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "flightquant.client.cli", "quantize", *map(str, arguments)], check=True)


SHAPES = {
    "16 blocks": Shape(blocks=16),
    "3 blocks, one matrix for both ends": Shape(blocks=3, tied=True),
    "float16": Shape(dtype=np.float16),
    "rows of other widths": Shape(feed=352),
    "one key head": Shape(width=512, key_heads=1),
    "4 experts": Shape(feed=256, experts=4),
    "8 experts": Shape(feed=256, experts=8),
    "80 blocks": Shape(blocks=80, feed=256),
    "80 blocks, a key head for each head": Shape(blocks=80, feed=256, key_heads=4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q4_k_m_is_llama_cpps_own(tmp_path: Path, shape: Shape) -> None:
    """Type for type and byte for byte what llama.cpp's quantizer writes, and it computes with it."""
    model, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("model", "ours", "theirs"))
    write_model(model, shape)
    quantize(model, "-o", ours, "--preset", "gguf-q4_k_m")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = 1
    assert llama_cpp.llama_model_quantize(str(model).encode(), str(theirs).encode(), params) == 0
    wanted = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    written = gguf.GGUFReader(ours).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in written}
    assert kinds == {name: tensor.tensor_type.name for name, tensor in wanted.items()}
    assert {"Q4_K", "Q6_K"} <= set(kinds.values())
    for tensor in written:
        np.testing.assert_array_equal(tensor.data, wanted[tensor.name].data, tensor.name)
    before, after = logits(model), logits(ours)
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(after, logits(theirs))
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosines.min() > 0.8, cosines  # the weights are noise: what llama.cpp itself gives is the measure


@pytest.mark.parametrize("scheme", ["q8_0", "q5_k", "iq4_nl", "q4_0"])
def test_llama_cpp_computes_with_other_schemes(tmp_path: Path, scheme: str) -> None:
    model, ours = tmp_path / "model.gguf", tmp_path / "ours.gguf"
    write_model(model, Shape())
    quantize(model, "-o", ours, "--scheme", scheme)
    before, after = logits(model), logits(ours)
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosines.min() > (0.999 if scheme == "q8_0" else 0.8), cosines
