"""Ready-made recipes, and llama.cpp's own mixture of types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "vllm-w4a16": {"target": "compressed-tensors", "scheme": "int4", "group_size": 128},
    "vllm-fp8": {"target": "compressed-tensors", "scheme": "fp8_e4m3", "activations": "dynamic"},
    "vllm-nvfp4": {"target": "compressed-tensors", "scheme": "nvfp4"},
    "gguf-q4_k_m": {"target": "gguf", "scheme": "q4_k", "mixture": "q4_k_m"},
    "qlora-nf4": {"target": "bitsandbytes", "scheme": "nf4", "group_size": 64, "packing": "bnb-nested"},
    "edge": {"target": "compressed-tensors", "scheme": "int2", "group_size": 256},
    "local": {"target": "compressed-tensors", "scheme": "int4", "group_size": 128},
    "cloud": {"target": "compressed-tensors", "scheme": "int8", "group_size": 64},
}
"""Name to recipe."""

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_KIND = re.compile(r"^blk\.\d+\.(?:(attn_(?:v|qkv|kv_b))|(attn_k)|(attn_output)|(ffn_down)(?:_exps|_shexp)?)\.weight$")
_KINDS = ("values", "keys", "attention output", "way down")
_EXPERTS = re.compile(r"^blk\.\d+\.ffn_(?:down|gate|up)_exps\.weight$")
_EIGHT_EXPERTS = {"values": "q8_0", "keys": "q8_0", "attention output": "q5_k"}
_SEVENTY_BILLION = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""The blocks by which llama.cpp knows a model of 70 billion weights, whose few value heads many share."""
_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama.cpp takes where 256 does not divide a row: of about the same size, in blocks of 32."""


def q4_k_m(shapes: Mapping[str, tuple[int, ...]], architecture: str) -> dict[str, str]:
    """The scheme that llama.cpp's ``Q4_K_M`` gives to each tensor of a model.

    The output matrix, and those of attention values (alone or fused with others) and of the way down in the first and
    last eighth of the blocks and in every third one between, have ``q6_k``; all others ``q4_k``. With eight experts
    attention keys and values have ``q8_0`` and its output ``q5_k``; in models of 70 billion weights no values have
    less than ``q5_k``. Falcon's output matrix has ``q8_0``, and its ways down ``q5_k`` for ``q6_k`` after the first
    sixteenth of the blocks. The rule is that of llama.cpp's ``llama_tensor_get_type`` (read in the source that
    llama-cpp-python 0.3.36 carries).

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Each tensor's name (as GGUF files have them) and its shape, row-major.
    architecture : str
        The file's ``general.architecture``.
    """
    falcon = architecture == "falcon"
    block_of = {name: int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    kind_of = {name: _KINDS[match.lastindex - 1] for name in shapes if (match := _KIND.match(name)) and match.lastindex}
    values = sorted((block_of[name], name) for name, kind in kind_of.items() if kind == "values")
    with_way_down = sorted({block_of[name] for name, kind in kind_of.items() if kind == "way down"})
    blocks = len(set(block_of.values()))
    eight = any(_EXPERTS.match(name) and len(shape) == 3 and shape[0] == 8 for name, shape in shapes.items())
    large = _is_seventy_billion(shapes, architecture, blocks)
    output = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    chosen = {}
    for name, shape in shapes.items():
        kind, scheme = kind_of.get(name), "q4_k"
        if name == output:
            scheme = "q8_0" if falcon else "q6_k"
        elif kind == "values":
            more = _more_bits(values.index((block_of[name], name)), len(values))
            scheme = "q6_k" if more else "q5_k" if large else "q4_k"
        elif kind == "way down":
            place = with_way_down.index(block_of[name])
            if _more_bits(place, blocks):
                scheme = "q5_k" if falcon and place >= blocks // 16 else "q6_k"
        if eight and not (falcon and kind == "attention output"):
            scheme = _EIGHT_EXPERTS.get(kind or "", scheme)
        fits = scheme == "q8_0" or (shape or (1,))[-1] % 256 == 0
        chosen[name] = scheme if fits else _FALLBACK[scheme]
    return chosen


def _is_seventy_billion(shapes: Mapping[str, tuple[int, ...]], architecture: str, blocks: int) -> bool:
    if blocks == 0 or blocks != _SEVENTY_BILLION.get(architecture):
        return False
    # LLaMA's first model of 80 blocks had a key head for each head.
    return architecture != "llama" or shapes.get("blk.0.attn_q.weight") != shapes.get("blk.0.attn_k.weight")


def _more_bits(place: int, count: int) -> bool:
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2


MIXTURES = {"q4_k_m": q4_k_m}
"""llama.cpp's own choices, by the name in lower case."""
