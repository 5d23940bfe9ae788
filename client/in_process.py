"""The same call with this process's own kernels, which load when they are used."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from flightquant.client.calls import Cancellation, Placed, Progress
from flightquant.client.retry import late
from flightquant.client.weights import as_batches
from flightquant.layers import Layer, as_layer
from flightquant.spec import Command

RUN_BYTES = 16 << 20
"""Layers are quantized together until they have as many bytes: answers come soon, and few layers are held."""


def answers(
    weights: Any,
    command: Command,
    importance: Mapping[str, Any] | None,
    deadline: float | None,
    progress: Progress | None,
    cancellation: Cancellation,
) -> Iterator[Placed]:
    """Answer batches, in order."""
    from flightquant import quantize

    options = command.options()
    place = 0
    for part in _runs(weights) if isinstance(weights, Mapping) else as_batches(weights):
        cancellation.check()
        if deadline is not None and time.monotonic() > deadline:
            raise late(None)
        for batch in quantize(part, importance=importance, **options).to_batches():
            for name in batch.column("layer_name").to_pylist() if progress else ():
                progress(name, 1.0)  # type: ignore[misc]
            yield (0, place), batch
            place += 1


def _runs(weights: Mapping[str, Any]) -> Iterator[dict[str, Layer]]:
    run: dict[str, Layer] = {}
    nbytes = 0
    for name, tensor in weights.items():
        layer = as_layer(name, tensor)
        run[name] = layer
        nbytes += layer.nbytes
        if nbytes >= RUN_BYTES:
            yield run
            run, nbytes = {}, 0
    if run:
        yield run
