"""The same work by other libraries on the same weights, as far as they are installed.

Each is called as its own users call it: ``torch.compile`` on the plain formula, compressed-tensors' own functions,
FBGEMM's operators in torch, ggml's C through llama-cpp-python, bitsandbytes, ONNX Runtime. Compilation is not counted.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.benchmarks.harness import interleaved, summary, weights
from flightquant.benchmarks.kernels import Figures, Run, cases
from flightquant.cython_core.engine import Engine
from flightquant.schemes import SCHEMES

F32 = npt.NDArray[np.float32]
Work = Callable[[], Any]

LIBRARIES = ("torch", "compressed-tensors", "bitsandbytes", "gguf", "llama-cpp-python", "onnxruntime", "hqq")
_GGML_TYPES = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8,
    "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "mxfp4": 39,
}  # fmt: skip


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _compiled(formula: Callable[[Any], Any], matrix: F32) -> Work:
    import torch

    tensor, compiled = torch.from_numpy(matrix), torch.compile(formula, dynamic=False)
    compiled(tensor)
    return lambda: compiled(tensor)


def _torch_peers(matrix: F32) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    import torch

    tensor = torch.from_numpy(matrix)

    def int8(x: Any) -> Any:
        scale = x.abs().amax(1, keepdim=True) / 127.5
        return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale

    def int4(x: Any) -> Any:
        groups = x.view(x.shape[0], -1, 128)
        scale = groups.abs().amax(2, keepdim=True) / 7.5
        codes = (torch.round(groups / scale).clamp(-8, 7) + 8).to(torch.uint8).view(x.shape[0], -1, 2)
        return codes[..., 0] | (codes[..., 1] << 4), scale

    def fp8(x: Any) -> Any:
        scale = x.abs().amax(1, keepdim=True) / 448
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    table = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379,
                          0.4407, 0.5626, 0.7230, 1.0])  # fmt: skip
    bounds = (table[1:] + table[:-1]) / 2

    def nf4(x: Any) -> Any:
        blocks = x.view(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        codes = torch.bucketize(blocks / absmax, bounds).to(torch.uint8).view(-1, 2)
        return (codes[:, 0] << 4) | codes[:, 1], absmax

    for case, formula in (("int8", int8), ("int4", int4), ("fp8_e4m3", fp8), ("nf4", nf4)):
        yield case, "torch.compile", lambda formula=formula: _compiled(formula, matrix)  # type: ignore[misc]
    # The same bytes as packing fbgemm, and what integers with zero points are nearest to.
    for bits, name in ((8, "byte_prepack"), (4, "4bit_prepack"), (2, "2bit_prepack")):
        prepack = getattr(torch.ops.quantized, f"embedding_bag_{name}")
        for case in (f"int{bits} fbgemm", f"int{bits} zero points"):
            yield case, f"FBGEMM {name}", lambda prepack=prepack: lambda: prepack(tensor)  # type: ignore[misc]


def _compressed_tensors_peers(matrix: F32) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    tensor = torch.from_numpy(matrix)

    def work(group: int | None, dtype: Any, pack: bool, **options: Any) -> Work:
        args = QuantizationArgs(strategy="group" if group else "channel", group_size=group, **options)

        def run() -> Any:
            wide = tensor.unflatten(-1, (-1, group)) if group else tensor
            low, high = wide.amin(-1, keepdim=not group), wide.amax(-1, keepdim=not group)
            scales, zeros = calculate_qparams(low, high, args)
            codes = quantize(tensor, scales, zeros if not args.symmetric else None, args, dtype=dtype)
            return (pack_to_int32(codes, args.num_bits) if pack else codes), scales

        return run

    name = "compressed-tensors"
    int8, e4m3 = torch.int8, torch.float8_e4m3fn
    yield "int8", name, lambda: work(None, int8, False, num_bits=8, type="int", symmetric=True)
    yield "int4", name, lambda: work(128, int8, True, num_bits=4, type="int", symmetric=True)
    yield "int2", name, lambda: work(128, int8, True, num_bits=2, type="int", symmetric=True)
    yield "fp8_e4m3", name, lambda: work(None, e4m3, False, num_bits=8, type="float", symmetric=True)
    if {"mxfp4", "nvfp4"} & set(SCHEMES):
        yield from _compressed_fp4(tensor)


def _compressed_fp4(tensor: Any) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def work(args: Any, is_global: bool) -> Work:
        def run() -> Any:
            groups = tensor.unflatten(-1, (-1, args.group_size))
            whole = generate_gparam(tensor.amin(), tensor.amax()) if is_global else None
            scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
            codes = quantize(tensor, scales, None, args, dtype=tensor.dtype, global_scale=whole)
            return pack_fp4_to_uint8(codes), scales

        return run

    shared = {"num_bits": 4, "type": "float", "symmetric": True}
    mx = {**shared, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    nv = {**shared, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    yield "mxfp4", "compressed-tensors", lambda: work(QuantizationArgs(**mx), False)
    yield "nvfp4", "compressed-tensors", lambda: work(QuantizationArgs(**nv), True)


def _bitsandbytes_peers(matrix: F32) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    import bitsandbytes
    import torch

    tensor = torch.from_numpy(matrix)
    for scheme in ("nf4", "fp4"):
        yield (
            scheme,
            "bitsandbytes",
            lambda scheme=scheme: lambda: bitsandbytes.functional.quantize_4bit(tensor, quant_type=scheme),  # type: ignore[misc]
        )
    nested = bitsandbytes.functional.quantize_4bit
    yield "nf4 bnb-nested", "bitsandbytes", lambda: lambda: nested(tensor, quant_type="nf4", compress_statistics=True)
    yield "bnb8", "bitsandbytes", lambda: lambda: bitsandbytes.functional.quantize_blockwise(tensor)


def _ggml_peers(matrix: F32, n_threads: int) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.submodule_search_locations[0]) / "lib" if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "libggml-base.so").exists():
        return
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pool = ThreadPoolExecutor(n_threads)
    rows, cols = matrix.shape
    out = np.empty(matrix.nbytes, np.uint8)

    def work(kind: int) -> Work:
        def part(first: int, last: int) -> None:
            library.ggml_quantize_chunk(
                ctypes.c_int(kind),
                ctypes.c_void_p(matrix.ctypes.data),
                ctypes.c_void_p(out.ctypes.data),
                ctypes.c_int64(first * cols),
                ctypes.c_int64(last - first),
                ctypes.c_int64(cols),
                None,
            )

        cuts = [rows * i // n_threads for i in range(n_threads + 1)]
        return lambda: list(pool.map(part, cuts[:-1], cuts[1:]))

    for scheme, kind in _GGML_TYPES.items():
        if scheme in SCHEMES:
            case = "mxfp4 gguf" if scheme == "mxfp4" else scheme
            yield case, "ggml", lambda kind=kind: work(kind)  # type: ignore[misc]


def _onnxruntime_peers(matrix: F32) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    from onnxruntime.capi import _pybind_state
    from onnxruntime.capi._pybind_state import quantize_matmul_bnb4

    # It takes the weights of a product, (inputs, outputs), and quantizes their transpose.
    inputs = np.ascontiguousarray(matrix.T)
    packed, absmax = np.empty(matrix.size // 2, np.uint8), np.empty(matrix.size // 64, np.float32)
    rows, cols = matrix.shape
    yield "nf4", "onnxruntime", lambda: lambda: quantize_matmul_bnb4(packed, inputs, absmax, 64, 1, rows, cols)

    def blocks(bits: int) -> Work:
        codes = np.empty((rows, cols // 128, 16 * bits), np.uint8)
        scales, points = np.empty((rows, cols // 128), np.float32), np.empty((rows, cols // 128), np.uint8)
        quantize = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
        return lambda: quantize(codes, inputs, scales, points, 128, rows, cols, True)

    for bits in (2, 4, 8):
        yield f"int{bits} onnx", "onnxruntime", lambda bits=bits: blocks(bits)  # type: ignore[misc]


def _hqq_peers(matrix: F32) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    import torch
    from hqq.core.quantize import Quantizer

    tensor = torch.from_numpy(matrix)
    how = {"group_size": 64, "axis": 1, "optimize": False, "device": "cpu"}
    for bits in (8, 4, 3, 2):
        yield f"hqq{bits}", "hqq", lambda bits=bits: lambda: Quantizer.quantize(tensor, nbits=bits, **how)  # type: ignore[misc]


def _peers(matrix: F32, n_threads: int) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    if _installed("torch"):
        yield from _torch_peers(matrix)
        if _installed("compressed_tensors"):
            yield from _compressed_tensors_peers(matrix)
        if _installed("bitsandbytes"):
            yield from _bitsandbytes_peers(matrix)
        if _installed("hqq"):
            yield from _hqq_peers(matrix)
    if _installed("llama_cpp"):
        yield from _ggml_peers(matrix, n_threads)
    if _installed("onnxruntime"):
        yield from _onnxruntime_peers(matrix)


def compare(schemes: tuple[str, ...], shape: tuple[int, int], n_threads: int, rounds: int) -> Figures:
    """Each installed peer and our whole call on the same float32 weights, turn by turn, with so many threads."""
    layer = weights(shape)
    matrix = layer.data.reshape(shape)
    if _installed("torch"):
        import torch

        torch.set_num_threads(n_threads)
    chosen = cases(schemes)
    by_case: dict[str, list[tuple[str, Callable[[], Work]]]] = {}
    for case, name, make in _peers(matrix, n_threads):
        if case in chosen:
            by_case.setdefault(case, []).append((name, make))
    engine = Engine(n_threads)
    found: Figures = []
    for case, peers in by_case.items():
        ours = Run(engine, (layer,), chosen[case], False).bound()
        timed = {"flightquant": _whole(ours), **{name: _whole(make()) for name, make in peers}}
        rates = {name: summary(taken, layer.nbytes) for name, taken in interleaved(timed, rounds).items()}
        own = rates.pop("flightquant")
        found += [
            {"case": case, "threads": n_threads, "peer": name, "ours": own, "theirs": rate}
            | {"times": own["gb_s"] / rate["gb_s"]}
            for name, rate in rates.items()
        ]
    engine.close()
    return found


def _whole(work: Work) -> Callable[[], None]:
    """The work without its result: what is timed is the whole call."""

    def run() -> None:
        work()

    return run
