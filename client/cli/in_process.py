"""The same stream of answers from this machine's own kernels, which load only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from flightquant.layers import Layer
from flightquant.spec import Command


def in_process(
    layers: Mapping[str, Layer], command: Command, progress: Callable[[str, float], None], n_threads: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Answer batches, layer by layer.

    Parameters
    ----------
    progress : callable
        Called with ``(layer_name, 1.0)`` for each layer that is done.
    """
    from flightquant.cython_core.local import quantize

    for name, layer in layers.items():
        table = quantize(
            {name: layer},
            command.scheme,
            granularity=command.granularity,
            group_size=command.group_size,
            symmetric=command.symmetric,
            scale_dtype=command.scale_dtype,
            n_threads=n_threads,
        )
        yield from table.to_batches()
        progress(name, 1.0)
