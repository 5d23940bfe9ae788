"""What a call may be given: opened if it is a file, a folder, a data set or a module, taken as it is if not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from flightquant.client.sources import open_source
from flightquant.errors import InvalidRequestError
from flightquant.layers import as_reader


@contextmanager
def opened(weights: Any) -> Iterator[Any]:
    """A mapping of layers, or Arrow data, or an iterable of RecordBatches; what was opened is closed at the end."""
    arrow = isinstance(weights, pa.Table | pa.RecordBatch | pa.RecordBatchReader) or hasattr(
        weights, "__arrow_c_stream__"
    )
    if arrow or isinstance(weights, Mapping | Iterator | list | tuple):
        yield weights
        return
    with open_source(weights) as source:
        yield source


def _only_batches(given: Iterable[Any]) -> Iterator[pa.RecordBatch]:
    for each in given:
        if isinstance(each, pa.RecordBatch):
            yield each
        elif isinstance(each, pa.Table):
            yield from each.to_batches()
        else:
            raise InvalidRequestError(
                f"the iterable of weights gives a {type(each).__name__}; expected RecordBatches, or a mapping of names "
                "to arrays in its place",
                field="weights",
                got=type(each).__name__,
            )


def as_batches(weights: Any) -> Iterable[pa.RecordBatch]:
    """Request batches from anything Arrow, or from an iterable of RecordBatches."""
    if isinstance(weights, Iterator | list | tuple) and not hasattr(weights, "__arrow_c_stream__"):
        return _only_batches(weights)
    reader: Iterable[pa.RecordBatch] = as_reader(weights)
    return reader
