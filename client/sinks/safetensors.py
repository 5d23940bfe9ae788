"""Safetensors files and folders of them: compressed-tensors' and bitsandbytes' layouts, and plain tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import pyarrow as pa

from flightquant.client import bitsandbytes, compressed
from flightquant.client.recipes import Plan
from flightquant.client.safetensors import FLOATS, file_header, tensor_bytes
from flightquant.client.sinks.base import Sink
from flightquant.client.sinks.work import PlacedFile
from flightquant.client.sources import Place, Tensor, TensorMeta
from flightquant.errors import InvalidRequestError
from flightquant.schemes import LayerSpec

SHARD_BYTES = 5_000_000_000
"""Files grow no larger, but for a single tensor: what Hugging Face's own libraries write."""


class Layout(Protocol):
    """How quantized weights stand in a safetensors file."""

    def check_scheme(self, spec: LayerSpec) -> None:
        """Refuse what has no place there."""

    def entries(
        self, name: str, shape: tuple[int, ...], dtype: str, spec: LayerSpec
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that stand for one weight."""

    def contents(self, batch: pa.RecordBatch, row: int, spec: LayerSpec, dtype: str) -> dict[str, Any]:
        """Their bytes."""

    def configuration(self, plan: Plan, tensors: Mapping[str, TensorMeta]) -> dict[str, Any]:
        """The model's ``quantization_config``."""


LAYOUTS: dict[str, Layout] = {"compressed-tensors": compressed, "bitsandbytes": bitsandbytes}


class SafetensorsSink(Sink):
    """A file if the target's name ends with ``.safetensors``, else a folder with shards, index and what lay beside.

    A folder's ``config.json`` gets the ``quantization_config``; each file's metadata has it too. A plan that keeps all
    tensors makes a plain checkpoint, without such a thing.
    """

    def _begin(self) -> None:
        self._layout = LAYOUTS.get(self.plan.target, compressed)
        self._is_file = self._work.target.name.endswith(".safetensors")
        for command in self.plan.groups(list(self.plan.commands)):
            self._layout.check_scheme(command.layer_spec())
        self._dtypes = {name: FLOATS[self._source.tensors[name].dtype] for name in self.plan.commands}
        self._config = self._layout.configuration(self.plan, self._source.tensors) if self.plan.commands else None
        metadata = {"format": "pt", **self._source.metadata}
        if self._config is not None:
            metadata[compressed.CONFIG_KEY] = json.dumps(self._config)
        self._files: list[PlacedFile] = []
        self._places: dict[str, tuple[PlacedFile, int]] = {}
        self._weight_map: dict[str, str] = {}
        shards = list(self._shards())
        if not self._is_file:
            self._work.output.mkdir(exist_ok=True)
        for number, tensors in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            header, placed = file_header(tensors, metadata)
            size = max((info.end for info in placed.values()), default=len(header))
            file = PlacedFile(self._work.output if self._is_file else self._work.output / name, header, size)
            self._files.append(file)
            self._places |= {tensor: (file, info.begin) for tensor, info in placed.items()}
            self._weight_map |= dict.fromkeys(tensors, name)

    def _shards(self) -> Iterator[dict[str, tuple[str, tuple[int, ...]]]]:
        """The tensors of each file, in the source's order."""
        shard: dict[str, tuple[str, tuple[int, ...]]] = {}
        held = 0
        for name, meta in self._source.tensors.items():
            if name in self.plan.commands:
                tensors = self._layout.entries(name, meta.shape, self._dtypes[name], self.plan.spec(name))
            else:
                tensors = {name: (meta.dtype, meta.shape)}
            nbytes = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
            if shard and held + nbytes > SHARD_BYTES and not self._is_file:
                yield shard
                shard, held = {}, 0
            shard |= tensors
            held += nbytes
        yield shard

    def _write_row(self, batch: pa.RecordBatch, row: int, name: str) -> int:
        nbytes = 0
        for tensor, data in self._layout.contents(batch, row, self.plan.spec(name), self._dtypes[name]).items():
            file, position = self._places[tensor]
            file.write(position, data)
            nbytes += memoryview(data).nbytes
        return nbytes

    def _write_kept(self, tensor: Tensor, first: int, data: Any) -> None:
        file, position = self._places[tensor.name]
        file.write(position + first, data)

    def _finish(self) -> None:
        for file in self._files:
            file.sync()
        self._close()
        if self._is_file:
            return
        out = self._work.output
        companions: dict[str, Place] = getattr(self._source, "companions", {})
        for name, place in companions.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with place.open() as source, (out / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 8 << 20)
        if "config.json" in companions:
            config = _read_config(companions["config.json"])
            config.pop(compressed.CONFIG_KEY, None)
            if self._config is not None:
                config[compressed.CONFIG_KEY] = self._config
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(self._files) > 1:
            total = sum(file.size for file in self._files)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
            (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _close(self) -> None:
        for file in self._files:
            file.close()


def _read_config(place: Place) -> dict[str, Any]:
    with place.open() as file:
        try:
            config = json.loads(file.read())
        except (ValueError, RecursionError):
            config = None
    if not isinstance(config, dict):
        raise InvalidRequestError(f"{place.uri} is no JSON object", field="model")
    return config
