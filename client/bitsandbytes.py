"""bitsandbytes' 4-bit layout: how transformers stores a model that was loaded with ``load_in_4bit``.

A weight ``X.weight`` stands as bytes of shape (n/2, 1) beside ``X.weight.absmax``, ``X.weight.quant_map`` (the values
of the codes) and ``X.weight.quant_state.bitsandbytes__nf4``, JSON as bytes. With double quantization ``absmax`` is
bytes too, beside ``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``; the mean stands in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant.client.recipes import Plan, kept_modules
from flightquant.client.safetensors import FLOATS
from flightquant.client.sources import TensorMeta
from flightquant.errors import InvalidRequestError
from flightquant.quantized import packed_data
from flightquant.reference import dynamic8, matrix_shape, packed_bytes, scale_count
from flightquant.reference.nf4 import VALUES
from flightquant.schemes import NESTED, SCHEMES, LayerSpec

PACKINGS = ("bnb-hi-first", NESTED)
STATE = "quant_state.bitsandbytes__"
_LONGEST_FLOAT = 24
"""Characters of a number in JSON."""


def check_scheme(spec: LayerSpec) -> None:
    """Refuse schemes of other libraries.

    Raises
    ------
    InvalidRequestError
        The scheme is not one of bitsandbytes' own.
    """
    known = tuple(name for name, scheme in SCHEMES.items() if scheme.packing in PACKINGS)
    if spec.scheme.name not in known:
        raise InvalidRequestError(
            f"{spec.scheme.name} is no scheme of bitsandbytes; expected {', '.join(known)}",
            field="scheme",
            got=spec.scheme.name,
            expected=known,
        )


def _state(shape: tuple[int, ...], dtype: str, spec: LayerSpec, offset: float = 0) -> bytes:
    state = {"quant_type": spec.scheme.name, "blocksize": spec.group_size, "dtype": dtype, "shape": list(shape)}
    if not spec.scheme.nested:
        return json.dumps(state).encode()
    nested = {"nested_blocksize": dynamic8.NESTED_BLOCK, "nested_dtype": "float32"}
    # Its length is to be known before the mean is: blanks at the end, which JSON allows.
    most = len(json.dumps({**state, **nested, "nested_offset": ""})) + _LONGEST_FLOAT
    return json.dumps({**state, **nested, "nested_offset": offset}).encode().ljust(most)


def entries(name: str, shape: tuple[int, ...], dtype: str, spec: LayerSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors (safetensors dtype, shape) that stand for one weight."""
    rows, cols = matrix_shape(shape)
    codes, count = (rows * cols + 1) // 2, scale_count(spec, rows, cols)
    made: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("U8", (codes, 1)),
        f"{name}.absmax": ("F32", (count,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.{STATE}{spec.scheme.name}": ("U8", (len(_state(shape, dtype, spec)),)),
    }
    if spec.scheme.nested:
        made[f"{name}.absmax"] = ("U8", (packed_bytes(spec, rows, cols) - codes,))
        made[f"{name}.nested_absmax"] = ("F32", (count - 1,))
        made[f"{name}.nested_quant_map"] = ("F32", (256,))
    return made


def contents(batch: pa.RecordBatch, row: int, spec: LayerSpec, dtype: str) -> dict[str, Any]:
    """The bytes of the tensors that :func:`entries` names, from one good answer row."""
    name = batch.column("layer_name")[row].as_py()
    shape = tuple(batch.column("shape")[row].as_py())
    data = np.frombuffer(packed_data(batch, row), np.uint8)
    scales = batch.column("scales")[row].values.to_numpy(zero_copy_only=True)
    made = {name: data, f"{name}.absmax": scales, f"{name}.quant_map": VALUES[spec.scheme.name]}
    offset = 0.0
    if spec.scheme.nested:
        codes = (prod(shape) + 1) // 2
        offset = float(scales[-1])
        made |= {
            name: data[:codes],
            f"{name}.absmax": data[codes:],
            f"{name}.nested_absmax": scales[:-1],
            f"{name}.nested_quant_map": dynamic8.values(),
        }
    return {**made, f"{name}.{STATE}{spec.scheme.name}": _state(shape, dtype, spec, offset)}


def configuration(plan: Plan, tensors: Mapping[str, TensorMeta]) -> dict[str, Any]:
    """What transformers writes for such a model."""
    first = next(iter(plan.commands))
    spec = plan.spec(first)
    dtype = FLOATS[tensors[first].dtype]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": spec.scheme.name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": spec.scheme.nested,
        "bnb_4bit_compute_dtype": "float32" if dtype == "float64" else dtype,
        "llm_int8_skip_modules": kept_modules(plan, tensors) or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
