"""The same call with this process's own kernels, which load when they are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from flightquant.client.calls import Cancellation, Placed, Progress
from flightquant.client.retry import late
from flightquant.client.weights import as_batches
from flightquant.layers import as_layer, with_importance
from flightquant.spec import Command

RUN_BYTES = 16 << 20
"""Layers are quantized together while they have no more bytes: answers come soon, and few layers are held."""


def answers(
    weights: Any,
    command: Command,
    importance: Mapping[str, Any] | None,
    deadline: float | None,
    progress: Progress | None,
    cancellation: Cancellation,
    n_threads: int | None = None,
) -> Iterator[Placed]:
    """Answer batches, in order. A source's memory is given up as its weights are quantized."""

    def check() -> None:
        cancellation.check()
        if deadline is not None and time.monotonic() > deadline:
            raise late(None)

    told = progress or (lambda name, fraction: None)
    check()
    if isinstance(weights, Mapping):
        batches = _of_layers(weights, command, importance, told, check, n_threads)
    else:
        batches = _of_batches(weights, command, importance, told, n_threads)
    for place, batch in enumerate(batches):
        yield (0, place), batch
        check()


def _of_batches(
    weights: Any, command: Command, importance: Any, told: Progress, n_threads: int | None
) -> Iterator[pa.RecordBatch]:
    from flightquant import quantize

    for part in as_batches(weights):
        table = quantize(part, importance=importance, n_threads=n_threads, **command.options())
        for batch in table.to_batches():
            for name in batch.column("layer_name").to_pylist():
                told(name, 1.0)
            yield batch


def _of_layers(
    weights: Mapping[str, Any],
    command: Command,
    importance: Mapping[str, Any] | None,
    told: Progress,
    check: Callable[[], None],
    n_threads: int | None,
) -> Iterator[pa.RecordBatch]:
    from flightquant.cython_core.local import answer_run, runs, shared_engine

    engine = shared_engine(n_threads)
    release = getattr(weights, "release", lambda name: None)
    layers = (with_importance(as_layer(name, weights[name]), importance) for name in weights)
    for run in runs(layers, RUN_BYTES):

        def between(share: float, names: list[str] = [layer.name for layer in run]) -> None:  # noqa: B006
            check()
            if len(names) == 1 or share == 1:
                for name in names:
                    release(name)
                    told(name, share)

        yield answer_run(engine, run, command, between)
