"""A trainer pushes its bfloat16 weights after every step; the rollout engine gets 8-bit floats with 128x128 scales.

What comes back for ``X.weight`` is what DeepSeek-style checkpoints and vLLM's block-quantized loaders hold: the 8-bit
floats as ``X.weight`` and, for each block of 128x128, what to multiply it by as ``X.weight_scale_inv`` (float32).

Usage: python examples/weight_sync.py [URI] [LAYERS] [STEPS]
measures steps that push everything, and steps that push the one layer in ten that has changed. URI may be "local".
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.client import QuantClient
from flightquant.layers import Layer, as_layer

Pushed = Iterator[tuple[str, npt.NDArray[Any]]]
BLOCK = 128


class WeightSync:
    """Sends layers to be quantized, all of them or those whose content differs from the last push.

    Parameters
    ----------
    client : QuantClient
        Of a server, of several, or local.
    """

    def __init__(self, client: QuantClient) -> None:
        self._client = client
        self._seen: dict[str, bytes] = {}

    def push(self, weights: Mapping[str, Any], *, changed_only: bool = False) -> Pushed:
        """Tensors for the engine as they come, while later layers are still being sent.

        Parameters
        ----------
        weights : mapping of str to 2-D array or tensor
            Names end with ``weight``.
        changed_only : bool
            Leave out layers whose hash is that of their last push with ``changed_only``.

        Raises
        ------
        ValueError
            A layer cannot be quantized, by a NaN for instance. What had come before counts.
        """
        layers = {name: as_layer(name, tensor) for name, tensor in weights.items()}
        digests = {name: digest(layer) for name, layer in layers.items()} if changed_only else {}
        if changed_only:
            layers = {name: layer for name, layer in layers.items() if self._seen.get(name) != digests[name]}
        answers = self._client.stream(
            layers, "fp8_e4m3", granularity="block", scale_dtype="float32", on_error="abort", metrics=False
        )
        for batch in answers:
            for row in range(batch.num_rows):
                name, (rows, cols) = batch["layer_name"][row].as_py(), batch["shape"][row].as_py()
                data = np.frombuffer(batch["quantized_data"][row].as_buffer(), np.uint8)
                scales = batch["scales"][row].values.to_numpy()
                yield name, data.reshape(rows, cols)
                yield f"{name}_scale_inv", scales.reshape(-(-rows // BLOCK), -(-cols // BLOCK))
                # Only what has come is known to the engine.
                if name in digests:
                    self._seen[name] = digests[name]


def digest(layer: Layer) -> bytes:
    """A hash of a layer's shape and content: BLAKE2b, faster than SHA-256 where no instructions help it."""
    found = hashlib.blake2b(repr((layer.shape, layer.dtype)).encode(), digest_size=16)
    found.update(layer.data.view(np.uint8).data)
    return found.digest()


def bfloat16_model(layers: int) -> dict[str, Layer]:
    """Layers of 2048x2048 in bfloat16, 8 MiB each."""
    rng = np.random.default_rng(0)
    bits = (rng.standard_normal(2048 * 2048, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return {
        f"model.layers.{i}.mlp.up_proj.weight": Layer("", (2048, 2048), "bfloat16", np.roll(bits, i))
        for i in range(layers)
    }


def main() -> None:
    """Print seconds and GB/s of both ways to push."""
    uri, layers, steps = [*sys.argv[1:], *["local", "32", "5"][len(sys.argv) - 1 :]]
    named = {name: Layer(name, held.shape, held.dtype, held.data) for name, held in bfloat16_model(int(layers)).items()}
    nbytes = sum(layer.nbytes for layer in named.values())
    with QuantClient(uri) as client:
        sync = WeightSync(client)
        for kind, changed_only in (("all layers", False), ("1 layer in 10", True)):
            seconds = []
            for step in range(int(steps) + 1):
                for layer in list(named.values())[step % 10 :: 10]:
                    layer.data[0] ^= 1
                started = time.perf_counter()
                tensors = sum(1 for _ in sync.push(named, changed_only=changed_only))
                seconds.append(time.perf_counter() - started)
            median = statistics.median(seconds[1:])  # the first warms up, and has no step before it
            print(
                f"{kind}: {median:.3f} s a step, {nbytes / median / 1e9:.2f} GB/s of bfloat16, {tensors} tensors back"
            )


if __name__ == "__main__":
    main()
