"""Whole files in the pack-quantized layout: what stands in them, and that their own library reads the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fq_testing import STORAGE
from safetensors import numpy as official

import flightquant
from flightquant.client import QuantClient, compressed
from flightquant.client.convert import convert
from flightquant.client.recipes import KEPT_PATTERNS, Recipe, make_plan
from flightquant.client.safetensors import SafetensorsFile
from flightquant.client.sinks.safetensors import LAYOUTS
from flightquant.client.sources import open_source
from flightquant.client.stored import open_dequantized
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.layers import layer_class
from flightquant.reference import float8, integer, numeric
from flightquant.spec import Command

LOCAL = QuantClient("local")

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"}
OPTIONS: list[dict[str, Any]] = [
    {"scheme": "int4"},
    {"scheme": "int4", "group_size": 32, "symmetric": False},
    {"scheme": "int4", "granularity": "channel"},
    {"scheme": "int4", "granularity": "channel", "symmetric": False},
    {"scheme": "int4", "granularity": "tensor"},
    {"scheme": "int4", "granularity": "tensor", "symmetric": False},
    {"scheme": "int2"},
    {"scheme": "int2", "granularity": "channel", "symmetric": False},
    {"scheme": "int3", "group_size": 64, "symmetric": False},
    {"scheme": "int5", "granularity": "tensor"},
    {"scheme": "int6", "symmetric": False},
    {"scheme": "int7", "granularity": "channel"},
    {"scheme": "int8"},
    {"scheme": "int8", "symmetric": False},
    {"scheme": "int8", "group_size": 64, "symmetric": False},
    {"scheme": "int8", "granularity": "tensor", "symmetric": False},
]


def checkpoint(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    official.save_file(tensors, path, metadata=metadata)
    return path


def quantized(tmp_path: Path, tensors: dict[str, np.ndarray], options: dict[str, Any], **more: Any) -> Path:
    source = open_source(checkpoint(tmp_path / "in.safetensors", tensors, {"format": "pt", "author": "me"}))
    recipe = Recipe.parse({**options, **more})
    target = tmp_path / "out.safetensors"
    convert(source, target, recipe, lambda layers, command: LOCAL.stream(layers, **command.options()))
    return target


def model(dtype: str, rows: int = 37) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(21)
    kind = STORAGE[dtype]
    return {
        "model.embed_tokens.weight": rng.normal(size=(50, 128)).astype(kind),
        "model.layers.0.mlp.up_proj.weight": rng.normal(size=(rows, 256)).astype(kind),
        "model.layers.0.mlp.up_proj.bias": rng.normal(size=rows).astype(kind),
        "model.layers.10.mlp.down_proj.weight": (rng.normal(size=(16, 128)) * 0.01).astype(kind),
        "model.layers.0.input_layernorm.weight": np.ones(128, kind),
        "model.position_ids": np.arange(7),
        "lm_head.weight": rng.normal(size=(50, 128)).astype(kind),
    }


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_file_holds_the_answers_bytes(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    tensors = model(dtype)
    stored = official.load_file(quantized(tmp_path, tensors, options))
    table = flightquant.quantize({"w": tensors[f"{UP}.weight"]}, **options).to_pylist()[0]
    spec = Command.build(**options).layer_spec()
    assert stored[f"{UP}.weight_shape"].tolist() == [37, 256]
    packed = stored[f"{UP}.weight_packed"]
    assert packed.dtype == np.int32
    assert packed.shape == (37, 256 * spec.scheme.bits // 32)
    data = packed.tobytes()
    if spec.scheme.bits == 8:
        data = (np.frombuffer(data, np.uint8) ^ 0x80).tobytes()
    assert data == table["quantized_data"]
    scales = stored[f"{UP}.weight_scale"]
    assert scales.dtype.name == dtype
    groups = 256 // spec.group_size if spec.group_size else 1
    assert scales.shape == ((1,) if spec.granularity == "tensor" else (37, groups))
    np.testing.assert_array_equal(scales.astype(np.float32).reshape(-1), np.array(table["scales"], np.float32))
    if spec.symmetric:
        assert f"{UP}.weight_zero_point" not in stored
        return
    zeros = stored[f"{UP}.weight_zero_point"]
    if spec.granularity != "tensor":
        columns = np.ascontiguousarray(zeros.T).view(np.uint8)
        bits = spec.scheme.bits
        codes = (columns ^ 0x80).view(np.int8)[:, :37] if bits == 8 else integer.unpack(columns, 37, bits)
        zeros = codes.T
    np.testing.assert_array_equal(zeros.astype(np.float32).reshape(-1), np.array(table["zero_points"], np.float32))


@pytest.mark.parametrize("scheme", ["int4", "nf4", "fp8_e4m3"])
def test_packed_weights_go_into_the_file_from_the_answer_itself(scheme: str) -> None:
    """At a row that does not begin its column too; a copy costs as much as a fifth of quantizing."""
    weights = {name: np.ones((rows, 128), np.float32) for name, rows in (("a.weight", 3), ("b.weight", 5))}
    batch = flightquant.quantize(weights, scheme).combine_chunks().to_batches()[0]
    held = np.frombuffer(batch.column("quantized_data").buffers()[2], np.uint8)
    layout = LAYOUTS["bitsandbytes" if scheme == "nf4" else "compressed-tensors"]
    spec = Command.build(scheme=scheme).layer_spec()
    for given in (batch, batch.slice(1)):
        made = next(iter(layout.contents(given, given.num_rows - 1, spec, "float32").values()))
        assert np.shares_memory(held, made)
        assert bytes(made) == batch.column("quantized_data")[1].as_py()


def test_everything_else_is_copied_as_it_is(tmp_path: Path) -> None:
    tensors = model("bfloat16")
    path = quantized(tmp_path, tensors, {"scheme": "int4"})
    stored = official.load_file(path)
    kept = [name for name in tensors if "_proj.weight" not in name]
    assert len(kept) == 5
    for name in kept:
        assert stored[name].tobytes() == tensors[name].tobytes()
        assert stored[name].dtype == tensors[name].dtype
    metadata = SafetensorsFile(path).metadata
    assert (metadata["format"], metadata["author"]) == ("pt", "me")
    config = json.loads(metadata["quantization_config"])
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    assert compressed.read_configuration(metadata) == config["config_groups"]["group_0"]["weights"]


class TestSelect:
    def select(self, tmp_path: Path, shapes: dict[str, tuple[int, ...]], **options: Any) -> tuple[list[str], Any]:
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        plan = make_plan(open_source(tensors), Recipe.parse({"scheme": "int4", **options}), "compressed-tensors")
        return list(plan.commands), plan.kept

    @pytest.mark.parametrize(
        "name",
        [
            "embeddings.word_embeddings.weight",
            "transformer.wte.weight",
            "wpe.weight",
            "model.layers.3.post_attention_layernorm.weight",
            "encoder.LayerNorm.weight",
            "transformer.h.0.ln_1.weight",
            "lm_head.weight",
            "model.layers.2.mlp.gate.weight",
            "q_proj.bias",
        ],
    )
    def test_kept_by_default(self, tmp_path: Path, name: str) -> None:
        chosen, kept = self.select(tmp_path, {name: (128, 128), "a.weight": (128, 128)})
        assert chosen == ["a.weight"]
        assert list(kept) == [name]

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.2.mlp.gate_proj.weight",
            "encoder.layer.0.attention.self.query.weight",
            "model.layers.0.mlp.experts.7.down_proj.weight",
            "pooler.dense.weight",
        ],
    )
    def test_quantized_by_default(self, tmp_path: Path, name: str) -> None:
        assert self.select(tmp_path, {name: (128, 128)}) == ([name], {})

    def test_reasons(self, tmp_path: Path) -> None:
        shapes = {"a.weight": (4, 100), "b.weight": (4,), "c.weight": (2, 2, 128), "d.weight": (0, 128)}
        chosen, kept = self.select(tmp_path, shapes | {"e.weight": (1, 128)})
        assert chosen == ["e.weight"]
        assert kept == {
            "a.weight": "group size 128 does not divide 100 columns",
            "b.weight": "shape [4]",
            "c.weight": "shape [2, 2, 128]",
            "d.weight": "shape [0, 128]",
        }
        assert self.select(tmp_path, shapes, scheme="int8")[0] == ["a.weight"]

    @pytest.mark.parametrize("pattern", ["x.1.*", "x.1.down", "*.DOWN", "x.1.down.weight"])
    def test_patterns_of_the_callers_own(self, tmp_path: Path, pattern: str) -> None:
        chosen, kept = self.select(tmp_path, {"x.1.down.weight": (1, 128), "x.2.up.weight": (1, 128)}, keep=[pattern])
        assert chosen == ["x.2.up.weight"]
        assert kept == {"x.1.down.weight": f"--keep {pattern}"}

    def test_a_pattern_that_fits_nothing_is_a_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match='no tensor fits the pattern "lm_haed"'):
            self.select(tmp_path, {"lm_head.weight": (1, 128)}, keep=["lm_haed"])

    def test_default_patterns_are_lower_case(self) -> None:
        assert all(pattern == pattern.lower() for pattern in KEPT_PATTERNS)


class TestRefused:
    @pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q5_1"])
    def test_gguf_formats(self, tmp_path: Path, scheme: str) -> None:
        with pytest.raises(InvalidRequestError, match=r"GGUF format .* expected \*.gguf"):
            quantized(tmp_path, model("float32"), {"scheme": scheme})
        assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize("scheme", ["nf4", "fp4", "fp8_e5m2"])
    def test_formats_without_a_layout(self, tmp_path: Path, scheme: str) -> None:
        with pytest.raises(
            InvalidRequestError,
            match=f"{scheme} has no standard place .* expected int2 to int8, fp8_e4m3, mxfp8, mxfp4 or nvfp4",
        ):
            quantized(tmp_path, model("float32"), {"scheme": scheme, "target": "compressed-tensors"})
        assert not (tmp_path / "out.safetensors").exists()

    def test_nothing_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="no tensor to quantize"):
            quantized(tmp_path, {"a.bias": np.zeros(3, np.float32)}, {"scheme": "int4"})

    def test_a_file_that_is_quantized(self, tmp_path: Path) -> None:
        once = quantized(tmp_path, model("float32"), {"scheme": "int4"})
        with pytest.raises(InvalidRequestError, match="quantized already"):
            convert(open_source(once), tmp_path / "twice", Recipe.parse({"scheme": "int4"}), lambda *_: iter(()))

    def test_a_layer_with_nan(self, tmp_path: Path) -> None:
        tensors = model("float32")
        tensors[f"{UP}.weight"][3, 4] = np.nan
        with pytest.raises(LayerError, match=rf"{UP}.weight.*--keep") as caught:
            quantized(tmp_path, tensors, {"scheme": "int4"})
        assert caught.value.status == "non_finite"
        assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
        assert quantized(tmp_path, tensors, {"scheme": "int4"}, keep=[f"{UP}.weight"]).exists()


def test_the_cost_is_told(tmp_path: Path) -> None:
    source = open_source(checkpoint(tmp_path / "in", model("float32")))
    told: list[tuple[str, float]] = []

    def quantize(layers: Any, command: Command) -> Any:
        return LOCAL.stream(layers, **command.options(), progress=lambda *each: told.append(each))

    result = convert(source, tmp_path / "out.safetensors", Recipe.parse({"scheme": "int4"}), quantize)
    assert told == [(layer.name, 1.0) for layer in result.layers]
    assert [layer.layer_class for layer in result.layers] == [
        "model.layers.*.mlp.up_proj.weight",
        "model.layers.*.mlp.down_proj.weight",
    ]
    first = result.layers[0]
    assert (first.weights, first.bytes_in, first.bytes_copied) == (37 * 256, 37 * 256 * 4, 0)
    assert first.bytes_out == 37 * 128 + 37 * 2 * 4 + 16
    assert result.bytes_out == (tmp_path / "out.safetensors").stat().st_size
    assert result.kept_bytes == sum(source.tensors[name].nbytes for name in result.kept)
    assert result.seconds > 0


def test_layer_class_replaces_numbers() -> None:
    assert layer_class("model.layers.12.mlp.experts.3.w1.weight") == "model.layers.*.mlp.experts.*.w*.weight"


FLOATS: list[dict[str, Any]] = [
    {"scheme": "fp8_e4m3"},
    *({"scheme": "fp8_e4m3", "granularity": granularity} for granularity in ("tensor", "block")),
]


@pytest.mark.parametrize("options", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_8_bit_floats_stand_in_the_weights_place(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    tensors = model(dtype)
    file = SafetensorsFile(quantized(tmp_path, tensors, options))
    row = flightquant.quantize({"w": tensors[f"{UP}.weight"]}, **options).to_pylist()[0]
    info = file.tensors[f"{UP}.weight"]
    assert (info.dtype, info.shape) == ("F8_E4M3", (37, 256))
    assert bytes(file.data(f"{UP}.weight")) == row["quantized_data"]
    shape = {"tensor": (1,), "block": (1, 2)}.get(options.get("granularity", ""), (37, 1))
    assert (file.tensors[f"{UP}.weight_scale"].dtype, file.tensors[f"{UP}.weight_scale"].shape) == (KINDS[dtype], shape)
    scales = numeric.widen(file.array(f"{UP}.weight_scale"), dtype)
    np.testing.assert_array_equal(scales.reshape(-1), np.array(row["scales"], np.float32))
    assert {name for name in file.tensors if name.startswith(UP)} == {
        f"{UP}.weight", f"{UP}.weight_scale", f"{UP}.bias"
    }  # fmt: skip
    arguments = compressed.read_configuration(file.metadata)
    assert arguments is not None
    assert (arguments["type"], arguments["num_bits"]) == ("float", 8)


MICRO: list[dict[str, Any]] = [{"scheme": name} for name in ("mxfp4", "mxfp8", "nvfp4")]


@pytest.mark.parametrize("options", MICRO, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_small_groups_of_small_floats(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    tensors = model(dtype)
    file = SafetensorsFile(quantized(tmp_path, tensors, options))
    row = flightquant.quantize({"w": tensors[f"{UP}.weight"]}, **options).to_pylist()[0]
    place = "weight" if options["scheme"] == "mxfp8" else "weight_packed"
    assert bytes(file.data(f"{UP}.{place}")) == row["quantized_data"]
    info, stored = file.tensors[f"{UP}.weight_scale"], np.frombuffer(file.data(f"{UP}.weight_scale"), np.uint8)
    scales = np.array(row["scales"], np.float32)
    if options["scheme"] == "nvfp4":
        assert (info.dtype, info.shape) == ("F8_E4M3", (37, 16))
        np.testing.assert_array_equal(float8.decode(stored, float8.FORMATS["fp8_e4m3"]), scales[:-1])
        assert np.frombuffer(file.data(f"{UP}.weight_global_scale"), np.float32).tolist() == [scales[-1]]
    else:
        assert (info.dtype, info.shape) == ("U8", (37, 8))
        np.testing.assert_array_equal(np.ldexp(np.float32(1), stored.astype(np.int32) - 127), scales)


@pytest.mark.parametrize("options", [*OPTIONS, *FLOATS, *MICRO], ids=str)
def test_what_is_stored_is_read_back(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = model("bfloat16")
    target = quantized(tmp_path, tensors, options)
    wanted = flightquant.dequantize(flightquant.quantize({"w": tensors[f"{UP}.weight"]}, **options))["w"]
    with open_dequantized(str(target)) as again:
        np.testing.assert_array_equal(again[f"{UP}.weight"].data.reshape(37, 256), wanted)


@pytest.mark.parametrize("scales", [None, np.zeros((37, 7), np.uint8)], ids=["missing", "misshapen"])
def test_scales_that_do_not_fit_are_named(tmp_path: Path, scales: Any) -> None:
    stored = official.load_file(quantized(tmp_path, model("float32"), {"scheme": "mxfp4"}))
    del stored[f"{UP}.weight_scale"]
    stored |= {} if scales is None else {f"{UP}.weight_scale": scales}
    problem = "is missing beside its packed weight" if scales is None else r"does not fit mxfp4 of shape \[37, 256\]"
    with pytest.raises(InvalidRequestError, match=f'"{UP}.weight_scale" of cut.safetensors {problem}'):
        open_dequantized(str(checkpoint(tmp_path / "cut.safetensors", stored)))


@pytest.mark.oracle
@pytest.mark.parametrize("options", [*OPTIONS, *FLOATS, *MICRO], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.filterwarnings("default")
def test_the_library_decompresses_to_the_same_weights(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    format_of = pytest.importorskip("compressed_tensors.compressors.format")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from safetensors import torch as official_torch

    tensors = model(dtype)
    path = quantized(tmp_path, tensors, options)
    stored = official_torch.load_file(path)
    config = json.loads(SafetensorsFile(path).metadata["quantization_config"])
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert format_of.infer_module_format(torch.nn.Linear, scheme).value == config["format"]
    state = {name.removeprefix(f"{UP}."): t for name, t in stored.items() if name.startswith(f"{UP}.weight")}
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    assert set(state) == set(compressor.compression_param_names(scheme))
    plain = compressor.decompress(state, scheme)
    wanted = flightquant.dequantize(flightquant.quantize({"w": tensors[f"{UP}.weight"]}, **options))["w"]
    # The library multiplies in the scales' dtype, we in float32: one rounding lies between the two.
    # Of scales that are no floats of the weights' dtype, it makes bfloat16.
    rounded = numeric.round_to(wanted, "bfloat16" if options in MICRO else dtype)
    np.testing.assert_array_equal(plain["weight"].float().numpy(), rounded)
    original = official_torch.load_file(tmp_path / "in.safetensors")[f"{UP}.weight"]
    for name, tensor in compressor.compress({**plain, "weight": original}, scheme).items():
        assert torch.equal(tensor, state[name]), name
