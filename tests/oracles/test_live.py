"""The engine and the reference against the installed libraries, on fresh seeded tensors: the same bits."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest
from fq_testing import KINDS, request, same_bits, weights_like

pytest.importorskip("bitsandbytes")
pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
pytest.importorskip("gguf")

import bitsandbytes
import gguf
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from fq_oracles import as_torch, library_quantize, module_of

import flightquant
from flightquant import reference
from flightquant.reference import hqq
from flightquant.reference.numeric import round_to
from flightquant.spec import Command

pytestmark = pytest.mark.oracle

DTYPES = ("float32", "float16", "bfloat16", "float64")
INTEGERS: list[dict[str, Any]] = [
    {"scheme": scheme, "symmetric": symmetric, "granularity": granularity, "group_size": size}
    for scheme, symmetric, (granularity, size) in itertools.product(
        ("int8", "int4", "int2", "int3", "int5", "int6", "int7"),
        (True, False),
        (("tensor", None), ("channel", None), *(("group", size) for size in (32, 64, 128, 256))),
    )
]
FLOATS: list[dict[str, Any]] = [
    {"scheme": scheme, "granularity": granularity}
    for scheme, granularity in itertools.product(("fp8_e4m3", "fp8_e5m2"), ("tensor", "channel", "block"))
]
MICRO = ("mxfp4", "mxfp8", "nvfp4")
GGUF = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
SEARCHED = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_nl")
needs_ggml = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python")
BYTES: list[dict[str, Any]] = [
    {"scheme": "arrowquant", "bit_width": width, "granularity": granularity, "group_size": size}
    for width, (granularity, size) in itertools.product((2, 4, 8), (("tensor", None), ("channel", None), ("group", 64)))
]
LAYOUTS: list[dict[str, Any]] = [
    {"scheme": scheme, "packing": packing, "symmetric": symmetric, "granularity": granularity, "group_size": size}
    for (scheme, packing), symmetric, (granularity, size) in itertools.product(
        (
            *itertools.product(("int2", "int3", "int4", "int8"), ("gptq", "gptq-v2")),
            ("int4", "awq"),
        ),
        (True, False),
        (("channel", None), ("group", 32), ("group", 128)),
    )
]
ROWS = [{"scheme": scheme, "packing": "fbgemm"} for scheme in ("int8", "int4", "int2")]
GGML_MXFP4 = {"scheme": "mxfp4", "packing": "gguf"}
OPTIONS: list[dict[str, Any]] = [
    *INTEGERS,
    *FLOATS,
    *BYTES,
    *ROWS,
    GGML_MXFP4,
    *({"scheme": scheme} for scheme in (*GGUF, *MICRO)),
]
SEARCHED_OPTIONS = [pytest.param({"scheme": scheme}, marks=needs_ggml) for scheme in SEARCHED]


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def matrices(dtype: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = {kind: weights_like(kind, 12 * 256, dtype, rng).reshape(12, 256) for kind in KINDS}
    made["all"] = np.concatenate([matrix[:1] for matrix in made.values()])
    made["checkpoint"] = weights_like("normal", 64 * 1024, dtype, rng).reshape(64, 1024)
    return made


@pytest.mark.parametrize(
    "options", [*OPTIONS, *SEARCHED_OPTIONS], ids=lambda options: "-".join(map(str, given(options).values()))
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_and_reference_are_the_library(dtype: str, options: dict[str, Any]) -> None:
    layers = matrices(dtype, seed=DTYPES.index(dtype))
    table = flightquant.quantize(request(layers, dtype), **given(options))
    spec = Command.build(**given(options)).layer_spec()
    for i, (name, weights) in enumerate(layers.items()):
        data, scales, zeros = library_quantize(weights, dtype, options)
        same_bits(reference.quantize(weights, spec, dtype, measure=False).data, data, f"{name}: reference")
        assert table.column("status")[i].as_py() == "ok"
        same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, f"{name}: data")
        for column, expected in (("scales", scales), ("zero_points", zeros)):
            cell = table.column(column)[i]
            assert cell.is_valid == (expected is not None), column
            if expected is not None:
                same_bits(cell.values.to_numpy(), expected, f"{name}: {column}")


@needs_ggml
@pytest.mark.parametrize("scheme", SEARCHED)
def test_importance_is_ggmls(scheme: str) -> None:
    rng = np.random.default_rng(41)
    layers = matrices("float32", seed=42)
    usual = {name: (rng.standard_normal(weights.shape[1]) ** 2).astype(np.float32) for name, weights in layers.items()}
    wide = {
        name: (values * 10.0 ** rng.uniform(-20, 20, values.size)).astype(np.float32) for name, values in usual.items()
    }
    for importance in (usual, wide, {name: np.zeros_like(values) for name, values in usual.items()}):
        table = flightquant.quantize(layers, scheme, importance=importance)
        for i, (name, weights) in enumerate(layers.items()):
            data, _, _ = library_quantize(weights, "float32", {"scheme": scheme, "importance": importance[name]})
            same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, name)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_makes_the_same_and_reads_it(dtype: str, width: int, group_size: int) -> None:
    mx = pytest.importorskip("mlx.core")
    options = {"scheme": "mlx", "bit_width": width, "group_size": group_size}
    layers = matrices(dtype, seed=23)
    table = flightquant.quantize(request(layers, dtype), **options)
    again = flightquant.dequantize(table)
    for i, (name, weights) in enumerate(layers.items()):
        data, scales, biases = library_quantize(weights, dtype, options)
        same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, f"{name} data")
        same_bits(table.column("scales")[i].values.to_numpy(), scales, f"{name} scales")
        same_bits(table.column("zero_points")[i].values.to_numpy(), biases, f"{name} biases")
        if dtype == "float32" and np.abs(weights).max() < 1e6:
            rows = weights.shape[0]
            parts = (data.view(np.uint32).reshape(rows, -1), scales.reshape(rows, -1), biases.reshape(rows, -1))
            theirs = np.array(mx.dequantize(*map(mx.array, parts), group_size=group_size, bits=width))
            # Whether it fuses the product and the sum is its compiler's choice.
            np.testing.assert_allclose(again[name], theirs, rtol=1e-5, atol=1e-6 * float(np.abs(weights).max() or 1))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("width", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hqq_makes_the_same_and_reads_it(dtype: str, width: int, group_size: int) -> None:
    try:
        quantizer = module_of("hqq.core.quantize").Quantizer
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    options = {"scheme": f"hqq{width}", "group_size": group_size}
    layers = {name: np.resize(weights, (20, 384)) for name, weights in matrices(dtype, seed=29).items()}
    if dtype == "float32":  # ranges next to those that are not scaled, or no more steeply
        edges = np.zeros((20, 384), np.float32)
        ends = np.float32(1e-4) * (1 + np.arange(-10, 10, dtype=np.float32) * np.float32(2.0**-22))
        edges[:, ::32] = ends[:, None]
        steep = np.zeros((20, 384), np.float32)
        steep[:, ::32] = ((2**width - 1) * ends * np.float32(0.5))[:, None]
        layers |= {"narrow": edges, "steep": steep}
    table = flightquant.quantize(request(layers, dtype), **options)
    again = flightquant.dequantize(table)
    for i, (name, weights) in enumerate(layers.items()):
        data, scales, zeros = library_quantize(weights, dtype, options)
        same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, f"{name} data")
        same_bits(table.column("scales")[i].values.to_numpy(), scales, f"{name} scales")
        same_bits(table.column("zero_points")[i].values.to_numpy(), zeros, f"{name} zero points")
        assert zeros is not None
        told = {"nbits": width, "group_size": group_size, "axis": 1, "shape": weights.shape, "view_as_float": False}
        told |= {"packing": quantizer.bit_to_packing[width], "compute_dtype": torch.float32}
        told |= {"scale": torch.tensor(scales)[:, None], "zero": torch.tensor(zeros)[:, None]}
        packed = torch.tensor(data.view(np.int32) if width == 3 else data).reshape(-1, group_size)
        same_bits(again[name], quantizer.dequantize(packed, told).numpy(), f"{name} dequantized")


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("width", [8, 4, 3, 2])
def test_hqq_takes_the_same_steps(width: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many, to the same zero points; where errors are above 0.17, but for torch's power (docs/formats/hqq.md)."""
    try:
        solver = module_of("hqq.core.optimize")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    theirs, ours = [], []
    step, mean = solver.optimize_weights_proximal_legacy_step, hqq.mean_magnitude
    monkeypatch.setattr(
        solver, "optimize_weights_proximal_legacy_step", lambda *given: (theirs.append(0), step(*given))[1]
    )
    monkeypatch.setattr(hqq, "mean_magnitude", lambda errors: (ours.append(0), mean(errors))[1])
    options = {"scheme": f"hqq{width}", "group_size": group_size, "calibration": "proximal"}
    rng = np.random.default_rng(31)
    for spread, rows in itertools.product((0.02, 0.1, 1.0, 30.0), (4, 64, 512)):
        weights = (rng.standard_normal((rows, 384)) * spread).astype(np.float32)
        theirs.clear(), ours.clear()
        data, scales, zeros = library_quantize(weights, "float32", options)
        reference.quantize(weights, Command.build(**options).layer_spec(), "float32", measure=False)
        table = flightquant.quantize({"w": weights}, **options)
        made = table.column("zero_points")[0].values.to_numpy()
        name = f"{spread} {rows}"
        same_bits(np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8), data, f"{name} data")
        same_bits(table.column("scales")[0].values.to_numpy(), scales, f"{name} scales")
        # A layer that no longer changes may end a step later in torch's float32 sum, or a step before.
        assert abs(len(ours) - len(theirs)) <= 1, name
        if spread < 1:
            same_bits(made, zeros, f"{name} zero points")
        elif len(ours) == len(theirs):
            assert (made == zeros).mean() > 0.98, name
            np.testing.assert_allclose(made, zeros, rtol=0, atol=3e-6)


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: "-".join(map(str, given(options).values())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_layouts_are_packed_by_their_libraries(dtype: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")  # which auto-gptq imports
    pytest.importorskip("accelerate")  # which autoawq imports
    try:
        module_of("awq.modules.linear.gemm")
        module_of("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    rng = np.random.default_rng(11)
    for shape in ((32, 128), (160, 384)):
        # Without GPTQ's first version's trouble: every group has negative weights.
        weights = weights_like("normal", shape[0] * shape[1], dtype, rng).reshape(shape)
        table = flightquant.quantize(request({"w": weights}, dtype), **given(options))
        data, scales, _ = library_quantize(weights, dtype, options)
        assert table.column("packing")[0].as_py() == options["packing"]
        same_bits(np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8), data, "data")
        same_bits(table.column("scales")[0].values.to_numpy(), scales, "scales")
        plain = {key: value for key, value in given(options).items() if key != "packing"}
        again = flightquant.dequantize(flightquant.quantize(request({"w": weights}, dtype), **plain))["w"]
        same_bits(flightquant.dequantize(table)["w"], again, "dequantized")


def test_mxfp4_next_to_powers_of_two_is_ggmls() -> None:
    """The float32 logarithm of what lies close below a power is the power's; below 2^-125 the exponent wraps."""
    powers = np.ldexp(1.0, np.arange(-149, 128)).astype(np.float32)
    near = powers[None].view(np.int32) + np.arange(-60, 61, dtype=np.int32)[:, None]
    magnitudes = near[(near > 0) & (near < 0x7F800000)].view(np.float32)
    weights = magnitudes[:, None] * np.random.default_rng(31).uniform(-1, 1, (magnitudes.size, 32)).astype(np.float32)
    weights[:, 7] = magnitudes
    made = flightquant.quantize({"w": weights}, "mxfp4", packing="gguf")
    data, _, _ = library_quantize(weights, "float32", GGML_MXFP4)
    same_bits(np.frombuffer(made.column("quantized_data")[0].as_buffer(), np.uint8), data, "data")
    theirs = gguf.quants.dequantize(data.reshape(len(weights), -1), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(flightquant.dequantize(made)["w"], theirs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["int2", "int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmulnbits_is_onnxruntimes(dtype: str, scheme: str, symmetric: bool) -> None:
    pytest.importorskip("onnxruntime")
    layers = matrices(dtype, seed=29)
    for group_size in (16, 32, 64, 128, 256):
        options = {"scheme": scheme, "packing": "onnx", "group_size": group_size, "symmetric": symmetric}
        table = flightquant.quantize(request(layers, dtype), **options)
        for i, (name, weights) in enumerate(layers.items()):
            data, scales, zeros = library_quantize(weights, dtype, options)
            what = f"{name} in {group_size}"
            same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, what)
            same_bits(table.column("scales")[i].values.to_numpy(), scales, what)
            assert table.column("zero_points")[i].is_valid != symmetric
            if zeros is not None:
                same_bits(table.column("zero_points")[i].values.to_numpy(), zeros, what)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_dtype_is_the_librarys(dtype: str, scale_dtype: str) -> None:
    layers = matrices(dtype, seed=5)
    for options in (*INTEGERS, *FLOATS):
        chosen = {**options, "scale_dtype": scale_dtype}
        table = flightquant.quantize(request(layers, dtype), **given(chosen))
        for i, (name, weights) in enumerate(layers.items()):
            data, scales, _ = library_quantize(weights, dtype, chosen)
            what = f"{name}: {given(chosen)}"
            same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, what)
            same_bits(table.column("scales")[i].values.to_numpy(), scales, what)


@pytest.mark.parametrize("cols", [1, 3, 5, 7, 8, 9, 31, 33, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_tails_are_the_librarys(dtype: str, cols: int) -> None:
    rng = np.random.default_rng(cols)
    weights = weights_like("normal", 5 * cols, dtype, rng).reshape(5, cols)
    schemes = ("int8", "int7", "int6", "int5", "int4", "int3", "int2")
    for scheme, symmetric, granularity in itertools.product(schemes, (True, False), ("tensor", "channel")):
        options = {"scheme": scheme, "symmetric": symmetric, "granularity": granularity}
        table = flightquant.quantize(request({"w": weights}, dtype), **options)
        data, _, _ = library_quantize(weights, dtype, options)
        same_bits(np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8), data, str(options))


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (260, 300), (129, 640), (3, 1100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_cut_short_are_the_librarys(dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    layers = {kind: weights_like(kind, shape[0] * shape[1], dtype, rng).reshape(shape) for kind in KINDS}
    for scheme in ("fp8_e4m3", "fp8_e5m2"):
        options = {"scheme": scheme, "granularity": "block"}
        table = flightquant.quantize(request(layers, dtype), **options)
        for i, (name, weights) in enumerate(layers.items()):
            data, scales, _ = library_quantize(weights, dtype, options)
            same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, name)
            same_bits(table.column("scales")[i].values.to_numpy(), scales, name)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_dequantizes_to_our_values(dtype: str, symmetric: bool) -> None:
    weights = weights_like("normal", 16 * 256, dtype, np.random.default_rng(1)).reshape(16, 256)
    table = flightquant.quantize(request({"w": weights}, dtype), "int4", group_size=64, symmetric=symmetric)
    row = {name: table.column(name)[0] for name in table.schema.names}
    packed = torch.frombuffer(bytearray(row["quantized_data"].as_py()), dtype=torch.int32).reshape(16, -1)
    codes = unpack_from_int32(packed, 4, torch.Size((16, 256)))
    torch_dtype = as_torch(weights, dtype).dtype
    scales = torch.tensor(row["scales"].as_py()).reshape(16, 4).to(torch_dtype)
    zeros = None if symmetric else torch.tensor(row["zero_points"].as_py()).reshape(16, 4).to(torch.int8)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=64)
    theirs = dequantize(codes, scales, zeros, args).float().numpy()
    ours = flightquant.dequantize(table)["w"]
    same_bits(round_to(ours, dtype), theirs, "weights")


@pytest.mark.parametrize("scheme", [*GGUF, *SEARCHED])
def test_gguf_dequantizes_to_our_values(scheme: str) -> None:
    for name, weights in matrices("float32", seed=9).items():
        if np.abs(weights).max() > 1e6:
            continue  # scales beyond float16
        table = flightquant.quantize({name: weights}, scheme)
        data = np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8).reshape(weights.shape[0], -1)
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[scheme.upper()])
        same_bits(flightquant.dequantize(table)[name], theirs, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "bnb8"])
def test_blocks_of_the_flat_tensor_are_the_librarys(scheme: str, dtype: str) -> None:
    """Rows that no block divides, a short block at the end, odd numbers of weights."""
    rng = np.random.default_rng(13)
    shapes = [(1,), (2,), (63,), (65,), (3, 7), (5, 99), (7, 1001), (3, 4, 333), (2, 4097), (100, 100)]
    layers = {
        f"{kind} {shape}": weights_like(kind, int(np.prod(shape)), dtype, rng).reshape(shape)
        for kind in KINDS
        for shape in shapes
    }
    packings = (None,) if scheme == "bnb8" else (None, "bnb-nested")
    for group_size, packing in itertools.product((32 << k for k in range(scheme == "bnb8", 8)), packings):
        options = given({"scheme": scheme, "group_size": group_size, "packing": packing})
        table = flightquant.quantize(request(layers, dtype), **options)
        for i, (name, weights) in enumerate(layers.items()):
            data, scales, _ = library_quantize(weights, dtype, options)
            what = f"{name} in {group_size}, {packing}"
            same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, what)
            same_bits(table.column("scales")[i].values.to_numpy(), scales, what)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_bitsandbytes_dequantizes_to_our_values(scheme: str) -> None:
    for name, weights in matrices("float32", seed=17).items():
        packed, state = bitsandbytes.functional.quantize_4bit(torch.from_numpy(weights), quant_type=scheme)
        theirs = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
        ours = flightquant.dequantize(flightquant.quantize({name: weights}, scheme))[name]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)  # the library's zeros have either sign


def test_bitsandbytes_dequantizes_to_our_values_in_8_bits() -> None:
    for name, weights in matrices("float32", seed=18).items():
        codes, state = bitsandbytes.functional.quantize_blockwise(torch.from_numpy(weights))
        theirs = bitsandbytes.functional.dequantize_blockwise(codes, state).numpy()
        ours = flightquant.dequantize(flightquant.quantize({name: weights}, "bnb8"))[name]
        same_bits(ours, theirs, name)


def test_double_quantization_dequantizes_to_our_values() -> None:
    for name, weights in matrices("float32", seed=19).items():
        if np.abs(weights).max() > 1e30:
            continue  # a mean beyond float32
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.from_numpy(weights), quant_type="nf4", compress_statistics=True
        )
        theirs = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
        ours = flightquant.dequantize(flightquant.quantize({name: weights}, "nf4", packing="bnb-nested"))[name]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_a_long_mean_is_that_of_one_thread() -> None:
    """More scales than torch leaves to one thread by itself."""
    weights = weights_like("normal", 32 * 70_001, "float32", np.random.default_rng(20)).reshape(1, -1)
    options = {"scheme": "nf4", "group_size": 32, "packing": "bnb-nested"}
    table = flightquant.quantize({"w": weights}, **options)
    data, scales, _ = library_quantize(weights, "float32", options)
    same_bits(np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8), data, "data")
    same_bits(table.column("scales")[0].values.to_numpy(), scales, "scales")


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_go_in_without_a_copy(dtype: str) -> None:
    tensor = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    table = flightquant.quantize({"w": tensor, "parameter": torch.nn.Parameter(tensor)}, "int4")
    assert table.column("bytes_copied").to_pylist() == [0, 0]
    bits = tensor.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else tensor.numpy()
    data, _, _ = library_quantize(bits, dtype, {"scheme": "int4", "granularity": "group", "group_size": 128})
    for i in range(2):
        same_bits(np.frombuffer(table.column("quantized_data")[i].as_buffer(), np.uint8), data, "data")
    assert table.column("scale_dtype")[0].as_py() == ("float32" if dtype == "float64" else dtype)


def test_a_transposed_torch_tensor_is_copied_and_counted() -> None:
    tensor = torch.randn(256, 4).t()
    table = flightquant.quantize({"w": tensor}, "int8")
    assert table.column("bytes_copied").to_pylist() == [tensor.numel() * 4]
    back = flightquant.dequantize(table)["w"]
    assert np.abs(back - tensor.numpy()).max() < 0.05
