"""The client for asyncio: the same calls, answers as they come by ``async for``; cancelling a task ends its call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakSet

import numpy.typing as npt
import pyarrow as pa

from flightquant.client.calls import Cancellation, Placed, Progress
from flightquant.client.client import QuantClient
from flightquant.client.connection import Credentials
from flightquant.client.exchange import STALL_SECONDS
from flightquant.client.retry import Retry
from flightquant.spec import Command

Result = TypeVar("Result")


class AsyncQuantClient:
    """:class:`QuantClient` for asyncio; any number of calls may run at once.

    Parameters
    ----------
    uri, credentials, headers, timeout_s, window_bytes, window_batches, keepalive_s, stall_s, retry, n_threads
        As for :class:`QuantClient`.

    Examples
    --------
    >>> async with AsyncQuantClient("grpc://127.0.0.1:8815") as client:                   # doctest: +SKIP
    ...     async for batch in client.stream(weights, "int4", group_size=128): ...
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
        self._client = QuantClient(
            uri,
            credentials=credentials,
            headers=headers,
            timeout_s=timeout_s,
            window_bytes=window_bytes,
            window_batches=window_batches,
            keepalive_s=keepalive_s,
            stall_s=stall_s,
            retry=retry,
            n_threads=n_threads,
        )
        self._workers: WeakSet[ThreadPoolExecutor] = WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, once the calls that were cancelled have ended: a connection outlives its calls."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        for worker in list(self._workers):
            worker.shutdown(wait=True)
        self._client.close()

    def _worker(self) -> ThreadPoolExecutor:
        """The one thread that a call's answers are waited for on."""
        worker = ThreadPoolExecutor(1, "flightquant-call")
        self._workers.add(worker)
        return worker

    async def quantize(
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
        """As :meth:`QuantClient.quantize`; ``progress`` is called on the event loop's thread."""
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
        cancellation = Cancellation()
        on_loop = _OnLoop(asyncio.get_running_loop(), cancellation)
        call = partial(self._client._quantize, weights, command, importance, on_loop.told(progress))
        try:
            return await self._run(call, cancellation=cancellation)
        finally:
            on_loop.check()

    async def amax(self, weights: Any) -> pa.Table:
        """As :meth:`QuantClient.amax`."""
        return await self._run(self._client._amax, weights)

    async def dequantize(
        self, answers: pa.Table | pa.RecordBatch, *, dtype: str = "float32"
    ) -> dict[str, npt.NDArray[Any]]:
        """As :meth:`QuantClient.dequantize`."""
        return await self._run(self._client._dequantize, answers, dtype)

    async def verify(self, weights: Any, answers: pa.Table | pa.RecordBatch) -> pa.Table:
        """As :meth:`QuantClient.verify`."""
        return await self._run(self._client._verify, weights, answers)

    async def _run(self, call: Callable[..., Result], *given: Any, cancellation: Cancellation | None = None) -> Result:
        """A call on a thread of its own, which ends with this task."""
        cancellation = cancellation or Cancellation()
        worker = self._worker()
        try:
            return await asyncio.get_running_loop().run_in_executor(worker, partial(call, *given, cancellation))
        finally:
            cancellation.now()
            worker.shutdown(wait=False)

    async def stream(
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
    ) -> AsyncIterator[pa.RecordBatch]:
        """As :meth:`QuantClient.stream`. ``aclose()``, or the end of the task, cancels the call."""
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
        cancellation = Cancellation()
        worker = self._worker()
        loop = asyncio.get_running_loop()
        on_loop = _OnLoop(loop, cancellation)
        answers = self._client._stream(weights, command, importance, on_loop.told(progress), cancellation)
        try:
            while (placed := await loop.run_in_executor(worker, _next, answers)) is not None:
                yield placed[1]
        finally:
            cancellation.now()
            worker.submit(answers.close)  # type: ignore[attr-defined]
            worker.shutdown(wait=False)
            on_loop.check()


def _next(answers: Iterator[Placed]) -> Placed | None:
    return next(answers, None)


class _OnLoop:
    """Calls a progress callback on the event loop's thread; what it raises ends the call, and is the call's error."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancellation: Cancellation) -> None:
        self._loop = loop
        self._cancellation = cancellation
        self._failure: Exception | None = None

    def told(self, progress: Progress | None) -> Progress | None:
        """What the call's own thread calls."""
        if progress is None:
            return None

        def run(name: str, fraction: float) -> None:
            if self._failure is None:
                try:
                    progress(name, fraction)
                except Exception as error:
                    self._failure = error
                    self._cancellation.now()

        def tell(name: str, fraction: float) -> None:
            self._loop.call_soon_threadsafe(run, name, fraction)

        return tell

    def check(self) -> None:
        """Raise what the callback raised."""
        if self._failure is not None:
            raise self._failure from None
