"""What the users send, and what they must get back: batches of every mix, and the hashes of their right answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant import reference
from flightquant.layers import as_layer, layers_batch
from flightquant.spec import Command


@dataclass(frozen=True)
class Mix:
    """One kind of traffic.

    Attributes
    ----------
    command : bytes
        The exchange's command.
    batches : list of RecordBatch
        One call sends all of them, in order; a long stream goes round and round.
    right : list of list of str
        For each batch the hashes of its rows' ``quantized_data`` and scales, by the NumPy reference.
    long_stream : bool
        Whether a user keeps one exchange open, a batch being one request.
    """

    command: bytes
    batches: list[pa.RecordBatch]
    right: list[list[str]]
    long_stream: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of weights of one call."""
        return sum(weight_bytes(batch) for batch in self.batches)


def weight_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of the weights of a batch."""
    values = batch.column("weights").flatten()
    return int(len(values) * values.type.byte_width)


def row_hashes(answer: pa.RecordBatch) -> list[str]:
    """A hash for each answer row, over packed weights and scales; its status where it has none."""
    hashes = []
    for data, scales, status in zip(
        answer.column("quantized_data"), answer.column("scales"), answer.column("status"), strict=True
    ):
        if not data.is_valid:
            hashes.append(status.as_py())
            continue
        found = hashlib.sha256(data.as_buffer())
        if scales.is_valid:
            found.update(np.ascontiguousarray(scales.values.to_numpy(), np.float32).tobytes())
        hashes.append(found.hexdigest())
    return hashes


def _right(tensor: np.ndarray[Any, Any], command: Command) -> str:
    answer = reference.quantize(tensor, command.layer_spec(), "float32", measure=False)
    found = hashlib.sha256(answer.data.tobytes())
    if answer.scales is not None:
        found.update(answer.scales.astype(np.float32).tobytes())
    return found.hexdigest()


def make(name: str) -> Mix:
    """A mix by its name: ``small``, ``large``, ``stream`` or ``sync``."""
    rng = np.random.default_rng(11)
    # Layers in a batch, rows of each (1024 weights wide), batches in a call, scheme.
    layers, rows, count, scheme = {
        "small": (32, 4, 1, "int8"),  # many small layers: 32 of 16 KiB, a call each 0.5 MiB
        "large": (1, 2048, 16, "int4"),  # one large model: 16 layers of 8 MiB
        "stream": (1, 1024, 2, "int4"),  # a stream that stays open: layers of 4 MiB
        "sync": (1, 512, 24, "q8_0"),  # a trainer's push: 24 layers of 2 MiB
    }[name]
    command = Command.build(scheme=scheme)
    batches, right = [], []
    for number in range(count):
        tensors = {
            f"model.layers.{number}.part.{i}.weight": (rng.standard_normal((rows, 1024)) * 0.02).astype(np.float32)
            for i in range(layers)
        }
        batches.append(layers_batch([as_layer(key, tensor) for key, tensor in tensors.items()]))
        right.append([_right(tensor, command) for tensor in tensors.values()])
    return Mix(json.dumps({"scheme": scheme}).encode(), batches, right, name == "stream")


MIXES = ("small", "large", "stream", "sync")
