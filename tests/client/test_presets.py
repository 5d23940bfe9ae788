"""llama.cpp's mixture of types, as its own library chooses them (tests/oracles/test_llama.py compares live)."""

from __future__ import annotations

import pytest

from flightquant.client.presets import q4_k_m


def shapes(
    blocks: int, keys: int = 64, experts: tuple[int, ...] = (), feed: int = 512, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    kind = "_exps" if experts else ""
    made: dict[str, tuple[int, ...]] = {"token_embd.weight": (320, 256)}
    if not tied:
        made["output.weight"] = (320, 256)
    for block in range(blocks):
        at = f"blk.{block}"
        made[f"{at}.attn_q.weight"] = made[f"{at}.attn_output.weight"] = (256, 256)
        made[f"{at}.attn_k.weight"] = made[f"{at}.attn_v.weight"] = (keys, 256)
        made[f"{at}.ffn_up{kind}.weight"] = (*experts, feed, 256)
        made[f"{at}.ffn_down{kind}.weight"] = (*experts, 256, feed)
    return made


def test_the_first_and_last_eighth_and_every_third_block_have_more_bits() -> None:
    chosen = q4_k_m(shapes(16), "llama")
    more = [block for block in range(16) if chosen[f"blk.{block}.attn_v.weight"] == "q6_k"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert more == [block for block in range(16) if chosen[f"blk.{block}.ffn_down.weight"] == "q6_k"]
    assert (chosen["output.weight"], chosen["token_embd.weight"]) == ("q6_k", "q4_k")
    rest = {f"blk.{block}.{kind}.weight" for block in range(16) for kind in ("attn_q", "attn_k", "attn_output")}
    assert {chosen[name] for name in rest} == {"q4_k"}


def test_falcon_has_its_own_types_and_fused_attention_those_of_values() -> None:
    made = {f"blk.{block}.{kind}.weight": (256, 256) for block in range(16) for kind in ("attn_qkv", "ffn_down")}
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    for architecture, first, down, output in (("falcon", "q6_k", "q5_k", "q8_0"), ("gpt2", "q6_k", "q6_k", "q6_k")):
        chosen = q4_k_m(made | {"output.weight": (320, 256)}, architecture)
        assert chosen["output.weight"] == output
        assert {block: chosen[f"blk.{block}.attn_qkv.weight"] for block in more} == dict.fromkeys(more, "q6_k")
        downs = [chosen[f"blk.{block}.ffn_down.weight"] for block in range(16)]
        assert downs == [first, *(down if block in more else "q4_k" for block in range(1, 16))]


def test_rows_that_256_does_not_divide_fall_back() -> None:
    chosen = q4_k_m(shapes(3, feed=352, tied=True), "llama")
    assert chosen["token_embd.weight"] == "q6_k"
    assert [chosen[f"blk.{block}.ffn_down.weight"] for block in range(3)] == ["q5_0", "q5_0", "q8_0"]


@pytest.mark.parametrize(("experts", "kinds"), [(4, {"q4_k", "q6_k"}), (8, {"q8_0", "q5_k"})])
def test_eight_experts_leave_attention_more_bits(experts: int, kinds: set[str]) -> None:
    chosen = q4_k_m(shapes(4, experts=(experts,)), "llama")
    attention = ("attn_k", "attn_v", "attn_output")
    assert {chosen[f"blk.{block}.{kind}.weight"] for block in range(4) for kind in attention} == kinds
    assert [chosen[f"blk.{block}.ffn_down_exps.weight"] for block in range(4)] == ["q4_k", "q4_k", "q6_k", "q6_k"]


@pytest.mark.parametrize(
    ("architecture", "blocks", "keys", "kinds"),
    [
        ("llama", 80, 64, {"q5_k", "q6_k"}),
        ("llama", 80, 256, {"q4_k", "q6_k"}),
        ("llama", 79, 64, {"q4_k", "q6_k"}),
        ("qwen2", 80, 256, {"q5_k", "q6_k"}),
        ("gemma", 80, 64, {"q4_k", "q6_k"}),
    ],
)
def test_values_that_many_heads_share_have_more_bits(
    architecture: str, blocks: int, keys: int, kinds: set[str]
) -> None:
    chosen = q4_k_m(shapes(blocks, keys), architecture)
    assert {chosen[f"blk.{block}.attn_v.weight"] for block in range(blocks)} == kinds
