"""Whole models: converted as arrow_quant_v2 did it, by the converter of the command line; and judged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant.compat.config import DiffusionQuantConfig, check_bit_width
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.reference.numeric import widen

PASSING_COSINE = 0.70
"""The threshold of arrow_quant_v2's own check."""
_MIB = float(1 << 20)
_CHUNK = 1 << 20


def quantize_from_safetensors(
    safetensors_path: str,
    output_path: str,
    config: DiffusionQuantConfig | None,
    bit_width: int | None,
    tell: Callable[[str, float], None],
) -> dict[str, Any]:
    """See :meth:`flightquant.compat.ArrowQuantV2.quantize_from_safetensors`."""
    from flightquant import quantize
    from flightquant.client.convert import Selection, convert
    from flightquant.client.recipes import Recipe
    from flightquant.client.sources import open_source
    from flightquant.spec import Command

    config = config or DiffusionQuantConfig()
    bits = check_bit_width(config.bit_width if bit_width is None else bit_width)
    weighed: list[tuple[float, int]] = []

    def answers(layers: Selection, command: Command) -> Iterator[pa.RecordBatch]:
        size, threads = command.group_size, config.num_threads or None
        for done, (name, layer) in enumerate(layers.items(), 1):
            for batch in quantize({name: layer}, command.scheme, group_size=size, n_threads=threads).to_batches():
                cosine = batch.column("cosine")[0].as_py()
                weighed.append((0.0 if cosine is None else cosine, layer.data.size))
                yield batch
            tell(name, done / len(layers))
        if _mean(weighed) < config.min_accuracy and config.fail_fast:
            raise LayerError("unsupported", _too_low(weighed, config, bits))

    recipe = Recipe.parse({"bit_width": bits, "group_size": config.group_size})
    with open_source(safetensors_path) as source:
        result = convert(source, output_path, recipe, answers)
    if _mean(weighed) < config.min_accuracy:
        warnings.warn(_too_low(weighed, config, bits), stacklevel=3)
    return {
        "quantized_path": str(output_path),
        "compression_ratio": result.bytes_in / max(result.bytes_out, 1),
        "cosine_similarity": _mean(weighed),
        "model_size_mb": result.bytes_out / _MIB,
        "modality": config.modality,
        "bit_width": bits,
        "quantization_time_s": result.seconds,
    }


def _mean(weighed: list[tuple[float, int]]) -> float:
    """Cosines of layers, weighed by their weights; 1 where nothing was quantized."""
    return sum(cosine * count for cosine, count in weighed) / sum(count for _, count in weighed) if weighed else 1.0


def _too_low(weighed: list[tuple[float, int]], config: DiffusionQuantConfig, bits: int) -> str:
    return (
        f"the cosine similarity is {_mean(weighed):.4f} with {bits} bits, under min_accuracy {config.min_accuracy}; "
        "use more bits or a smaller group_size"
    )


def validate_quality(original_path: str, quantized_path: str) -> dict[str, Any]:
    """See :meth:`flightquant.compat.ArrowQuantV2.validate_quality`."""
    from flightquant.client.sources import open_source
    from flightquant.client.stored import DequantizedSource

    accuracy: dict[str, float] = {}
    weighed: list[tuple[float, int]] = []
    with open_source(original_path) as original, open_source(quantized_path) as source:
        sizes = [sum(meta.nbytes for meta in each.tensors.values()) for each in (original, source)]
        restored = DequantizedSource(source)
        for name in restored.stored:
            if name not in original:
                raise InvalidRequestError(f'{original_path} has no layer "{name}"', field="original_path")
            layer, twin = original[name], restored[name]
            if layer.shape != twin.shape:
                raise InvalidRequestError(
                    f'layer "{name}" has shape {list(twin.shape)}; expected {list(layer.shape)}', field="quantized_path"
                )
            sums = np.zeros(3)
            for first in range(0, layer.data.size, _CHUNK):
                x = widen(layer.data[first : first + _CHUNK], layer.dtype).astype(np.float64)
                y = widen(twin.data[first : first + _CHUNK], twin.dtype).astype(np.float64)
                sums += (x @ y, x @ x, y @ y)
            norm = float(np.sqrt(sums[1] * sums[2]))
            accuracy[name] = float(sums[0] / norm) if norm else float(sums[1] == sums[2])
            weighed.append((accuracy[name], layer.data.size))
    if not accuracy:
        raise InvalidRequestError(f"{quantized_path} holds no quantized layer", field="quantized_path")
    cosine = _mean(weighed)
    return {
        "cosine_similarity": cosine,
        "compression_ratio": sizes[0] / max(sizes[1], 1),
        "model_size_mb": sizes[1] / _MIB,
        "passed": cosine >= PASSING_COSINE,
        "per_layer_accuracy": accuracy,
    }
