"""A safetensors checkpoint in, its quantized twin out: which tensors, in which layout, at what cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa

from flightquant.client import compressed
from flightquant.client.safetensors import FLOATS, SafetensorsFile, SafetensorsWriter
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.layers import Layer, layer_class
from flightquant.spec import Command, LayerSpec

KEPT_PATTERNS = ("*embed*", "*norm*", "*lm_head*", "*.wte.*", "*.wpe.*", "*.ln_*", "*.mlp.gate.*", "*.router.*")
"""Weights that stay as they are unless asked for, compared without regard to case: embeddings and norms are no linear
layers, and the output layer and the routers of expert models lose the most."""

Quantize = Callable[[Mapping[str, Layer]], Iterator[pa.RecordBatch]]
"""Answer batches for layers, from a server or in-process."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One quantized layer: its size before and after, its error and its cost."""

    name: str
    weights: int
    bytes_in: int
    bytes_out: int
    sqnr_db: float
    cosine: float
    max_abs_error: float
    kernel_ns: int
    bytes_copied: int

    @property
    def layer_class(self) -> str:
        """The name with its numbers replaced."""
        return layer_class(self.name)


@dataclass(slots=True)
class Conversion:
    """What became of a checkpoint.

    Attributes
    ----------
    layers : list of LayerResult
    kept : dict of str to str
        Tensors that stay as they are, each with the reason.
    kept_bytes : int
    seconds : float
        From the first weight to the file in its place.
    file_bytes_in, file_bytes_out : int
        Sizes of the two files.
    """

    layers: list[LayerResult] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    kept_bytes: int = 0
    seconds: float = 0.0
    file_bytes_in: int = 0
    file_bytes_out: int = 0


def select(file: SafetensorsFile, spec: LayerSpec, keep: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The tensors to quantize, and those to keep with the reason.

    Parameters
    ----------
    keep : sequence of str
        Shell patterns of names that are kept beside :data:`KEPT_PATTERNS`.

    Raises
    ------
    InvalidRequestError
        A pattern fits no tensor: most likely it is misspelt, and the layer would be quantized in silence.
    """
    for pattern in keep:
        if not any(_fits(name, pattern) for name in file.tensors):
            raise InvalidRequestError(f'no tensor fits --keep "{pattern}"', field="keep", got=pattern)
    chosen: list[str] = []
    kept: dict[str, str] = {}
    for name in file.tensors:
        reason = _reason_to_keep(file, name, spec, keep)
        if reason is None:
            chosen.append(name)
        else:
            kept[name] = reason
    return chosen, kept


def _fits(name: str, pattern: str) -> bool:
    lower = pattern.lower()
    return fnmatchcase(name.lower(), lower) or fnmatchcase(compressed.module_of(name).lower(), lower)


def _reason_to_keep(file: SafetensorsFile, name: str, spec: LayerSpec, keep: Sequence[str]) -> str | None:
    info = file.tensors[name]
    if not name.endswith(".weight"):
        return "not named *.weight"
    if info.dtype not in FLOATS:
        return f"dtype {info.dtype}"
    if len(info.shape) != 2 or 0 in info.shape:
        return f"shape {list(info.shape)}"
    for pattern in keep:
        if _fits(name, pattern):
            return f"--keep {pattern}"
    for pattern in KEPT_PATTERNS:
        if _fits(f".{name}", pattern):
            return f"kept by default ({pattern})"
    if spec.group_size and info.shape[1] % spec.group_size:
        return f"group size {spec.group_size} does not divide {info.shape[1]} columns"
    return None


def convert(
    source: SafetensorsFile, target: str | Path, command: Command, quantize: Quantize, keep: Sequence[str] = ()
) -> Conversion:
    """Write the quantized twin of a checkpoint; nothing is left at ``target`` unless all of it is.

    Parameters
    ----------
    quantize : callable
        Given the layers, their answer batches in any order: :meth:`QuantClient.stream` or the local call.

    Raises
    ------
    InvalidRequestError
        The scheme has no place in a safetensors file, nothing in the file can be quantized, or it is quantized already.
    LayerError
        A layer cannot be quantized, by a NaN for instance.
    """
    spec = command.layer_spec()
    compressed.check_scheme(spec)
    if compressed.CONFIG_KEY in source.metadata:
        raise InvalidRequestError(f"{source.path.name} is quantized already", field="model")
    chosen, kept = select(source, spec, keep)
    if not chosen:
        raise InvalidRequestError(
            f"{source.path.name} has no tensor to quantize; expected two-dimensional float tensors named *.weight",
            field="model",
        )
    tensors = {name: (info.dtype, info.shape) for name, info in source.tensors.items() if name in kept}
    for name in chosen:
        info = source.tensors[name]
        tensors |= compressed.entries(name, info.shape, FLOATS[info.dtype], spec)
    ignored = [
        compressed.module_of(name) for name in kept if len(source.tensors[name].shape) == 2 and name.endswith(".weight")
    ]
    config = json.dumps(compressed.configuration(spec, ignored))
    metadata = {"format": "pt", **source.metadata, compressed.CONFIG_KEY: config}
    started = time.perf_counter()
    result = Conversion(kept=kept, kept_bytes=sum(source.tensors[name].nbytes for name in kept))
    with SafetensorsWriter(target, tensors, metadata) as writer:
        for name in kept:
            writer.write(name, source.data(name))
        for batch in quantize({name: source.layer(name) for name in chosen}):
            result.layers += _write_answers(batch, spec, writer)
    result.seconds = time.perf_counter() - started
    result.file_bytes_in = source.path.stat().st_size
    result.file_bytes_out = writer.nbytes
    return result


def _write_answers(batch: pa.RecordBatch, spec: LayerSpec, writer: SafetensorsWriter) -> Iterator[LayerResult]:
    for row in range(batch.num_rows):
        cells = {name: batch.column(name)[row].as_py() for name in (*_COPIED, "layer_name", "status", "error", "shape")}
        name, status = cells.pop("layer_name"), cells.pop("status")
        error, shape = cells.pop("error"), cells.pop("shape")
        if status != "ok":
            raise LayerError(status, f'layer "{name}" cannot be quantized: {error}; --keep "{name}" leaves it as it is')
        bytes_out = 0
        for tensor, data in compressed.contents(batch, row, spec).items():
            writer.write(tensor, data)
            bytes_out += memoryview(data).nbytes
        yield LayerResult(name=name, weights=shape[0] * shape[1], bytes_out=bytes_out, **cells)


_COPIED = ("bytes_in", "sqnr_db", "cosine", "max_abs_error", "kernel_ns", "bytes_copied")
