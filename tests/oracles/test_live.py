"""The engine and the reference against the installed libraries, on fresh seeded tensors: the same bits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from fq_testing import KINDS, request, same_bits, weights_like

pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
pytest.importorskip("gguf")

import gguf
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from fq_oracles import as_torch, library_quantize

import flightquant
from flightquant import reference
from flightquant.reference.numeric import round_to
from flightquant.spec import Command

pytestmark = pytest.mark.oracle

DTYPES = ("float32", "float16", "bfloat16", "float64")
OPTIONS: list[dict[str, Any]] = [
    {"scheme": scheme, "symmetric": symmetric, "granularity": granularity, "group_size": size}
    for scheme, symmetric, (granularity, size) in itertools.product(
        ("int8", "int4"),
        (True, False),
        (("tensor", None), ("channel", None), *(("group", size) for size in (32, 64, 128, 256))),
    )
] + [{"scheme": "q8_0"}, {"scheme": "q4_0"}]


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def matrices(dtype: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = {kind: weights_like(kind, 12 * 256, dtype, rng).reshape(12, 256) for kind in KINDS}
    made["all"] = np.concatenate([matrix[:1] for matrix in made.values()])
    made["checkpoint"] = weights_like("normal", 64 * 1024, dtype, rng).reshape(64, 1024)
    return made


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, given(options).values())))
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


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_dtype_is_the_librarys(dtype: str, scale_dtype: str) -> None:
    layers = matrices(dtype, seed=5)
    for options in OPTIONS[:-2]:
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
    for scheme, symmetric, granularity in itertools.product(("int8", "int4"), (True, False), ("tensor", "channel")):
        options = {"scheme": scheme, "symmetric": symmetric, "granularity": granularity}
        table = flightquant.quantize(request({"w": weights}, dtype), **options)
        data, _, _ = library_quantize(weights, dtype, options)
        same_bits(np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8), data, str(options))


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


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_gguf_dequantizes_to_our_values(scheme: str) -> None:
    for name, weights in matrices("float32", seed=9).items():
        if np.abs(weights).max() > 1e6:
            continue  # scales beyond float16
        table = flightquant.quantize({name: weights}, scheme)
        data = np.frombuffer(table.column("quantized_data")[0].as_buffer(), np.uint8).reshape(weights.shape[0], -1)
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[scheme.upper()])
        same_bits(flightquant.dequantize(table)[name], theirs, name)


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
