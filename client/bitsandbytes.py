"""bitsandbytes' 4-bit layout: how transformers stores a model that was loaded with ``load_in_4bit``.

A weight ``X.weight`` stands as bytes of shape (n/2, 1) beside ``X.weight.absmax``, ``X.weight.quant_map`` (the values
of the codes) and ``X.weight.quant_state.bitsandbytes__nf4``, JSON as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant.client.recipes import Plan, kept_modules
from flightquant.client.safetensors import FLOATS
from flightquant.client.sources import TensorMeta
from flightquant.errors import InvalidRequestError
from flightquant.reference import matrix_shape, packed_bytes, scale_count
from flightquant.reference.nf4 import VALUES
from flightquant.spec import SCHEMES, LayerSpec

PACKING = "bnb-hi-first"
STATE = "quant_state.bitsandbytes__"


def check_scheme(spec: LayerSpec) -> None:
    """Refuse schemes of other libraries.

    Raises
    ------
    InvalidRequestError
        The scheme is not one of bitsandbytes' own.
    """
    known = tuple(name for name, scheme in SCHEMES.items() if scheme.packing == PACKING)
    if spec.scheme.name not in known:
        raise InvalidRequestError(
            f"{spec.scheme.name} is no scheme of bitsandbytes; expected {', '.join(known)}",
            field="scheme",
            got=spec.scheme.name,
            expected=known,
        )


def _state(shape: tuple[int, ...], dtype: str, spec: LayerSpec) -> bytes:
    state = {"quant_type": spec.scheme.name, "blocksize": spec.group_size, "dtype": dtype, "shape": list(shape)}
    return json.dumps(state).encode()


def entries(name: str, shape: tuple[int, ...], dtype: str, spec: LayerSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors (safetensors dtype, shape) that stand for one weight."""
    rows, cols = matrix_shape(shape)
    return {
        name: ("U8", (packed_bytes(spec, rows, cols), 1)),
        f"{name}.absmax": ("F32", (scale_count(spec, rows, cols),)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.{STATE}{spec.scheme.name}": ("U8", (len(_state(shape, dtype, spec)),)),
    }


def contents(batch: pa.RecordBatch, row: int, spec: LayerSpec, dtype: str) -> dict[str, Any]:
    """The bytes of the tensors that :func:`entries` names, from one good answer row."""
    name = batch.column("layer_name")[row].as_py()
    shape = tuple(batch.column("shape")[row].as_py())
    return {
        name: np.frombuffer(batch.column("quantized_data")[row].as_buffer(), np.uint8),
        f"{name}.absmax": batch.column("scales")[row].values.to_numpy(zero_copy_only=True),
        f"{name}.quant_map": VALUES[spec.scheme.name],
        f"{name}.{STATE}{spec.scheme.name}": _state(shape, dtype, spec),
    }


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
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32" if dtype == "float64" else dtype,
        "llm_int8_skip_modules": kept_modules(plan, tensors) or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
