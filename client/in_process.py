"""The same call with this process's own kernels, which load when they are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from flightquant.client.batching import pack
from flightquant.client.calls import Cancellation, Placed, Progress
from flightquant.client.joining import Answer, join
from flightquant.client.retry import late
from flightquant.client.weights import as_batches
from flightquant.layers import Layer, as_layer, with_importance
from flightquant.spec import Command

RUN_BYTES = 16 << 20
"""Layers are quantized together until they have as many bytes: answers come soon, and few layers are held."""
WINDOW_BYTES = 64 << 20
"""A larger layer is quantized in parts, whose memory the source is told to give up one by one."""

Quantize = Callable[..., pa.Table]


def answers(
    weights: Any,
    command: Command,
    importance: Mapping[str, Any] | None,
    deadline: float | None,
    progress: Progress | None,
    cancellation: Cancellation,
    n_threads: int | None = None,
) -> Iterator[Placed]:
    """Answer batches, in order. A source's memory is given up as soon as its weights are quantized."""
    from flightquant import quantize

    def check() -> None:
        cancellation.check()
        if deadline is not None and time.monotonic() > deadline:
            raise late(None)

    told = progress or (lambda name, fraction: None)
    call = partial(quantize, importance=importance, n_threads=n_threads, **command.options())
    if isinstance(weights, Mapping):
        batches = _of_layers(weights, call, partial(_parts, command, n_threads), importance, told)
    else:
        batches = _of_batches(weights, call, told)
    check()
    for place, batch in enumerate(batches):
        yield (0, place), batch
        check()


def _of_batches(weights: Any, call: Quantize, told: Progress) -> Iterator[pa.RecordBatch]:
    for part in as_batches(weights):
        for batch in call(part).to_batches():
            for name in batch.column("layer_name").to_pylist():
                told(name, 1.0)
            yield batch


def _of_layers(
    weights: Mapping[str, Any],
    call: Quantize,
    parts: Callable[[Layer], Iterator[tuple[Answer, int]]],
    importance: Mapping[str, Any] | None,
    told: Progress,
) -> Iterator[pa.RecordBatch]:
    release = getattr(weights, "release", lambda name, first=0, last=None: None)

    def one_by_one(layer: Layer) -> Iterator[Answer]:
        done = 0
        for answer, nbytes in parts(layer):
            release(layer.name, done, done + nbytes)
            done += nbytes
            told(layer.name, done / layer.nbytes)
            yield answer

    for run in _runs(with_importance(as_layer(name, weights[name]), importance) for name in weights):
        if run[0].nbytes > WINDOW_BYTES:
            yield from join(one_by_one(run[0]))
            continue
        table = call({layer.name: layer for layer in run})
        for layer in run:
            release(layer.name)
            told(layer.name, 1.0)
        yield from table.to_batches()


def _runs(layers: Iterator[Layer]) -> Iterator[list[Layer]]:
    """Small layers together, large ones alone."""
    run: list[Layer] = []
    nbytes = 0
    for layer in layers:
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


def _parts(command: Command, n_threads: int | None, layer: Layer) -> Iterator[tuple[Answer, int]]:
    """Answers for a layer's parts, each with the bytes of its weights."""
    from flightquant.cython_core.local import shared_engine

    engine = shared_engine(n_threads)
    session = None
    for request in pack([layer], command, importance=layer.importance is not None):
        if request.part is None:
            answer = engine.quantize_layers([layer], command)
        else:
            session = session or engine.session(request.batch.schema, command)
            answer = session.quantize(request.batch)
        yield Answer(request, answer.batch, answer.sums), request.nbytes
