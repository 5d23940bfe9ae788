"""The same call with this process's own kernels, which load when they are used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flightquant.client.calls import CallCancelledError, Cancellation, Placed, Progress
from flightquant.client.retry import late
from flightquant.client.weights import as_batches
from flightquant.layers import Layer, as_layer, with_importance
from flightquant.spec import Command

if TYPE_CHECKING:
    from flightquant.cython_core.engine import Engine

RUN_BYTES = 16 << 20
"""Layers are quantized together while they have no more bytes: answers come soon, and few layers are held."""
MAX_BESIDE_BYTES = 128 << 20
"""Larger layers are not held several at a time."""


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
    telling, over = Lock(), Event()

    def answer(engine: Engine, run: list[Layer]) -> pa.RecordBatch:
        names = [layer.name for layer in run]

        def between(share: float) -> None:
            if over.is_set():
                raise CallCancelledError
            check()
            if len(names) == 1 or share == 1:
                with telling:
                    for name in names:
                        release(name)
                        told(name, share)

        return answer_run(engine, run, command, between)

    layers = (with_importance(as_layer(name, weights[name]), importance) for name in weights)
    made = runs(layers, RUN_BYTES)
    first = list(islice(made, engine.n_threads))
    if engine.n_threads == 1 or len(first) < engine.n_threads:
        yield from (answer(engine, run) for run in chain(first, made))
    else:
        yield from _side_by_side(engine, chain(first, made), answer, over)


def _side_by_side(
    engine: Engine,
    made: Iterator[list[Layer]],
    answer: Callable[[Engine, list[Layer]], pa.RecordBatch],
    over: Event,
) -> Iterator[pa.RecordBatch]:
    """Answers in order, each from a thread of its own: none waits for another, nor for who takes the answers.

    Layers too large to be held several at a time are cut among all threads, one after the other. ``over`` is set at the
    end: who is still at work ends within a slice.
    """
    beside = engine.beside()
    pending: deque[Future[pa.RecordBatch]] = deque()
    with ThreadPoolExecutor(engine.n_threads, "flightquant-layer") as pool:
        try:
            for run in made:
                alone = sum(layer.nbytes for layer in run) > MAX_BESIDE_BYTES
                while pending and (alone or len(pending) > engine.n_threads):
                    yield pending.popleft().result()
                if alone:
                    yield answer(engine, run)
                else:
                    pending.append(pool.submit(answer, beside, run))
            while pending:
                yield pending.popleft().result()
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)
