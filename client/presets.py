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

_BLOCK = re.compile(r"^blk\.(\d+)\.(attn_v|ffn_down|attn_qkv)(?:_exps)?\.weight$")
_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama.cpp takes where 256 does not divide a row: of about the same size, in blocks of 32."""


def q4_k_m(columns: Mapping[str, int]) -> dict[str, str]:
    """The scheme that llama.cpp's ``Q4_K_M`` gives to each tensor of a dense model.

    The output matrix, and those of attention values and of the way down in the first and last eighth of the blocks and
    in every third one between, have ``q6_k``; fused q/k/v matrices ``q5_k``; all others ``q4_k``. The rule is that of
    llama.cpp's ``llama_tensor_get_type`` (read in the source that llama-cpp-python 0.3.36 carries).

    Parameters
    ----------
    columns : mapping of str to int
        Each tensor's name (as GGUF files have them) and its row's length.
    """
    found = {name: match for name in columns if (match := _BLOCK.match(name))}
    blocks: dict[str, list[int]] = {}
    for match in found.values():
        blocks.setdefault(match[2], []).append(int(match[1]))
    output = "output.weight" if "output.weight" in columns else "token_embd.weight"
    chosen = {}
    for name, cols in columns.items():
        scheme = "q6_k" if name == output else "q4_k"
        if name in found:
            kind = found[name][2]
            places = sorted(blocks[kind])
            more = _more_bits(places.index(int(found[name][1])), len(places))
            scheme = "q5_k" if kind == "attn_qkv" else "q6_k" if more else "q4_k"
        chosen[name] = scheme if cols % 256 == 0 else _FALLBACK[scheme]
    return chosen


def _more_bits(place: int, count: int) -> bool:
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2


MIXTURES = {"q4_k_m": q4_k_m}
"""llama.cpp's own choices, by the name in lower case."""
