"""The same stream of answers from this machine's own kernels, which load only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from flightquant.client.batching import pack
from flightquant.client.joining import Answer, join
from flightquant.layers import Layer
from flightquant.spec import Command

WINDOW_BYTES = 64 << 20
"""A larger layer is quantized in parts, whose memory the source is told to give up one by one."""


def in_process(
    layers: Mapping[str, Layer], command: Command, progress: Callable[[str, float], None], n_threads: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Answer batches, layer by layer.

    Parameters
    ----------
    progress : callable
        Called with ``(layer_name, fraction)`` for each layer or part that is done.
    """
    from flightquant.cython_core.local import shared_engine

    engine = shared_engine(n_threads)

    def parts(layer: Layer) -> Iterator[Answer]:
        session = None
        done = 0
        for request in pack([layer], command):
            if request.part is None:
                yield Answer(request, engine.quantize_layers([layer], command).batch, None)
            else:
                session = session or engine.session(request.batch.schema, command)
                answer = session.quantize(request.batch)
                yield Answer(request, answer.batch, answer.sums)
            source = getattr(layers, "source", None)
            if source is not None:
                source.release(layer.name, done, done + request.nbytes)
            done += request.nbytes
            progress(layer.name, done / layer.nbytes)

    for name, layer in layers.items():
        if layer.nbytes > WINDOW_BYTES:
            yield from join(parts(layer))
        else:
            yield engine.quantize_layers([layer], command).batch
            progress(name, 1.0)
