"""compressed-tensors' layouts of quantized weights: how answer rows stand in a safetensors file.

For an integer weight ``X.weight`` of shape (rows, cols) the file holds ``X.weight_packed`` (int32), ``X.weight_scale``,
``X.weight_shape`` (int64) and, if asymmetric, ``X.weight_zero_point``; for one of 8-bit floats ``X.weight`` itself and
``X.weight_scale``; for one of 4-bit floats ``X.weight_packed`` (uint8), ``X.weight_scale`` and, of nvfp4,
``X.weight_global_scale``. Scales that are powers of two stand as their exponents (uint8). These are the layouts that
the library itself chooses for weights of any width without quantized activations, 8 bits included, and that its users
load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.client.recipes import Plan, kept_modules, module_of
from flightquant.client.sources import TensorMeta
from flightquant.errors import InvalidRequestError
from flightquant.quantized import packed_data
from flightquant.reference import float8, matrix_shape, packed_bytes
from flightquant.reference.integer import pack
from flightquant.schemes import BLOCK_EDGE, SCHEMES, LayerSpec

CONFIG_KEY = "quantization_config"
"""The key of the file's metadata that holds the configuration as JSON, as a model's ``config.json`` does."""
SUFFIXES = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
FLOAT8 = "F8_E4M3"
"""The safetensors dtype of the only 8-bit floats that the library knows."""

_SCALES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "e8m0": "U8", "e4m3": FLOAT8}
_FORMATS = {
    "fp8_e4m3": "naive-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
"""The library's name of a layout, where it is not ``pack-quantized``."""


def check_scheme(spec: LayerSpec) -> None:
    """Refuse schemes that have no layout in a safetensors file.

    Raises
    ------
    InvalidRequestError
        The scheme's bytes belong into another kind of file.
    """
    known = tuple(
        name
        for name, scheme in SCHEMES.items()
        if scheme.packing.startswith("ct-") or name in ("fp8_e4m3", "mxfp4", "mxfp8", "nvfp4")
    )
    if spec.scheme.name in known and spec.scheme.packing != SCHEMES[spec.scheme.name].packing:
        raise InvalidRequestError(
            f'packing "{spec.scheme.packing}" has no place in a compressed-tensors file; expected none',
            field="packing",
            got=spec.scheme.packing,
            expected=SCHEMES[spec.scheme.name].packing,
        )
    if spec.scheme.name not in known:
        reason = "is a GGUF format and has no" if spec.scheme.packing == "gguf" else "has no"
        raise InvalidRequestError(
            f"{spec.scheme.name} {reason} standard place in a safetensors file; expected int2 to int8, "
            "fp8_e4m3, mxfp8, mxfp4 or nvfp4",
            field="scheme",
            got=spec.scheme.name,
            expected=known,
        )


def _words(count: int, bits: int) -> int:
    """int32 words for ``count`` codes."""
    return -(-count * bits // 32)


def entries(name: str, shape: tuple[int, ...], dtype: str, spec: LayerSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors (safetensors dtype, shape) that stand for one weight, in the order in which they are written."""
    rows, cols = matrix_shape(shape)
    base, bits = module_of(name), spec.scheme.bits
    scales = _scales_shape(rows, cols, spec)
    scale = {f"{base}.weight_scale": (_SCALES[spec.scale_dtype_for(dtype)], scales)}
    if spec.scheme.name in ("fp8_e4m3", "mxfp8"):
        return {f"{base}.weight": (FLOAT8, (rows, cols)), **scale}
    if spec.scheme.fixed_scales:
        whole = {f"{base}.weight_global_scale": ("F32", (1,))} if spec.scheme.whole_scale else {}
        return {f"{base}.weight_packed": ("U8", (rows, cols // 2)), **scale, **whole}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{base}.weight_packed": ("I32", (rows, _words(cols, bits))),
        **scale,
        f"{base}.weight_shape": ("I64", (2,)),
    }
    if not spec.symmetric:
        # The library packs zero points along the rows, but leaves a tensor's only one as it is.
        packed = ("I8", scales) if spec.granularity == "tensor" else ("I32", (_words(rows, bits), scales[1]))
        tensors[f"{base}.weight_zero_point"] = packed
    return tensors


def _scales_shape(rows: int, cols: int, spec: LayerSpec) -> tuple[int, ...]:
    if spec.granularity == "tensor":
        return (1,)
    if spec.granularity == "block":
        return (-(-rows // BLOCK_EDGE), -(-cols // BLOCK_EDGE))
    return (rows, cols // spec.group_size if spec.group_size else 1)


def contents(batch: pa.RecordBatch, row: int, spec: LayerSpec, dtype: str) -> dict[str, Any]:
    """The bytes of the tensors that :func:`entries` names, from one good answer row; packed weights are not copied."""
    name = batch.column("layer_name")[row].as_py()
    base, bits = module_of(name), spec.scheme.bits
    rows, cols = matrix_shape(tuple(batch.column("shape")[row].as_py()))
    packed = np.frombuffer(packed_data(batch, row), np.uint8)
    assert packed.size == packed_bytes(spec, rows, cols)  # noqa: S101 - the answer was made for this spec
    values = batch.column("scales")[row].values.to_numpy(zero_copy_only=True)
    groups = values[:-1] if spec.scheme.whole_scale else values
    scales = _as_dtype(groups, batch.column("scale_dtype")[row].as_py())
    if spec.scheme.name in _FORMATS:
        place = "weight" if bits == 8 else "weight_packed"
        whole = {f"{base}.weight_global_scale": values[-1:]} if spec.scheme.whole_scale else {}
        return {f"{base}.{place}": packed, f"{base}.weight_scale": scales, **whole}
    if bits == 8:
        packed = _packed_bytes(packed.view(np.int8).reshape(rows, cols))
    tensors: dict[str, Any] = {
        f"{base}.weight_packed": packed,
        f"{base}.weight_scale": scales,
        f"{base}.weight_shape": np.array([rows, cols], np.int64),
    }
    if not spec.symmetric:
        zeros = batch.column("zero_points")[row].values.to_numpy(zero_copy_only=True).astype(np.int8)
        tensors[f"{base}.weight_zero_point"] = zeros
        if spec.granularity != "tensor":
            columns = np.ascontiguousarray(zeros.reshape(rows, -1).T)
            words = (_packed_bytes(columns) if bits == 8 else pack(columns, bits)).view("<i4")
            tensors[f"{base}.weight_zero_point"] = np.ascontiguousarray(words.T)
    return tensors


def _packed_bytes(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """8-bit codes of shape (rows, cols) as the library packs them: offset by 128, rows filled up to whole words."""
    rows, cols = codes.shape
    packed = np.zeros((rows, _words(cols, 8) * 4), np.uint8)
    np.bitwise_xor(codes.view(np.uint8), np.uint8(0x80), out=packed[:, :cols])
    return packed


def _as_dtype(scales: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Scales, already rounded to ``dtype``, in its own bytes."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(scales.view("<u2")[1::2])  # the upper halves, in one pass
    if dtype == "e8m0":
        return (np.frexp(scales)[1] + 126).astype(np.uint8)
    if dtype == "e4m3":
        return float8.encode(scales, float8.FORMATS["fp8_e4m3"])
    return scales.astype(dtype)


def configuration(plan: Plan, tensors: Mapping[str, TensorMeta]) -> dict[str, Any]:
    """The library's ``quantization_config`` of a plan.

    Where all layers have one scheme its group is that of all linear modules; of several schemes each group names its
    modules. Modules that stay as they are are ``ignore``.
    """
    modules: dict[LayerSpec, list[str]] = {}
    for name in plan.commands:
        modules.setdefault(plan.spec(name), []).append(module_of(name))
    groups: dict[str, Any] = {}
    for number, (spec, names) in enumerate(modules.items()):
        targets = ["Linear"] if len(modules) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, **_group(spec, plan.recipe.activations)}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept_modules(plan, tensors),
    }


def _group(spec: LayerSpec, activations: str | None) -> dict[str, Any]:
    """One scheme as the library describes it."""
    kind = "float" if spec.scheme.name in _FORMATS else "int"
    weights: dict[str, Any] = {
        "num_bits": spec.scheme.bits,
        "type": kind,
        "symmetric": spec.symmetric,
        "strategy": "tensor_group" if spec.scheme.whole_scale else spec.granularity,
        "group_size": spec.group_size if spec.granularity == "group" else None,
        "dynamic": False,
    }
    if spec.scheme.fixed_scales:
        weights["scale_dtype"] = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}[spec.scheme.fixed_scales]
    if spec.granularity == "block":
        weights["block_structure"] = [BLOCK_EDGE, BLOCK_EDGE]
    inputs: dict[str, Any] | None = None
    layout = _FORMATS.get(spec.scheme.name, "pack-quantized")
    if activations == "dynamic" and spec.scheme.packing == "fp8":
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        if spec.granularity == "block":
            inputs |= {"strategy": "group", "group_size": BLOCK_EDGE}
        layout = "float-quantized"
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": layout}


def read_configuration(metadata: dict[str, str]) -> dict[str, Any] | None:
    """The weights' arguments in a file's metadata; None if it holds no such configuration."""
    try:
        config = json.loads(metadata.get(CONFIG_KEY, ""))
        weights = config["config_groups"]["group_0"]["weights"]
        return weights if isinstance(weights, dict) else None
    except (ValueError, KeyError, TypeError):
        return None
