"""The client: the local call's arguments and its answer table, computed by a server over one Arrow Flight stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.flight as flight

from flightquant import wire
from flightquant.client.batching import Request, by_dtype, pack, reslice
from flightquant.client.exchange import Exchange, Window
from flightquant.client.joining import Answer, join
from flightquant.errors import DeadlineError, InvalidRequestError
from flightquant.layers import as_layer, as_reader
from flightquant.spec import Command

Progress = Callable[[str, float], None]
"""Called with a layer's name and the share of that layer, above 0 and up to 1, whose answer has arrived."""


class QuantClient:
    """Quantizes weights on a server; one connection, used by one call after another or by several threads.

    Parameters
    ----------
    uri : str
        Where the server listens, such as ``grpc://127.0.0.1:8815``.
    timeout_s : float, optional
        Deadline of every call, in seconds. None: no deadline; a server that is gone is still noticed by keepalive.
    window_bytes, window_batches : int
        How many bytes of weights, and how many batches, may be under way: sent, but their answers not yet taken.
    keepalive_s : float, optional
        Seconds of silence after which the connection is probed; None: never. Servers take offence at less than 300.

    Examples
    --------
    >>> with QuantClient("grpc://127.0.0.1:8815", timeout_s=60) as client:        # doctest: +SKIP
    ...     table = client.quantize(weights, scheme="int4", group_size=128)
    """

    def __init__(
        self,
        uri: str,
        *,
        timeout_s: float | None = None,
        window_bytes: int = 64 << 20,
        window_batches: int = 16,
        keepalive_s: float | None = 300.0,
    ) -> None:
        options: list[tuple[str, int]] = []
        if keepalive_s is not None:
            options = [
                ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", 20_000),
            ]
        try:
            self._flight = flight.FlightClient(uri, generic_options=options)
        except (flight.FlightError, pa.ArrowException) as error:
            raise InvalidRequestError(
                f'cannot use the address "{uri}"; expected one such as grpc://127.0.0.1:8815', field="uri", got=uri
            ) from error
        self._timeout_s = timeout_s
        self._window_bytes = window_bytes
        self._window_batches = window_batches

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._flight.close()

    def quantize(
        self,
        weights: Any,
        scheme: str | None = None,
        *,
        bit_width: int | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: str | None = None,
        on_error: str | None = None,
        metrics: bool | None = None,
        progress: Progress | None = None,
    ) -> pa.Table:
        """Quantize weights on the server: the same table as :func:`flightquant.quantize` gives, ``kernel_ns`` aside.

        Parameters
        ----------
        weights : mapping of names to arrays, pyarrow Table, RecordBatch or reader, or any ``__arrow_c_stream__``
            NumPy, torch, ml_dtypes and pyarrow arrays of float32, float16, bfloat16 or float64; dtypes may be mixed.
        scheme, bit_width, granularity, group_size, symmetric, scale_dtype, on_error, metrics
            As in the local call; None: the server's default.
        progress : callable, optional
            Called with ``(layer_name, fraction)`` as answers arrive; the fraction is that layer's.

        Returns
        -------
        pa.Table
            One row for each layer, in the order given; the contract's answer columns.

        Raises
        ------
        InvalidRequestError, TooLargeError
            The arguments or the weights break the contract or a limit.
        StreamCutError, UnavailableError, DeadlineError, OverloadedError, DrainingError
            The call did not end well: nothing of it counts.
        """
        batches = list(
            self.stream(
                weights,
                scheme,
                bit_width=bit_width,
                granularity=granularity,
                group_size=group_size,
                symmetric=symmetric,
                scale_dtype=scale_dtype,
                on_error=on_error,
                metrics=metrics,
                progress=progress,
            )
        )
        if not batches:
            schema = weights.schema if isinstance(weights, pa.Table | pa.RecordBatch) else pa.schema([])
            return wire.answer_schema(schema).empty_table()
        if isinstance(weights, Mapping):
            batches = _in_order(batches, list(weights))
        return pa.Table.from_batches(batches)

    def stream(
        self,
        weights: Any,
        scheme: str | None = None,
        *,
        bit_width: int | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: str | None = None,
        on_error: str | None = None,
        metrics: bool | None = None,
        progress: Progress | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Answer batches as they come, while later weights are still being sent.

        Takes what :meth:`quantize` takes, and an iterable of RecordBatches, which is read only as fast as answers are
        taken. Rows come in the order given; layers of a mapping that has several dtypes come one dtype after the
        other. A layer that was sent in parts comes as one row. Leaving the iterator early cancels the call.
        """
        command = Command.build(
            scheme=scheme,
            bit_width=bit_width,
            granularity=granularity,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            on_error=on_error,
            metrics=metrics,
        )
        return self._stream(weights, command, progress)

    def _stream(self, weights: Any, command: Command, progress: Progress | None) -> Iterator[pa.RecordBatch]:
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        if not isinstance(weights, Mapping):
            yield from self._call(reslice(_batches(weights), command), command, deadline, progress)
            return
        # One stream has one dtype. Names, not tensors, wait for their turn: a mapping may load lazily.
        waiting: dict[str, list[str]] = {}
        everything = (as_layer(name, tensor) for name, tensor in weights.items())
        yield from self._call(pack(by_dtype(everything, waiting), command), command, deadline, progress)
        for dtype, names in waiting.items():
            layers = (as_layer(name, weights[name]) for name in names)
            yield from self._call(pack(by_dtype(layers, {}, dtype), command), command, deadline, progress)

    def _call(
        self, requests: Iterator[Request], command: Command, deadline: float | None, progress: Progress | None
    ) -> Iterator[pa.RecordBatch]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineError(f"the call's {self._timeout_s} s are over")
        options = flight.FlightCallOptions(timeout=left, headers=[(wire.SUMS_HEADER.encode(), b"1")])
        window = Window(self._window_bytes, self._window_batches)
        answers = iter(Exchange(self._flight, command.to_json(), options, requests, window))
        try:
            yield from join(_told(answers, progress) if progress else answers)
        finally:
            answers.close()  # type: ignore[attr-defined]


def _batches(weights: Any) -> Iterable[pa.RecordBatch]:
    """Request batches from anything Arrow, or from an iterable of RecordBatches."""
    if isinstance(weights, Iterator | list | tuple) and not hasattr(weights, "__arrow_c_stream__"):
        return weights
    reader: Iterable[pa.RecordBatch] = as_reader(weights)
    return reader


def _told(answers: Iterator[Answer], progress: Progress) -> Iterator[Answer]:
    """The answers, each layer's progress told before its answer is given on."""
    for answer in answers:
        part = answer.request.part
        fraction = part.last / part.shape[0] if part else 1.0
        for name in answer.request.names:
            progress(name, fraction)
        yield answer


def _in_order(batches: list[pa.RecordBatch], names: list[str]) -> list[pa.RecordBatch]:
    """The rows in the mapping's order, as slices: runs of rows that already stand together stay together."""
    if len(batches) == 1:
        return batches
    places: dict[str, tuple[pa.RecordBatch, int]] = {}
    for batch in batches:
        places |= {name: (batch, row) for row, name in enumerate(batch.column("layer_name").to_pylist())}
    runs: list[tuple[pa.RecordBatch, int, int]] = []
    for name in names:
        batch, row = places[name]
        if runs and runs[-1][0] is batch and runs[-1][1] + runs[-1][2] == row:
            runs[-1] = (batch, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((batch, row, 1))
    return [batch.slice(first, count) for batch, first, count in runs]
