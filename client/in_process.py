"""The same call with this process's own kernels, which load when they are used."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from flightquant.client.batching import pack
from flightquant.client.calls import Cancellation, Placed, Progress
from flightquant.client.joining import Answer, join
from flightquant.client.retry import late
from flightquant.client.weights import as_batches
from flightquant.layers import Layer, as_layer
from flightquant.spec import Command

RUN_BYTES = 16 << 20
"""Layers are quantized together until they have as many bytes: answers come soon, and few layers are held."""
WINDOW_BYTES = 64 << 20
"""A larger layer is quantized in parts, whose memory the source is told to give up one by one."""


def answers(
    weights: Any,
    command: Command,
    deadline: float | None,
    progress: Progress | None,
    cancellation: Cancellation,
    n_threads: int | None = None,
) -> Iterator[Placed]:
    """Answer batches, in order. A source's memory is given up as soon as its weights are quantized."""

    def check() -> None:
        cancellation.check()
        if deadline is not None and time.monotonic() > deadline:
            raise late(None)

    told = progress or (lambda name, fraction: None)
    work = _of_layers if isinstance(weights, Mapping) else _of_batches
    check()
    for place, batch in enumerate(work(weights, command, told, n_threads)):
        yield (0, place), batch
        check()


def _of_batches(weights: Any, command: Command, told: Progress, n_threads: int | None) -> Iterator[pa.RecordBatch]:
    from flightquant import quantize

    for part in as_batches(weights):
        for batch in quantize(part, n_threads=n_threads, **command.options()).to_batches():
            for name in batch.column("layer_name").to_pylist():
                told(name, 1.0)
            yield batch


def _of_layers(
    weights: Mapping[str, Any], command: Command, told: Progress, n_threads: int | None
) -> Iterator[pa.RecordBatch]:
    from flightquant import quantize

    release = getattr(weights, "release", lambda name, first=0, last=None: None)
    for run in _runs(weights):
        if len(run) == 1 and run[0].nbytes > WINDOW_BYTES:
            yield from join(_parts(run[0], command, told, release, n_threads))
            continue
        table = quantize({layer.name: layer for layer in run}, n_threads=n_threads, **command.options())
        for layer in run:
            release(layer.name)
            told(layer.name, 1.0)
        yield from table.to_batches()


def _runs(weights: Mapping[str, Any]) -> Iterator[list[Layer]]:
    """Small layers together, large ones alone."""
    run: list[Layer] = []
    nbytes = 0
    for name in weights:
        layer = as_layer(name, weights[name])
        if run and layer.nbytes > WINDOW_BYTES:
            yield run
            run, nbytes = [], 0
        run.append(layer)
        nbytes += layer.nbytes
        if nbytes >= RUN_BYTES:
            yield run
            run, nbytes = [], 0
    if run:
        yield run


def _parts(layer: Layer, command: Command, told: Progress, release: Any, n_threads: int | None) -> Iterator[Answer]:
    from flightquant.cython_core.local import shared_engine

    engine = shared_engine(n_threads)
    session = None
    done = 0
    for request in pack([layer], command):
        if request.part is None:
            answer = engine.quantize_layers([layer], command)
        else:
            session = session or engine.session(request.batch.schema, command)
            answer = session.quantize(request.batch)
        release(layer.name, done, done + request.nbytes)
        done += request.nbytes
        told(layer.name, done / layer.nbytes)
        yield Answer(request, answer.batch, answer.sums)
