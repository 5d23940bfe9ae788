"""The client: the local call's arguments and its answer table, computed by a server over one Arrow Flight stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant import wire
from flightquant.client import in_process, taken_back
from flightquant.client.batching import by_dtype, pack, reslice
from flightquant.client.calls import Call, Cancellation, Placed, Progress, Settings
from flightquant.client.connection import Credentials
from flightquant.client.exchange import STALL_SECONDS
from flightquant.client.retry import Retry
from flightquant.client.servers import Servers
from flightquant.client.weights import as_batches, opened
from flightquant.layers import as_layer, named_layers, refuse_importance, with_importance
from flightquant.spec import Command

_ROWS = Command.build(scheme="int8")
LOCAL = "local"
"""The address of this process's own kernels."""


class QuantClient:
    """Quantizes weights on a server, on several, or here; serves one call after another, or several threads.

    Parameters
    ----------
    uri : str
        Where the server listens, such as ``grpc://127.0.0.1:8815``; several between commas, or a name that has several
        addresses: layers are spread over all, and what a dead one held goes to the others. ``"local"``: this process's
        own kernels. ``grpc+tls://`` for TLS.
    credentials : Credentials, optional
        Bearer token and certificates.
    headers : mapping, optional
        Sent with every call, such as ``x-request-id`` or ``traceparent``: the server's log has them.
    timeout_s : float, optional
        Deadline of every call, in seconds. None: no deadline; a server that is gone is still noticed by keepalive.
    window_bytes, window_batches : int
        How many bytes of weights, and how many batches, may be under way: sent, but their answers not yet taken.
    keepalive_s : float, optional
        Seconds of silence after which the connection is probed; None: never. Servers take offence at less than 300.
    stall_s : float
        Seconds without an answer, while one is due, after which the server counts as lost.
    retry : Retry or None
        How long a call is repeated that is refused (``overloaded``, ``draining``) or lost: at the first layer without
        an answer, so that the result is the same bytes. None: the first failure is raised.
    n_threads : int, optional
        Compute threads of ``"local"``; by default the CPUs that the process may use.

    Examples
    --------
    >>> with QuantClient("grpc://127.0.0.1:8815", timeout_s=60) as client:        # doctest: +SKIP
    ...     table = client.quantize(weights, scheme="int4", group_size=128)
    """

    def __init__(
        self,
        uri: str,
        *,
        credentials: Credentials | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        window_bytes: int = 64 << 20,
        window_batches: int = 16,
        keepalive_s: float | None = 300.0,
        stall_s: float = STALL_SECONDS,
        retry: Retry | None = Retry(),  # noqa: B008 - frozen
        n_threads: int | None = None,
    ) -> None:
        self._n_threads = n_threads
        access = credentials or Credentials()
        self._settings = Settings(timeout_s, window_bytes, window_batches, stall_s, retry, access, dict(headers or {}))
        self._servers = None if uri == LOCAL else Servers(uri, keepalive_s, self._settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._servers is not None:
            self._servers.close()

    def quantize(
        self,
        weights: Any,
        scheme: str | None = None,
        *,
        bit_width: int | None = None,
        packing: str | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: str | None = None,
        importance: Mapping[str, Any] | None = None,
        calibration: str | None = None,
        fallback: bool | None = None,
        on_error: str | None = None,
        metrics: bool | None = None,
        progress: Progress | None = None,
    ) -> pa.Table:
        """Quantize weights on the server: the same table as :func:`flightquant.quantize` gives, ``kernel_ns`` aside.

        Parameters
        ----------
        weights : mapping of names to arrays, Arrow data, module, data set, path or URI
            NumPy, torch, ml_dtypes and pyarrow arrays of float32, float16, bfloat16 or float64 (dtypes may be mixed), a
            pyarrow Table, RecordBatch or reader, any ``__arrow_c_stream__``, and whatever
            :func:`flightquant.client.open_source` opens: of that, the float tensors.
        scheme, bit_width, packing, granularity, group_size, symmetric, scale_dtype, importance, calibration
        fallback, on_error, metrics
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
            The call did not end well, nor did its repetitions: nothing of it counts.
        """
        command = Command.build(
            scheme=scheme,
            bit_width=bit_width,
            packing=packing,
            granularity=granularity,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            calibration=calibration,
            fallback=fallback,
            on_error=on_error,
            metrics=metrics,
        )
        return self._quantize(weights, command, importance, progress, Cancellation())

    def _quantize(
        self,
        weights: Any,
        command: Command,
        importance: Mapping[str, Any] | None,
        progress: Progress | None,
        cancellation: Cancellation,
    ) -> pa.Table:
        with opened(weights) as held:
            batches = _sorted(self._stream(held, command, importance, progress, cancellation))
            if not batches:
                schema = held.schema if isinstance(held, pa.Table | pa.RecordBatch) else pa.schema([])
                made = wire.amax_schema if command.op == "amax" else wire.answer_schema
                return made(schema).empty_table()
            if isinstance(held, Mapping):
                batches = _in_order(batches, list(held))
        return pa.Table.from_batches(batches)

    def amax(self, weights: Any) -> pa.Table:
        """The largest magnitude of each layer: the same table as :func:`flightquant.amax` gives, costs aside.

        Parameters
        ----------
        weights
            As for :meth:`quantize`.

        Raises
        ------
        FlightquantError
            As :meth:`quantize`.
        """
        return self._amax(weights, Cancellation())

    def _amax(self, weights: Any, cancellation: Cancellation) -> pa.Table:
        if self._servers is not None:
            return self._quantize(weights, Command.build(op="amax"), None, None, cancellation)
        from flightquant import amax

        with opened(weights) as held:
            return amax(held, n_threads=self._n_threads)

    def dequantize(self, answers: pa.Table | pa.RecordBatch, *, dtype: str = "float32") -> dict[str, npt.NDArray[Any]]:
        """Quantized layers as arrays of their own shapes, by name: what :func:`flightquant.dequantize` gives.

        Parameters
        ----------
        answers : Table or RecordBatch
            What :meth:`quantize` gave, whole layers or parts; the columns that the scheme needs suffice.
        dtype : {"float32", "float16"}
            Of the arrays.

        Raises
        ------
        LayerError
            A row whose status is not ``ok``, or that the server cannot restore.
        InvalidRequestError, TooLargeError
            A column is missing, or a row stands for more than a message can hold.
        FlightquantError
            As :meth:`quantize`.
        """
        return self._dequantize(answers, dtype, Cancellation())

    def _dequantize(
        self, answers: pa.Table | pa.RecordBatch, dtype: str, cancellation: Cancellation
    ) -> dict[str, npt.NDArray[Any]]:
        command = Command.build(op="dequantize", dtype=dtype)
        if self._servers is None:
            from flightquant import dequantize

            return dequantize(answers, dtype=dtype, n_threads=self._n_threads)
        requests = taken_back.to_restore(answers, np.dtype(dtype).itemsize)
        call = Call(command, self._deadline(), None, cancellation)
        return taken_back.arrays(_sorted(self._servers.answers(requests, call, 0)), answers)

    def verify(self, weights: Any, answers: pa.Table | pa.RecordBatch) -> pa.Table:
        """Compare quantized layers with weights: the same table as :func:`flightquant.verify` gives.

        Parameters
        ----------
        weights
            As for :meth:`quantize`: at least every layer that the answers name.
        answers : Table or RecordBatch
            What :meth:`quantize` gave.

        Raises
        ------
        InvalidRequestError
            A layer has no weights, or a column is missing.
        FlightquantError
            As :meth:`quantize`.
        """
        return self._verify(weights, answers, Cancellation())

    def _verify(self, weights: Any, answers: pa.Table | pa.RecordBatch, cancellation: Cancellation) -> pa.Table:
        with opened(weights) as held:
            if self._servers is None:
                from flightquant import verify

                return verify(held, answers, n_threads=self._n_threads)
            call = Call(Command.build(op="verify"), self._deadline(), None, cancellation)
            batches = []
            # One stream has one schema, and with it one dtype of weights.
            for i, (_, run) in enumerate(groupby(taken_back.to_verify(held, answers), key=itemgetter(0))):
                requests = (request for _, request in run)
                batches += _sorted(self._servers.answers(requests, call, i))
        return taken_back.verified(batches)

    def _deadline(self) -> float | None:
        timeout_s = self._settings.timeout_s
        return None if timeout_s is None else time.monotonic() + timeout_s

    def stream(
        self,
        weights: Any,
        scheme: str | None = None,
        *,
        bit_width: int | None = None,
        packing: str | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: str | None = None,
        importance: Mapping[str, Any] | None = None,
        calibration: str | None = None,
        fallback: bool | None = None,
        on_error: str | None = None,
        metrics: bool | None = None,
        progress: Progress | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Answer batches as they come, while later weights are still being sent.

        Takes what :meth:`quantize` takes, and an iterable of RecordBatches, which is read only as fast as answers are
        taken. Rows come in the order given; layers of a mapping that has several dtypes come one dtype after the
        other. From several servers, batches come as they are answered, in any order. A layer that was sent in parts
        comes as one row. Leaving the iterator early cancels the call.
        """
        command = Command.build(
            scheme=scheme,
            bit_width=bit_width,
            packing=packing,
            granularity=granularity,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            calibration=calibration,
            fallback=fallback,
            on_error=on_error,
            metrics=metrics,
        )
        return (batch for _, batch in self._stream(weights, command, importance, progress, Cancellation()))

    def _stream(
        self,
        weights: Any,
        command: Command,
        importance: Mapping[str, Any] | None,
        progress: Progress | None,
        cancellation: Cancellation,
    ) -> Iterator[Placed]:
        """Answer batches as they come, each with its place in the call."""
        deadline = self._deadline()
        # Magnitudes are found in parts of whole rows.
        cut = _ROWS if command.op == "amax" else command
        with opened(weights) as held:
            if self._servers is None:
                yield from in_process.answers(
                    held, command, importance, deadline, progress, cancellation, self._n_threads
                )
                return
            call = Call(command, deadline, progress, cancellation)
            if not isinstance(held, Mapping):
                refuse_importance(importance)
                yield from self._servers.answers(reslice(as_batches(held), cut), call, 0)
                return
            # One stream has one dtype. Names, not tensors, wait for their turn: a mapping may load lazily.
            waiting: dict[str, list[str]] = {}
            everything = named_layers(held, importance)
            weighted = importance is not None
            requests = pack(by_dtype(everything, waiting), cut, importance=weighted)
            yield from self._servers.answers(requests, call, 0)
            for i, (dtype, names) in enumerate(waiting.items(), 1):
                layers = (with_importance(as_layer(name, held[name]), importance) for name in names)
                requests = pack(by_dtype(layers, {}, dtype), cut, importance=weighted)
                yield from self._servers.answers(requests, call, i)


def _sorted(answers: Iterator[Placed]) -> list[pa.RecordBatch]:
    return [batch for _, batch in sorted(answers, key=itemgetter(0))]


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
