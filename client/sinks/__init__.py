"""Where quantized layers go: safetensors folders and files, GGUF, Parquet, Arrow IPC; whole, or not at all."""

from __future__ import annotations

import os

from flightquant.client.recipes import FOLDERS, Plan, Recipe
from flightquant.client.safetensors import FLOATS, tensor_bytes
from flightquant.client.sinks.base import LayerResult, Sink
from flightquant.client.sinks.gguf import GGUFSink
from flightquant.client.sinks.safetensors import LAYOUTS, SafetensorsSink
from flightquant.client.sinks.tables import TableSink
from flightquant.client.sources import Source, place
from flightquant.errors import InvalidRequestError
from flightquant.reference import matrix_shape, packed_bytes, scale_count

__all__ = ["LayerResult", "Sink", "open_sink", "sizes", "target_of"]

_SUFFIXES = {".gguf": "gguf", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_SINKS: dict[str, type[Sink]] = {
    "compressed-tensors": SafetensorsSink,
    "bitsandbytes": SafetensorsSink,
    "gguf": GGUFSink,
    "parquet": TableSink,
    "arrow": TableSink,
}


def target_of(uri: str | os.PathLike[str], recipe: Recipe) -> str:
    """The kind of output: told by the name's end, else by the recipe's target or its scheme.

    Raises
    ------
    InvalidRequestError
        The name's end and the recipe's target do not go together, or a GGUF scheme has no ``.gguf`` name.
    """
    name = place(uri).name
    by_name = next((target for suffix, target in _SUFFIXES.items() if name.endswith(suffix)), None)
    packing = recipe.command.layer_spec().scheme.packing
    if by_name in ("parquet", "arrow"):
        return by_name
    if by_name is None and recipe.target in (None, *FOLDERS) and packing != "gguf":
        return recipe.target or ("bitsandbytes" if packing.startswith("bnb-") else "compressed-tensors")
    if by_name == "gguf" and recipe.target in (None, "gguf"):
        return "gguf"
    wanted = recipe.target or ("gguf" if packing == "gguf" else "compressed-tensors")
    ends = {"gguf": "*.gguf", "parquet": "*.parquet", "arrow": "*.arrow"}.get(wanted, "*.safetensors or a folder")
    scheme = recipe.command.scheme
    reason = "is a GGUF format and has no standard place in a safetensors file" if packing == "gguf" else "goes there"
    raise InvalidRequestError(
        f'{scheme} {reason}: the output is "{name}"; expected {ends}, or *.parquet or *.arrow for a table',
        field="output",
        got=name,
    )


def sizes(plan: Plan, source: Source) -> dict[str, int]:
    """Bytes of every quantized layer in the output, without its file's header.

    Raises
    ------
    InvalidRequestError
        A scheme has no place in such an output.
    """
    nbytes = {}
    for name in plan.commands:
        spec, meta = plan.spec(name), source.tensors[name]
        rows, cols = matrix_shape(meta.shape)
        if plan.target in FOLDERS:
            LAYOUTS[plan.target].check_scheme(spec)
            tensors = LAYOUTS[plan.target].entries(name, meta.shape, FLOATS[meta.dtype], spec)
            nbytes[name] = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
        else:
            scales = 0 if spec.scheme.scales_inside else 4 * scale_count(spec, rows, cols)
            nbytes[name] = packed_bytes(spec, rows, cols) + scales * (1 if spec.symmetric else 2)
    return nbytes


def open_sink(uri: str | os.PathLike[str], plan: Plan, source: Source, *, resume: bool = False) -> Sink:
    """Open the output of a plan.

    Parameters
    ----------
    uri : path or URI
        A local path, or what pyarrow or fsspec can write; then the output grows in the system's temporary folder and
        is copied when it is whole.
    plan : Plan
        From :func:`flightquant.client.recipes.make_plan`, for this source.
    resume : bool
        Go on with work that an earlier call left; the tensors in ``done`` need not be written again.

    Raises
    ------
    InvalidRequestError
        A scheme has no place in such an output, or the output exists, or the work cannot be gone on with.
    OSError
        It cannot be written.
    """
    return _SINKS[plan.target](place(uri), plan, source, resume=resume)
