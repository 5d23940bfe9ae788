"""A model in, its quantized twin out: source, recipe and sink put together, at what cost."""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant.client.recipes import Plan, Recipe, fits, make_plan
from flightquant.client.sinks import LayerResult, open_sink, target_of
from flightquant.client.sources import Source, open_source, place
from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer
from flightquant.reference import kquants
from flightquant.reference.numeric import F32, widen
from flightquant.schemes import LayerSpec
from flightquant.spec import Command

MAX_WRITES = 2
"""Answers that may wait to be written while the next is computed."""


class Selection(Mapping[str, Layer]):
    """Some layers of a source: a mapping that loads each when asked for, and gives its memory up after it.

    ``shared`` holds, by name, the magnitude that a layer has to take as its largest.
    """

    def __init__(self, source: Source, names: Collection[str], shared: Mapping[str, float] | None = None) -> None:
        self._source = source
        self._shared = shared or {}
        self._names = dict.fromkeys(name for name in source.tensors if name in names)

    def __getitem__(self, name: str) -> Layer:
        return self._with_shared(self._source[name])

    def _with_shared(self, layer: Layer) -> Layer:
        return replace(layer, global_amax=self._shared[layer.name]) if layer.name in self._shared else layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give up the memory of a layer's bytes from ``first`` to ``last``."""
        self._source.release(name, first, last)

    def items(self) -> Any:
        """Names and layers, in the source's order."""
        return ((layer.name, self._with_shared(layer)) for layer in self._source.layers(self._names))


Quantize = Callable[[Selection, Command], Iterator[pa.RecordBatch]]
"""Answer batches for layers by one command, in any order, from a server or in-process."""


@dataclass(slots=True)
class Conversion:
    """What became of a model.

    Attributes
    ----------
    layers : list of LayerResult
        Those of an earlier call that was gone on with, too.
    kept : dict of str to str
        Tensors that stay as they are, each with the reason.
    kept_bytes : int
    resumed : int
        Layers that an earlier call had written.
    seconds : float
        From the first weight to the output in its place.
    bytes_in, bytes_out : int
        Sizes of all tensors of the source, and of the output.
    """

    target: str
    layers: list[LayerResult] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    kept_bytes: int = 0
    resumed: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


def plan_of(source: Source, output: str | os.PathLike[str], recipe: Recipe) -> Plan:
    """What a conversion would do.

    Raises
    ------
    InvalidRequestError
        The recipe does not fit the source or the output.
    """
    return make_plan(source, recipe, target_of(output, recipe))


def read_importance(uri: str, plan: Plan, pattern: str = "*") -> dict[str, F32]:
    """What errors in each column of a plan's layers that fit a pattern count, from a file of vectors by layer name.

    Parameters
    ----------
    uri : str
        ``*.npz``, or what :func:`open_source` reads: safetensors, Parquet, Arrow, or the GGUF that llama.cpp's
        ``llama-imatrix`` writes, whose sums of squares are divided by their counts.

    Raises
    ------
    InvalidRequestError
        The file is none of these, it names no layer of the plan, or no layer's scheme searches.
    """
    if not any(_searches(plan.spec(name)) for name in plan.commands):
        raise InvalidRequestError(
            "importance has no effect on these schemes; expected q2_k to q6_k, iq4_nl, or calibration mse",
            field="importance",
        )
    given = _vectors(uri)
    found = {name: given[name] for name in plan.commands if name in given and fits(name, pattern)}
    if not found:
        raise InvalidRequestError(
            f"{uri} holds nothing for any layer that is quantized; expected vectors by names such as "
            f"{next(iter(plan.commands))}",
            field="importance",
        )
    return found


def _searches(spec: LayerSpec) -> bool:
    return spec.calibration == "mse" or spec.scheme.name in kquants.SCHEMES


def _vectors(uri: str) -> dict[str, F32]:
    """Every float vector of a file, by name; the means of an importance matrix of llama.cpp."""
    if uri.endswith(".npz"):
        try:
            with place(uri).open() as file:
                raw = file.read()
            if not zipfile.is_zipfile(io.BytesIO(raw)):
                raise zipfile.BadZipFile("it is no zip archive")
            with np.load(io.BytesIO(raw)) as stored:
                arrays = {name: np.asarray(stored[name], np.float32) for name in stored.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidRequestError(f"{uri} is no good npz file: {str(error)[:200]}", field="importance") from None
        return {name: array.reshape(-1) for name, array in arrays.items()}
    with open_source(uri) as source:
        values = {name: widen(layer.data, layer.dtype) for name, layer in source.items()}
    made = {}
    for name, array in values.items():
        counts = values.get(f"{name.removesuffix('.in_sum2')}.counts")
        if name.endswith(".in_sum2") and counts is not None and counts.size == 1 and counts[0] > 0:
            made[name.removesuffix(".in_sum2")] = array / counts
        else:
            made[name] = array.copy()
    return made


def shared_magnitudes(source: Source, plan: Plan) -> dict[str, float]:
    """The largest magnitude among the layers of each fused group, by the name of each layer.

    Reads these layers once, one after the other. A layer without a magnitude (it holds NaN, say) leaves its group
    alone: to quantize it fails, and says why.
    """
    from flightquant import amax

    shared: dict[str, float] = {}
    for names in plan.fused():
        found = [amax({name: layer}).column("amax")[0].as_py() for name, layer in Selection(source, names).items()]
        if None not in found:
            shared |= dict.fromkeys(names, max(found))
    return shared


def convert(
    source: Source,
    output: str | os.PathLike[str],
    recipe: Recipe,
    quantize: Quantize,
    *,
    resume: bool = False,
    already: Callable[[str], None] | None = None,
    importance: Mapping[str, F32] | None = None,
) -> Conversion:
    """Write the quantized twin of a model; nothing is left at ``output`` unless all of it is.

    Parameters
    ----------
    quantize : callable
        Given layers and their command, answer batches: :meth:`QuantClient.stream` or the local call.
    resume : bool
        Go on with what an earlier call that was cut off has written; the output is the same, byte for byte.
    already : callable, optional
        Told the name of each layer that the earlier call had written.
    importance : mapping, optional
        What ``quantize`` weighs errors by: work that was begun with other numbers is not gone on with.

    Raises
    ------
    InvalidRequestError
        The recipe does not fit the source or the output.
    LayerError
        A layer cannot be quantized, by a NaN for instance.
    OSError
        The output cannot be written.
    """
    plan = plan_of(source, output, recipe)
    plan.importance = dict(importance or {})
    started = time.perf_counter()
    with open_sink(output, plan, source, resume=resume) as sink:
        before = set(sink.done)
        for tensor in source.read([name for name in sink.kept if name not in before]):
            sink.keep(tensor)
        if already is not None:
            for name in plan.commands.keys() & before:
                already(name)
        waiting = [name for name in plan.commands if name not in before]
        shared = shared_magnitudes(source, plan) if waiting else {}
        with ThreadPoolExecutor(1, "flightquant-sink") as writer:
            pending: list[Future[Any]] = []
            for command, names in plan.groups(waiting).items():
                for batch in quantize(Selection(source, names, shared), command):
                    pending.append(writer.submit(sink.write, batch))
                    while len(pending) > MAX_WRITES:
                        pending.pop(0).result()
            for each in pending:
                each.result()
    return Conversion(
        target=plan.target,
        layers=sink.results,
        kept=plan.kept,
        kept_bytes=sum(source.tensors[name].nbytes for name in plan.kept),
        resumed=len(before & plan.commands.keys()),
        seconds=time.perf_counter() - started,
        bytes_in=sum(meta.nbytes for meta in source.tensors.values()),
        bytes_out=sink.nbytes,
    )
