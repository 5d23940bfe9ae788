"""The libraries that decide what is right, called as their own users call them.

Needs the ``oracles`` extra. Weights come as the storage that the tests use (bfloat16 as uint16); results are packed
bytes, flat float32 scales and flat float32 zero points or None.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

F32 = npt.NDArray[np.float32]
Quantized = tuple[npt.NDArray[np.uint8], F32 | None, F32 | None]


def as_torch(storage: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """A tensor of the named dtype over the same bits."""
    if dtype == "bfloat16":
        return torch.from_numpy(storage.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(storage)


def arithmetic_tensor(storage: npt.NDArray[Any], dtype: str, scale_dtype: str | None) -> tuple[torch.Tensor, Any]:
    """The tensor and the ``scale_dtype`` argument with which the library does what the contract asks.

    Scales of the weights' own dtype are the library's default. Any other dtype means float32 arithmetic: the library
    does that on a float32 tensor, and rounds scales to a narrower dtype by its own option.
    """
    tensor = as_torch(storage, dtype)
    if scale_dtype is None or scale_dtype == dtype:
        return (tensor.float() if dtype == "float64" else tensor), None
    return tensor.float(), None if scale_dtype == "float32" else getattr(torch, scale_dtype)


def compressed_tensors_quantize(
    storage: npt.NDArray[Any],
    dtype: str,
    *,
    bits: int,
    granularity: str,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: str | None = None,
) -> Quantized:
    """``calculate_qparams``, ``quantize`` and ``pack_to_int32`` of one matrix of shape (rows, cols)."""
    weights, rounding = arithmetic_tensor(storage, dtype, scale_dtype)
    options: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": granularity}
    if granularity == "group":
        options["group_size"] = group_size
    if rounding is not None:
        options["scale_dtype"] = rounding
    args = QuantizationArgs(**options)
    if granularity == "group":
        grouped = weights.unflatten(-1, (-1, group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
    elif granularity == "channel":
        low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    else:
        low, high = weights.amin().reshape(1), weights.amax().reshape(1)
    scales, zeros = calculate_qparams(low, high, args)
    codes = quantize(weights, scales, None if symmetric else zeros, args, dtype=torch.int8)
    packed = pack_to_int32(codes, bits) if bits < 8 else codes
    flat = packed.contiguous().numpy().view(np.uint8).reshape(-1)
    return flat, scales.float().numpy().reshape(-1), None if symmetric else zeros.float().numpy().reshape(-1)


def gguf_quantize(storage: npt.NDArray[Any], dtype: str, scheme: str) -> Quantized:
    """gguf-py's bytes of one matrix; it widens to float32 first."""
    wide = as_torch(storage, dtype).float().numpy()
    # gguf divides zero blocks and overflows float16 scales with NumPy's warnings on.
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(wide, gguf.GGMLQuantizationType[scheme.upper()]).reshape(-1), None, None


def library_quantize(storage: npt.NDArray[Any], dtype: str, options: dict[str, Any]) -> Quantized:
    """The answer of the library that a scheme is exact with, for command ``options`` with every key given."""
    chosen = dict(options)
    scheme = chosen.pop("scheme")
    if scheme.startswith("q"):
        return gguf_quantize(storage, dtype, scheme)
    return compressed_tensors_quantize(storage, dtype, bits=int(scheme.removeprefix("int")), **chosen)
