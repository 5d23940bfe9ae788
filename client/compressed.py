"""The compressed-tensors ``pack-quantized`` layout: how answer rows stand in a safetensors file.

For a weight ``X.weight`` of shape (rows, cols) the file holds ``X.weight_packed`` (int32), ``X.weight_scale``,
``X.weight_shape`` (int64) and, if asymmetric, ``X.weight_zero_point``. It is the layout that the library itself chooses
for integer weights of any width without quantized activations, 8 bits included, and that its users load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.errors import InvalidRequestError
from flightquant.reference import matrix_shape, packed_bytes
from flightquant.reference.integer import pack
from flightquant.spec import LayerSpec

CONFIG_KEY = "quantization_config"
"""The key of the file's metadata that holds the configuration as JSON, as a model's ``config.json`` does."""
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

_SCALES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def check_scheme(spec: LayerSpec) -> None:
    """Refuse schemes that have no layout in a safetensors file.

    Raises
    ------
    InvalidRequestError
        The scheme's bytes belong into another kind of file.
    """
    if spec.scheme.block_bytes:
        raise InvalidRequestError(
            f"{spec.scheme.name} is a GGUF format and has no standard place in a safetensors file; "
            "expected int4 or int8",
            field="scheme",
            got=spec.scheme.name,
            expected=("int4", "int8"),
        )


def module_of(name: str) -> str:
    """The module that a weight belongs to: its name without ``.weight``."""
    return name.removesuffix(".weight")


def _words(count: int, bits: int) -> int:
    """int32 words for ``count`` codes."""
    return -(-count * bits // 32)


def entries(name: str, shape: tuple[int, ...], dtype: str, spec: LayerSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors (safetensors dtype, shape) that stand for one weight, in the order in which they are written."""
    rows, cols = matrix_shape(shape)
    base, bits = module_of(name), spec.scheme.bits
    scales = _scales_shape(rows, cols, spec)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{base}.weight_packed": ("I32", (rows, _words(cols, bits))),
        f"{base}.weight_scale": (_SCALES[spec.scale_dtype_for(dtype)], scales),
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
    return (rows, cols // spec.group_size if spec.group_size else 1)


def contents(batch: pa.RecordBatch, row: int, spec: LayerSpec) -> dict[str, Any]:
    """The bytes of the tensors that :func:`entries` names, from one good answer row; packed weights are not copied."""
    name = batch.column("layer_name")[row].as_py()
    base, bits = module_of(name), spec.scheme.bits
    rows, cols = matrix_shape(tuple(batch.column("shape")[row].as_py()))
    packed = np.frombuffer(batch.column("quantized_data")[row].as_buffer(), np.uint8)
    assert packed.size == packed_bytes(spec, rows, cols)  # noqa: S101 - the answer was made for this spec
    if bits == 8:
        packed = _packed_bytes(packed.view(np.int8).reshape(rows, cols))
    scales = batch.column("scales")[row].values.to_numpy(zero_copy_only=True)
    tensors: dict[str, Any] = {
        f"{base}.weight_packed": packed,
        f"{base}.weight_scale": _as_dtype(scales, batch.column("scale_dtype")[row].as_py()),
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
        return (scales.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return scales.astype(dtype)


def configuration(spec: LayerSpec, ignored: Iterable[str]) -> dict[str, Any]:
    """The library's ``quantization_config`` of a file: all linear modules by ``spec``, except ``ignored`` ones."""
    weights = {
        "num_bits": spec.scheme.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size or None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(ignored),
    }


def read_configuration(metadata: dict[str, str]) -> dict[str, Any] | None:
    """The weights' arguments in a file's metadata; None if it holds no such configuration."""
    try:
        config = json.loads(metadata.get(CONFIG_KEY, ""))
        weights = config["config_groups"]["group_0"]["weights"]
        return weights if isinstance(weights, dict) else None
    except (ValueError, KeyError, TypeError):
        return None
