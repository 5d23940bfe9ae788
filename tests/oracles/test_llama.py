"""llama.cpp's own library on models of its own architecture: it loads what we write, and its quantizer writes the same.

The library is the one that cyllama's wheels carry; the models are made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flightquant.client import QuantClient, open_source
from flightquant.client.convert import convert
from flightquant.client.presets import q4_k_m
from flightquant.client.recipes import Recipe

gguf = pytest.importorskip("gguf")
llama = pytest.importorskip("cyllama.llama.llama_cpp")

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
    architecture: str = "llama"


def write_model(path: Path, shape: Shape) -> None:
    rng = np.random.default_rng(7)
    heads, falcon = shape.width // 64, shape.architecture == "falcon"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁w{i}" for i in range(61))]
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name("made")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if shape.dtype is np.float32 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(128)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
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
        if falcon:
            writer.add_tensor(f"{name}.bias", rng.standard_normal(shape.width, np.float32) / 8)

    def block_of_falcon(at: str) -> None:
        norm(f"{at}.attn_norm")
        add(f"{at}.attn_qkv", shape.width + 2 * 64 * shape.key_heads, shape.width)
        add(f"{at}.attn_output", shape.width, shape.width)
        add(f"{at}.ffn_up", shape.feed, shape.width)
        add(f"{at}.ffn_down", shape.width, shape.feed)

    add("token_embd", len(tokens), shape.width)
    norm("output_norm")
    if not shape.tied:
        add("output", len(tokens), shape.width)
    for block in range(shape.blocks):
        at = f"blk.{block}"
        if falcon:
            block_of_falcon(at)
            continue
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


class Model(llama.LlamaModel):
    """With the member by which contexts of this version ask for the vocabulary's size, and which it lacks."""

    n_vocab = 320


def logits(path: Path) -> np.ndarray:
    """Of every token of the prompt, of shape (tokens, vocabulary)."""
    model = Model(str(path), verbose=False)
    params = llama.LlamaContextParams()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    context = llama.LlamaContext(model, params, verbose=False)
    batch = llama.LlamaBatch(n_tokens=len(PROMPT), embd=0, n_seq_max=1, verbose=False)
    for place, token in enumerate(PROMPT):
        batch.add(token, place, [0], True)
    context.decode(batch)
    found = np.array([context.get_logits_ith(place) for place in range(len(PROMPT))], np.float32)
    for each in (batch, context, model):
        each.close()
    return found


def quantize(model: Path, output: Path, recipe: dict[str, Any]) -> None:
    with QuantClient("local") as client, open_source(model) as source:
        convert(source, output, Recipe.parse(recipe), lambda layers, how: client.stream(layers, **how.options()))


def quantize_theirs(model: Path, output: Path) -> None:
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = int(gguf.LlamaFileType.MOSTLY_Q4_K_M), 1
    llama.model_quantize(str(model), str(output), params)


SHAPES = {
    "16 blocks": Shape(blocks=16),
    "3 blocks, one matrix for both ends": Shape(blocks=3, tied=True),
    "float16": Shape(dtype=np.float16),
    "rows of other widths": Shape(feed=352),
    "one key head": Shape(width=512, key_heads=1),
    "4 experts": Shape(feed=256, experts=4),
    "8 experts": Shape(feed=256, experts=8),
    "falcon": Shape(blocks=16, key_heads=1, architecture="falcon"),
    "falcon, rows of other widths, one matrix for both ends": Shape(feed=352, tied=True, architecture="falcon"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q4_k_m_is_llama_cpps_own(tmp_path: Path, shape: Shape) -> None:
    """Type for type and byte for byte what llama.cpp's quantizer writes, and it computes with it."""
    model, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("model", "ours", "theirs"))
    write_model(model, shape)
    quantize(model, ours, {"preset": "gguf-q4_k_m"})
    quantize_theirs(model, theirs)
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


@pytest.mark.parametrize(
    ("architecture", "blocks", "experts", "key_heads"),
    [("llama", 16, 0, 2), ("llama", 16, 4, 2), ("llama", 16, 8, 2), ("llama", 80, 0, 2), ("llama", 80, 0, 4),
     ("falcon", 40, 0, 2), ("falcon", 16, 8, 2)],
)  # fmt: skip
def test_every_tensor_that_any_model_has_gets_llama_cpps_type(
    tmp_path: Path, architecture: str, blocks: int, experts: int, key_heads: int
) -> None:
    """Fused attention and shared experts too: the quantizer goes by names, whether or not a model is made of them."""
    model, theirs = tmp_path / "model.gguf", tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(model, architecture)
    for add, value in (
        (writer.add_block_count, blocks), (writer.add_context_length, 8), (writer.add_embedding_length, 256),
        (writer.add_feed_forward_length, 256), (writer.add_head_count, 4), (writer.add_head_count_kv, key_heads),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_layer_norm_eps, 1e-5), (writer.add_expert_count, experts),
        (writer.add_expert_used_count, min(experts, 2)), (writer.add_vocab_size, 32),
    ):  # fmt: skip
        add(value)
    heads = {"attn_k": key_heads}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (32, 256), "output.weight": (32, 256)}
    for block in range(blocks):
        attention = (
            ("attn_qkv", "attn_output") if block % 3 else ("attn_q", "attn_k", "attn_v", "attn_output", "attn_kv_b")
        )
        shapes |= {f"blk.{block}.{kind}.weight": (heads.get(kind, 4) * 8, 256) for kind in attention}
        dense = not experts or block < 2
        for way in ("up", "gate", "down"):
            kinds = {"": (32, 256)} if dense else {"_exps": (experts, 32, 256), "_shexp": (32, 256)}
            shapes |= {f"blk.{block}.ffn_{way}{kind}.weight": extents for kind, extents in kinds.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize_theirs(model, theirs)
    wanted = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(theirs).tensors}
    assert q4_k_m(shapes, architecture) == wanted


@pytest.mark.parametrize("scheme", ["q8_0", "q5_k", "iq4_nl", "q4_0"])
def test_llama_cpp_computes_with_other_schemes(tmp_path: Path, scheme: str) -> None:
    model, ours = tmp_path / "model.gguf", tmp_path / "ours.gguf"
    write_model(model, Shape())
    quantize(model, ours, {"scheme": scheme})
    before, after = logits(model), logits(ours)
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosines.min() > (0.999 if scheme == "q8_0" else 0.8), cosines
