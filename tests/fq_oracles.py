"""The libraries that decide what is right, called as their own users call them.

Needs the ``oracles`` extra. Weights come as the storage that the tests use (bfloat16 as uint16); results are packed
bytes, flat float32 scales and flat float32 zero points or None.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes
import gguf
import numpy as np
import numpy.typing as npt
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_args import round_to_quantized_type_dtype
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant

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


def extremes(weights: torch.Tensor, granularity: str, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight of whatever one scale covers."""
    if granularity == "group":
        grouped = weights.unflatten(-1, (-1, group_size))
        return grouped.amin(-1), grouped.amax(-1)
    if granularity == "channel":
        return weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    if granularity == "block":
        padded = maybe_pad_tensor_for_block_quant(weights, (128, 128))
        blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    return weights.amin().reshape(1), weights.amax().reshape(1)


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
    scales, zeros = calculate_qparams(*extremes(weights, granularity, group_size), args)
    codes = quantize(weights, scales, None if symmetric else zeros, args, dtype=torch.int8)
    packed = pack_to_int32(codes, bits) if bits < 8 else codes
    flat = packed.contiguous().numpy().view(np.uint8).reshape(-1)
    return flat, scales.float().numpy().reshape(-1), None if symmetric else zeros.float().numpy().reshape(-1)


def float8_quantize(
    storage: npt.NDArray[Any], dtype: str, kind: torch.dtype, *, granularity: str, scale_dtype: str | None = None
) -> Quantized:
    """The library's own e4m3 of one matrix, or its rule with the largest value and the conversion of torch's e5m2."""
    weights, rounding = arithmetic_tensor(storage, dtype, scale_dtype)
    low, high = extremes(weights, granularity, None)
    if kind == torch.float8_e4m3fn:
        structure = [128, 128] if granularity == "block" else None
        args = QuantizationArgs(
            num_bits=8, type="float", strategy=granularity, scale_dtype=rounding, block_structure=structure
        )
        scales, _ = calculate_qparams(low, high, args)
        codes = quantize(weights, scales, None, args, dtype=kind)
    else:
        largest = torch.finfo(kind).max
        scales = torch.maximum(low.abs(), high.abs()) / torch.tensor(largest, dtype=weights.dtype)
        if rounding is not None:
            scales = round_to_quantized_type_dtype(scales, rounding)
        eps = torch.finfo(rounding or weights.dtype).eps
        scales = torch.where(scales == 0, torch.tensor(eps, dtype=scales.dtype), scales)
        rows, cols = weights.shape
        each = scales
        if granularity == "block":
            each = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        codes = (weights / each).clamp(-largest, largest).to(kind)
    return codes.view(torch.uint8).numpy().reshape(-1), scales.float().numpy().reshape(-1), None


def micro_quantize(storage: npt.NDArray[Any], dtype: str, scheme: str, global_amax: float | None = None) -> Quantized:
    """compressed-tensors' mxfp4, mxfp8 or nvfp4 of one matrix; nvfp4's scale of the tensor is the last one."""
    weights, _ = arithmetic_tensor(storage, dtype, None)
    bits = 8 if scheme == "mxfp8" else 4
    size, kind = (16, torch.float8_e4m3fn) if scheme == "nvfp4" else (32, torch.uint8)
    strategy = "tensor_group" if scheme == "nvfp4" else "group"
    args = QuantizationArgs(num_bits=bits, type="float", strategy=strategy, group_size=size, scale_dtype=kind)
    low, high = extremes(weights, "group", size)
    whole = None
    if scheme == "nvfp4":
        amax = weights.abs().amax() if global_amax is None else torch.tensor(global_amax, dtype=weights.dtype)
        whole = generate_gparam(-amax, amax)
    scales, _ = calculate_qparams(low, high, args, whole)
    infinite = torch.isinf(scales)
    if scheme != "nvfp4" and infinite.any():
        # Too near the dtype's largest value the library rounds a magnitude to infinity; its rule 2^16 times lower.
        amax = torch.maximum(low.abs(), high.abs()).float() * 2.0**-16
        finite, _ = calculate_qparams(-amax, amax, args)
        scales = torch.where(infinite, (finite * 2.0**16).to(scales.dtype), scales)
    kept = torch.float8_e4m3fn if bits == 8 else None
    codes = quantize(weights, scales, None, args, dtype=kept, global_scale=whole)
    packed = codes.view(torch.uint8) if bits == 8 else pack_fp4_to_uint8(codes)
    stored = scales.float().reshape(-1)
    if whole is not None:
        assert torch.equal(stored.to(kind).float(), stored)
        stored = torch.cat([stored, whole])
    else:
        assert torch.equal(decompress_exponents(compress_mx_scale(stored, kind)), stored)
    return packed.contiguous().numpy().reshape(-1), stored.numpy(), None


def decompress_exponents(exponents: torch.Tensor) -> torch.Tensor:
    """The float32 that E8M0 bytes stand for."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 127)


def gguf_quantize(storage: npt.NDArray[Any], dtype: str, scheme: str) -> Quantized:
    """gguf-py's bytes of one matrix; it widens to float32 first."""
    wide = as_torch(storage, dtype).float().numpy()
    # gguf divides zero blocks and overflows float16 scales with NumPy's warnings on.
    with np.errstate(all="ignore"):
        packed = gguf.quants.quantize(wide, gguf.GGMLQuantizationType[scheme.upper()]).reshape(-1)
    if scheme.endswith("_1"):
        # Of zeros with both signs NumPy's minimum is another on each CPU; ggml's C code takes the first.
        blocks = wide.reshape(-1, 32)
        first = np.take_along_axis(blocks, (blocks == 0).argmax(axis=1)[:, None], axis=1)[:, 0]
        zero = blocks.min(axis=1) == 0
        minima = packed.reshape(len(blocks), -1)[:, 2:4].view("<f2")[:, 0]
        minima[zero] = first[zero]
    return packed, None, None


@lru_cache(maxsize=1)
def ggml_library() -> Any:
    """ggml's C library as llama-cpp-python builds it: for plain x86-64, without fused multiply-adds."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no llama-cpp-python")
    # Only this library is needed; importing the package would load all of llama.cpp.
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library


def ggml_quantize(storage: npt.NDArray[Any], dtype: str, scheme: str, importance: F32 | None = None) -> Quantized:
    """ggml's bytes of one matrix, widened to float32 first; ``importance`` has a value for each column."""
    wide = np.ascontiguousarray(as_torch(storage, dtype).float().numpy())
    kind = gguf.GGMLQuantizationType["IQ4_NL" if scheme == "iq4_nl" else scheme.removesuffix("_k").upper() + "_K"]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.zeros(wide.size // block * block_bytes, np.uint8)
    given = None if importance is None else importance.ctypes.data
    rows, cols = wide.shape
    written = ggml_library().ggml_quantize_chunk(int(kind), wide.ctypes.data, packed.ctypes.data, 0, rows, cols, given)
    assert written == packed.size
    return packed, None, None


def bitsandbytes_quantize(
    storage: npt.NDArray[Any], dtype: str, scheme: str, group_size: int | None = None, packing: str = "bnb-hi-first"
) -> Quantized:
    """``quantize_4bit`` or ``quantize_blockwise`` of a CPU tensor; float64, which they refuse, is rounded first."""
    tensor = as_torch(storage, dtype)
    tensor = tensor.float() if dtype == "float64" else tensor
    if scheme == "bnb8":
        codes, state = bitsandbytes.functional.quantize_blockwise(tensor, blocksize=group_size or 4096)
        return codes.numpy().reshape(-1), state.absmax.numpy(), None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on several ones torch adds up a long mean in another order
    packed, state = bitsandbytes.functional.quantize_4bit(
        tensor, blocksize=group_size or 64, quant_type=scheme, compress_statistics=packing == "bnb-nested"
    )
    torch.set_num_threads(threads)
    if packing == "bnb-hi-first":
        return packed.numpy().reshape(-1), state.absmax.numpy(), None
    data = np.concatenate([packed.numpy().reshape(-1), state.absmax.numpy()])
    return data, np.append(state.state2.absmax.numpy(), np.float32(state.offset.item())), None


def arrowquant(
    storage: npt.NDArray[Any], dtype: str, *, bit_width: int, granularity: str, group_size: int | None = None
) -> Quantized:
    """arrow_quant_v2's rule as its public source has it (python.rs, simd.rs): it is on no package registry.

    Written down a second time, in torch, from that source: ``compute_quantization_params`` and ``quantize_scalar``.
    What is ours is the scale of 1 where the source divides by 0, and the largest float32 for a range beyond it.
    """
    weights = as_torch(storage, dtype).float()
    low, high = extremes(weights, granularity, group_size)
    levels = torch.tensor(float((1 << bit_width) - 1))
    scales = (high - low).clamp(max=torch.finfo(torch.float32).max) / levels
    scales = torch.where(scales == 0, torch.ones(()), scales)
    zeros = 0.0 - low / scales
    if granularity == "group":
        groups = weights.unflatten(-1, (-1, group_size))
        shifted = (groups / scales[..., None] + zeros[..., None]).flatten(-2)
    else:
        shifted = weights / scales + zeros
    rounded = torch.sign(shifted) * torch.floor(shifted.double().abs() + 0.5)  # f32::round: half away from zero
    codes = rounded.clamp(0, float(levels)).to(torch.uint8)
    return codes.numpy().reshape(-1), scales.numpy().reshape(-1), zeros.numpy().reshape(-1)


def mlx_quantize(storage: npt.NDArray[Any], dtype: str, *, bit_width: int, group_size: int) -> Quantized:
    """``mlx.core.quantize`` on the CPU; float64, which it refuses, is rounded to float32 first."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    kind = "float32" if dtype == "float64" else dtype
    array = mx.array(as_torch(storage, dtype).float().numpy()).astype(getattr(mx, kind))
    words, scales, biases = mx.quantize(array, group_size=group_size, bits=bit_width)
    floats = [np.array(each.astype(mx.float32)).reshape(-1) for each in (scales, biases)]
    return np.array(words).view(np.uint8).reshape(-1), *floats


def hqq_quantize(
    storage: npt.NDArray[Any], dtype: str, *, bits: int, group_size: int = 64, calibration: str = "absmax"
) -> Quantized:
    """``Quantizer.quantize`` along the rows, with its steps after the first codes only where they are asked for.

    Of a group whose range is beyond float32, for which hqq's scale is infinite, the range is the largest float32.
    """
    quantizer = module_of("hqq.core.quantize").Quantizer
    weights = as_torch(storage, dtype)
    how = {"nbits": bits, "group_size": group_size, "axis": 1, "optimize": calibration == "proximal", "device": "cpu"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on several ones torch adds up a long mean in another order
    packed, told = quantizer.quantize(weights, **how)
    torch.set_num_threads(threads)
    scales, zeros = told["scale"], told["zero"]
    wide = scales.isinf()
    if wide.any() and calibration == "absmax":
        groups = weights.float().reshape(-1, group_size)
        levels = (1 << bits) - 1
        factors = torch.where(wide, levels / torch.tensor(torch.finfo(torch.float32).max), 1.0 / scales)
        zeros = torch.where(wide, -groups.min(dim=1, keepdim=True)[0] * factors, zeros)
        codes, _ = quantizer.quantize(weights, **how, bitpack=False)
        own = (groups * factors + zeros).round().clamp(0, levels)
        packed = quantizer.pack[told["packing"]](torch.where(wide, own, codes.reshape(groups.shape).float()))
        scales = torch.where(wide, 1.0 / factors, scales)
    return packed.contiguous().numpy().reshape(-1).view(np.uint8), scales.numpy().reshape(-1), zeros.numpy().reshape(-1)


def onnx_quantize(
    storage: npt.NDArray[Any],
    dtype: str,
    *,
    bits: int,
    group_size: int = 128,
    symmetric: bool = True,
    granularity: str = "group",
    scale_dtype: str | None = None,
) -> Quantized:
    """The functions that onnxruntime's ``MatMulNBitsQuantizer`` calls, of the transpose, as the node holds it.

    It widens bfloat16 first, and rounds its scales afterwards; float64, which it refuses, is rounded to float32.
    """
    from onnxruntime.capi import _pybind_state

    assert granularity == "group"
    matrix = storage if dtype == "float16" else as_torch(storage, dtype).float().numpy()
    rows, cols = matrix.shape
    groups, each = cols // group_size, 8 // bits
    packed = np.zeros((rows, groups, group_size // each), np.uint8)
    points = np.zeros((rows, -(-groups // each)), np.uint8)
    scales = np.zeros((rows, groups), matrix.dtype)
    quantizer = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    quantizer(packed, np.ascontiguousarray(matrix.T), scales, points, group_size, rows, cols, symmetric)
    kept = scale_dtype or ("bfloat16" if dtype == "bfloat16" else None)
    stored = torch.from_numpy(scales.astype(np.float32))
    flat = (stored.to(getattr(torch, kept)).float() if kept else stored).numpy().reshape(-1)
    if symmetric:
        return packed.reshape(-1), flat, None
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    every = (points[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(rows, -1)[:, :groups]
    zeros = every.astype(np.float32) - np.float32(1 << (bits - 1))
    return np.concatenate([packed.reshape(-1), points.reshape(-1)]), flat, zeros.reshape(-1)


def fbgemm_quantize(storage: npt.NDArray[Any], dtype: str, *, bits: int) -> Quantized:
    """FBGEMM's rows, as torch makes them; a bias of 0, whose sign is its vectors' choice, has that of the least 0."""
    wide = as_torch(storage, dtype).float()
    prepack = getattr(torch.ops.quantized, f"embedding_bag_{'byte' if bits == 8 else f'{bits}bit'}_prepack")
    packed = prepack(wide).numpy()
    given = wide.numpy()
    negative = ((given == 0) & np.signbit(given)).any(axis=1)
    tail = packed[:, -4:] if bits == 8 else packed[:, -2:]
    bias = np.ascontiguousarray(tail).view(np.float32 if bits == 8 else np.float16)[:, 0]
    exact = given.min(axis=1) == 0
    packed[exact & (bias == 0), -1] = np.where(negative, 0x80, 0)[exact & (bias == 0)]
    return packed.reshape(-1), None, None


def module_of(name: str) -> Any:
    """A module of a package whose ``__init__`` imports more than this machine has: that of its folders is passed over.

    Raises
    ------
    ModuleNotFoundError
        The package is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    top, *folders, _ = name.split(".")
    found = find_spec(top)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    parent, path = top, list(found.submodule_search_locations)
    for folder in (None, *folders):
        if folder is not None:
            parent, path = f"{parent}.{folder}", [f"{each}/{folder}" for each in path]
        if parent not in sys.modules:
            sys.modules[parent] = types.ModuleType(parent)
            sys.modules[parent].__path__ = path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no CUDA extension"
        return importlib.import_module(name)


def repacked(storage: npt.NDArray[Any], dtype: str, packing: str, bits: int, **options: Any) -> Quantized:
    """compressed-tensors' codes, packed by auto-gptq's ``QuantLinear.pack`` or autoawq's ``from_linear``.

    Both quantize first, ``round((weight + zero * scale) / scale)``: with the codes less their zero points for weights
    and scales of 1, what they pack is the codes. The second version of GPTQ's format differs from the first, which
    auto-gptq writes, in that zero points are not lowered by 1: here they are raised by 1 before.
    """
    packed, scales, zeros = compressed_tensors_quantize(storage, dtype, bits=bits, **options)
    rows, cols = storage.shape
    middle = 1 << (bits - 1)
    if bits == 8:
        signed = torch.from_numpy(packed.view(np.int8).reshape(rows, cols))
    else:
        signed = unpack_from_int32(torch.from_numpy(packed.view(np.int32)).reshape(rows, -1), bits, (rows, cols))
    codes = (signed.int() + middle).float()
    assert scales is not None
    given = np.zeros_like(scales) if zeros is None else zeros
    points = torch.from_numpy(given.reshape(rows, -1)) + middle + (1 if packing == "gptq-v2" else 0)
    group = cols // points.shape[1]
    linear = torch.nn.Linear(cols, rows, bias=False)
    linear.weight.data = codes - points.repeat_interleave(group, dim=1)
    if packing == "awq":
        made = module_of("awq.modules.linear.gemm").WQLinear_GEMM.from_linear(
            linear, 4, group, scales=torch.ones_like(points.T), zeros=points.T.contiguous()
        )
    else:
        made = module_of("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear(bits, group, cols, rows, bias=False)
        made.pack(linear, torch.ones_like(points), points.clone())
    words = [part.contiguous().numpy().view(np.uint8).reshape(-1) for part in (made.qweight, made.qzeros)]
    return np.concatenate(words), scales, zeros


def library_quantize(storage: npt.NDArray[Any], dtype: str, options: dict[str, Any]) -> Quantized:
    """The answer of the library that a scheme is exact with, for command ``options`` with every key given."""
    chosen = dict(options)
    scheme = chosen.pop("scheme")
    if scheme.startswith("fp8"):
        kind = torch.float8_e4m3fn if scheme == "fp8_e4m3" else torch.float8_e5m2
        return float8_quantize(storage, dtype, kind, **chosen)
    if scheme == "mlx":
        return mlx_quantize(storage, dtype, **chosen)
    if scheme.startswith("hqq"):
        return hqq_quantize(storage, dtype, bits=int(scheme.removeprefix("hqq")), **chosen)
    if chosen.get("packing") == "gguf":
        return gguf_quantize(storage, dtype, scheme)
    if scheme in ("mxfp4", "mxfp8", "nvfp4"):
        return micro_quantize(storage, dtype, scheme, **chosen)
    if scheme == "arrowquant":
        return arrowquant(storage, dtype, **chosen)
    if scheme in ("nf4", "fp4", "bnb8"):
        return bitsandbytes_quantize(storage, dtype, scheme, **chosen)
    if scheme.endswith("_k") or scheme == "iq4_nl":
        return ggml_quantize(storage, dtype, scheme, **chosen)
    if scheme.startswith("q"):
        return gguf_quantize(storage, dtype, scheme)
    bits = int(scheme.removeprefix("int"))
    if chosen.get("packing") == "fbgemm":
        return fbgemm_quantize(storage, dtype, bits=bits)
    if chosen.get("packing") == "onnx":
        return onnx_quantize(storage, dtype, bits=bits, **{key: chosen[key] for key in chosen if key != "packing"})
    if "packing" in chosen:
        return repacked(storage, dtype, bits=bits, **chosen)
    return compressed_tensors_quantize(storage, dtype, bits=bits, **chosen)
