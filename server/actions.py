"""The actions: what the server can do, what a call would cost, what runs here."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant import __version__
from flightquant.cython_core import active_isa, available_isas
from flightquant.errors import InvalidRequestError, TooLargeError, shown
from flightquant.reference import fits_groups, fits_transpose, matrix_shape, packed_bytes, scale_count, whole_words
from flightquant.schemes import LayerSpec
from flightquant.spec import Command, load_object
from flightquant.wire import CONTRACT_VERSION

MAX_BODY_BYTES = 16 << 20
MAX_DIMENSIONS = 8
_EXAMPLE = '{"scheme": "int4", "shapes": {"layer": [4096, 4096]}}'

DESCRIPTIONS = {
    "schemes": "One JSON object per scheme: its options, defaults, packing and what it is bit-exact with",
    "estimate": 'Body {"scheme": ..., "shapes": {name: [..]}}: bytes of each answer, without doing the work',
    "quantize_to": 'Body {"source": ..., "sink": ..., "recipe": {..}}: convert a stored model, one object per layer',
    "version": "Versions, instruction set in use and compute threads",
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
    given = load_object(body, "body", _EXAMPLE, MAX_BODY_BYTES)
    shapes = given.pop("shapes", None)
    if not isinstance(shapes, dict):
        raise InvalidRequestError(
            f'the body has no object "shapes"; expected one such as {_EXAMPLE}',
            field="shapes",
            expected="an object of name to list of dimensions",
        )
    command = Command.parse(given)
    if command.op != "quantize":
        raise InvalidRequestError(
            f'estimates have no op "{command.op}"; expected "quantize"', field="op", got=command.op, expected="quantize"
        )
    spec = command.layer_spec()
    layers = {name: _bytes_out(name, shape, spec) for name, shape in shapes.items()}
    return {"scheme": spec.scheme.name, "bytes_out": sum(layers.values()), "layers": layers}


def _bytes_out(name: str, shape: Any, spec: LayerSpec) -> int:
    good = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(size) is int for size in shape)
    if not good or any(size < 0 for size in shape) or prod(shape) >= 2**63:
        raise InvalidRequestError(
            f'the shape of "{name[:80]}" is {shown(shape)}; expected at most {MAX_DIMENSIONS} dimensions, '
            "none negative, with a product below 2^63",
            field="shapes",
            got=shown(shape),
        )
    rows, cols = matrix_shape(tuple(shape))
    if rows * cols == 0:
        return 0
    spec = spec.fitting(cols)
    if not fits_groups(spec, cols):
        raise InvalidRequestError(
            f'the rows of "{name[:80]}" hold {cols} weights; expected a multiple of the group size {spec.group_size}',
            field="shapes",
            got=cols,
            expected=spec.group_size,
        )
    if not fits_transpose(spec, rows, cols):
        raise InvalidRequestError(
            f'"{name[:80]}" is a matrix of {rows} x {cols}; {spec.scheme.packing} expects {whole_words(spec)}',
            field="shapes",
            got=[rows, cols],
            expected=whole_words(spec),
        )
    packed = packed_bytes(spec, rows, cols)
    if spec.scheme.scales_inside:
        return packed
    return packed + 4 * scale_count(spec, rows, cols) * (1 if spec.symmetric else 2)
