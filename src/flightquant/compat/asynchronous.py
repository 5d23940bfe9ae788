"""``AsyncArrowQuantV2``: the same calls as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import pyarrow as pa

from flightquant.compat.config import DiffusionQuantConfig
from flightquant.compat.quantizer import ArrowQuantV2, Progress, Results


class AsyncArrowQuantV2:
    """:class:`ArrowQuantV2` for asyncio: each call runs on a thread of its own, the event loop goes on meanwhile.

    A cancelled call's result is dropped; its kernels end with the layers that they have.
    """

    def __init__(self, mode: str = "diffusion") -> None:
        self._sync = ArrowQuantV2(mode)
        self.mode = mode

    async def quantize(self, weights: Mapping[str, Any], bit_width: int | None = None) -> Results:
        """As :meth:`ArrowQuantV2.quantize`."""
        return await asyncio.to_thread(self._sync.quantize, weights, bit_width)

    async def quantize_batch(
        self,
        weights_dict: Mapping[str, Any],
        bit_width: int | None = None,
        continue_on_error: bool | None = None,
        parallel: bool | None = None,
    ) -> Results:
        """As :meth:`ArrowQuantV2.quantize_batch`."""
        return await asyncio.to_thread(self._sync.quantize_batch, weights_dict, bit_width, continue_on_error, parallel)

    async def quantize_batch_with_progress(
        self,
        weights_dict: Mapping[str, Any],
        bit_width: int | None = None,
        progress_callback: Progress | None = None,
        continue_on_error: bool | None = None,
        parallel: bool | None = None,
    ) -> Results:
        """As :meth:`ArrowQuantV2.quantize_batch_with_progress`; the callback is called on the event loop's thread."""
        return await asyncio.to_thread(
            self._sync.quantize_batch_with_progress,
            weights_dict,
            bit_width,
            on_loop(progress_callback),
            continue_on_error,
            parallel,
        )

    async def quantize_arrow(self, weights_table: Any, bit_width: int | None = None) -> pa.Table:
        """As :meth:`ArrowQuantV2.quantize_arrow`."""
        return await asyncio.to_thread(self._sync.quantize_arrow, weights_table, bit_width)

    async def quantize_arrow_batch(self, record_batch: pa.RecordBatch, bit_width: int | None = None) -> pa.RecordBatch:
        """As :meth:`ArrowQuantV2.quantize_arrow_batch`."""
        return await asyncio.to_thread(self._sync.quantize_arrow_batch, record_batch, bit_width)

    async def quantize_batch_arrow(
        self, weights_table: Any, bit_width: int | None = None, continue_on_error: bool | None = None
    ) -> pa.Table:
        """As :meth:`ArrowQuantV2.quantize_batch_arrow`."""
        return await asyncio.to_thread(self._sync.quantize_batch_arrow, weights_table, bit_width, continue_on_error)

    async def quantize_batch_smart(self, weights: Any, bit_width: int | None = 4) -> pa.Table:
        """As :meth:`ArrowQuantV2.quantize_batch_smart`."""
        return await asyncio.to_thread(self._sync.quantize_batch_smart, weights, bit_width)

    async def quantize_from_safetensors(
        self,
        safetensors_path: str,
        output_path: str,
        config: DiffusionQuantConfig | None = None,
        progress_callback: Progress | None = None,
        bit_width: int | None = None,
    ) -> dict[str, Any]:
        """As :meth:`ArrowQuantV2.quantize_from_safetensors`; the callback is called on the event loop's thread."""
        told = on_loop(progress_callback)
        call = self._sync.quantize_from_safetensors
        return await asyncio.to_thread(call, safetensors_path, output_path, config, told, bit_width)

    async def quantize_multiple_models_async(
        self,
        models: Sequence[tuple[str, str, DiffusionQuantConfig | None]],
        progress_callback: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """:meth:`quantize_from_safetensors` for several ``(path, output, config)``, one after the other."""
        return [await self.quantize_from_safetensors(*model, progress_callback) for model in models]

    async def validate_quality(self, original_path: str, quantized_path: str) -> dict[str, Any]:
        """As :meth:`ArrowQuantV2.validate_quality`."""
        return await asyncio.to_thread(self._sync.validate_quality, original_path, quantized_path)

    validate_quality_async = validate_quality

    async def quantize_diffusion_model_async(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: as :meth:`ArrowQuantV2.quantize_diffusion_model`."""
        self._sync.quantize_diffusion_model(*args, **kwargs)


def on_loop(progress: Progress | None) -> Progress | None:
    """The callback as one that may be called from another thread: it runs on the current event loop."""
    if progress is None:
        return None
    loop = asyncio.get_running_loop()

    def told(text: str, share: float) -> None:
        loop.call_soon_threadsafe(progress, text, share)

    return told
