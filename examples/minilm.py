"""Sentence embeddings of all-MiniLM-L6-v2 in NumPy: the forward pass that shows what quantized weights still know.

A BERT encoder of six layers, mean pooling over the tokens, unit length. It needs the weights as a dict of float32
arrays and the ``tokenizers`` package; no deep-learning framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

F32 = npt.NDArray[np.float32]
Weights = Mapping[str, F32]


class MiniLM:
    """The encoder for one folder of the model's files.

    Parameters
    ----------
    folder : Path
        With ``config.json`` and ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_padding()

    def embed(self, sentences: Sequence[str], weights: Weights) -> F32:
        """Embeddings of unit length, of shape (sentences, hidden size)."""
        encoded = self._tokenizer.encode_batch(list(sentences))
        ids = np.array([encoding.ids for encoding in encoded])
        mask = np.array([encoding.attention_mask for encoding in encoded], np.float32)
        hidden = self._encode(ids, mask, weights) * mask[..., None]
        pooled: F32 = hidden.sum(axis=1) / mask.sum(axis=1, keepdims=True)
        unit: F32 = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit

    def _encode(self, ids: npt.NDArray[Any], mask: F32, weights: Weights) -> F32:
        """Hidden states of shape (sentences, tokens, hidden size)."""
        hidden: F32 = (
            weights["embeddings.word_embeddings.weight"][ids]
            + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._norm(hidden, "embeddings.LayerNorm", weights)
        # Added to the scores: padding gets no attention.
        bias = (1 - mask[:, None, None, :]) * np.float32(-1e9)
        for number in range(self._config["num_hidden_layers"]):
            layer = f"encoder.layer.{number}"
            attended = self._attend(hidden, bias, f"{layer}.attention", weights)
            hidden = self._norm(hidden + attended, f"{layer}.attention.output.LayerNorm", weights)
            inner = _gelu(_linear(hidden, f"{layer}.intermediate.dense", weights))
            hidden = self._norm(
                hidden + _linear(inner, f"{layer}.output.dense", weights), f"{layer}.output.LayerNorm", weights
            )
        return hidden

    def _attend(self, hidden: F32, bias: F32, layer: str, weights: Weights) -> F32:
        heads = self._config["num_attention_heads"]
        batch, tokens, width = hidden.shape

        def split(part: str) -> F32:
            projected = _linear(hidden, f"{layer}.self.{part}", weights)
            return projected.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3)

        query, key, value = split("query"), split("key"), split("value")
        scores = query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(width // heads)) + bias
        exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares = exponents / exponents.sum(axis=-1, keepdims=True)
        mixed = (shares @ value).transpose(0, 2, 1, 3).reshape(batch, tokens, width)
        return _linear(mixed, f"{layer}.output.dense", weights)

    def _norm(self, x: F32, name: str, weights: Weights) -> F32:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled: F32 = centred / np.sqrt(variance + np.float32(self._config["layer_norm_eps"]))
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: F32, name: str, weights: Weights) -> F32:
    product: F32 = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"]


def _gelu(x: F32) -> F32:
    """The exact form, by an approximation of erf that is right to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    erf = np.copysign(1 - series * np.exp(-z * z), x)
    result: F32 = np.float32(0.5) * x * (1 + erf)
    return result
