"""The actions: what the server can do, what a call would cost, what runs here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant import __version__
from flightquant.cython_core import active_isa, available_isas
from flightquant.errors import InvalidRequestError, TooLargeError
from flightquant.reference import matrix_shape, packed_bytes
from flightquant.spec import SCHEMES, WEIGHT_DTYPES, Command, LayerSpec, Scheme
from flightquant.wire import CONTRACT_VERSION

MAX_BODY_BYTES = 16 << 20
MAX_DIMENSIONS = 8

DESCRIPTIONS = {
    "schemes": "One JSON object per scheme: its options, defaults, packing and what it is bit-exact with",
    "estimate": 'Body {"scheme": ..., "shapes": {name: [..]}}: bytes of each answer, without doing the work',
    "version": "Versions, instruction set in use and compute threads",
}


def schemes() -> list[dict[str, Any]]:
    """One object per scheme, in the order of their table."""
    return [_scheme(scheme) for scheme in SCHEMES.values()]


def _scheme(scheme: Scheme) -> dict[str, Any]:
    default = Command.build(scheme=scheme.name).layer_spec()
    options = ["granularity", "group_size"]
    options += ["symmetric"] if scheme.asymmetric else []
    options += ["scale_dtype"] if scheme.scale_dtypes else []
    return {
        "name": scheme.name,
        "bits": scheme.bits,
        "granularities": list(scheme.granularities),
        "group_sizes": sorted(scheme.group_sizes),
        "default_group_size": scheme.group_sizes[0],
        "scale_dtypes": list(scheme.scale_dtypes),
        "options": options,
        "defaults": {
            "granularity": default.granularity,
            "group_size": default.group_size or None,
            "symmetric": default.symmetric,
            "scale_dtype": default.scale_dtype or ("the weights' own" if scheme.scale_dtypes else "float16"),
        },
        "packing": scheme.packing,
        "weights": list(WEIGHT_DTYPES),
        "exact_with": scheme.exact_with,
        "summary": scheme.summary,
    }


def version(threads: int) -> dict[str, Any]:
    """What runs here."""
    return {
        "flightquant": __version__,
        "contract": CONTRACT_VERSION,
        "isa": active_isa(),
        "isas": list(available_isas()),
        "threads": threads,
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
    }


def estimate(body: bytes) -> dict[str, Any]:
    """Bytes of the answer for each layer: packed weights, scales and zero points (float32 each).

    Parameters
    ----------
    body : bytes
        A JSON object: ``shapes``, and the keys of a command.

    Raises
    ------
    InvalidRequestError
        The body is none such, the command cannot be, or a group does not divide a layer's row.
    TooLargeError
        The body is over :data:`MAX_BODY_BYTES`.
    """
    if len(body) > MAX_BODY_BYTES:
        raise TooLargeError(
            f"the body is {len(body)} bytes long; expected at most {MAX_BODY_BYTES}",
            field="body",
            got=len(body),
            expected=MAX_BODY_BYTES,
        )
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not isinstance(given.get("shapes"), dict):
        raise InvalidRequestError(
            'the body is not a JSON object with "scheme" and "shapes"; expected one such as '
            '{"scheme": "int4", "shapes": {"layer": [4096, 4096]}}',
            field="shapes",
            expected="an object of name to list of dimensions",
        )
    shapes: Mapping[str, Any] = given.pop("shapes")
    spec = Command.parse(given).layer_spec()
    layers = {name: _bytes_out(name, shape, spec) for name, shape in shapes.items()}
    return {"scheme": spec.scheme.name, "bytes_out": sum(layers.values()), "layers": layers}


def _bytes_out(name: str, shape: Any, spec: LayerSpec) -> int:
    good = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(size) is int for size in shape)
    if not good or any(size < 0 for size in shape) or prod(shape) >= 2**63:
        raise InvalidRequestError(
            f'the shape of "{name[:80]}" is {json.dumps(shape)[:80]}; expected at most {MAX_DIMENSIONS} dimensions, '
            "none negative, with a product below 2^63",
            field="shapes",
            got=json.dumps(shape)[:80],
        )
    rows, cols = matrix_shape(tuple(shape))
    if rows * cols == 0:
        return 0
    if spec.group_size and cols % spec.group_size:
        raise InvalidRequestError(
            f'the rows of "{name[:80]}" hold {cols} weights; expected a multiple of the group size {spec.group_size}',
            field="shapes",
            got=cols,
            expected=spec.group_size,
        )
    packed = packed_bytes(spec, rows, cols)
    if spec.scheme.block_bytes:
        return packed
    scales = {"tensor": 1, "channel": rows}.get(spec.granularity, rows * cols // (spec.group_size or cols))
    return packed + 4 * scales * (1 if spec.symmetric else 2)
