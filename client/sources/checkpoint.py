"""Safetensors checkpoints as sources: a file, or a folder of shards with or without their index, here or far away."""

from __future__ import annotations

import json
from collections import ChainMap
from pathlib import PurePosixPath
from typing import Any

from flightquant.client.safetensors import SafetensorsFile, TensorInfo, read_header
from flightquant.client.sources.base import Source, Tensor, TensorMeta
from flightquant.client.sources.places import Place
from flightquant.errors import InvalidRequestError

WEIGHT_SUFFIXES = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".tflite", ".mlmodel",
)  # fmt: skip
"""Weights in some format: never copied along beside quantized ones."""
_MAX_INDEX_BYTES = 256 << 20


class _RemoteFile:
    """A safetensors file in a file system that gives ranges of bytes, with the same members as the local one."""

    def __init__(self, place: Place) -> None:
        self._file = place.open()
        self._start, self.tensors, self.metadata = read_header(self._file, self._file.size(), place.name)

    def data(self, name: str) -> Any:
        """A tensor's bytes, read now."""
        info = self.tensors[name]
        self._file.seek(self._start + info.begin)
        return memoryview(self._file.read_buffer(info.nbytes))

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(place: Place) -> SafetensorsFile | _RemoteFile:
    return SafetensorsFile(place.local) if place.local else _RemoteFile(place)


class CheckpointSource(Source):
    """The tensors of one or several safetensors files, in the order of the files and of their bytes.

    Attributes
    ----------
    shards : list of list of str
        The names of the tensors of each file.
    companions : dict of str to Place
        The folder's other files (configuration, tokenizer), by their path in it.

    Raises
    ------
    InvalidRequestError
        A file is no good, the index does not fit the files, or two files hold a tensor of one name.
    OSError
        A file cannot be opened.
    """

    def __init__(self, place: Place, files: list[Place], companions: dict[str, Place], expected: Any = None) -> None:
        self.label = place.name
        self.companions = companions
        self._places = files
        self._files: list[SafetensorsFile | _RemoteFile] = []
        self._where: dict[str, SafetensorsFile | _RemoteFile] = {}
        self.tensors = {}
        self.shards: list[list[str]] = []
        try:
            for each in files:
                self._add(each, expected)
        except BaseException:
            self.close()
            raise
        for name in expected or ():
            if name not in self.tensors:
                raise InvalidRequestError(
                    f'the index names tensor "{name[:200]}", which {expected[name]} does not hold'
                )
        self.metadata = dict(ChainMap(*(file.metadata for file in self._files)))

    def _add(self, place: Place, expected: Any) -> None:
        file = _open(place)
        self._files.append(file)
        names = [name for name in file.tensors if expected is None or expected.get(name) == place.name]
        for name in names:
            if name in self.tensors:
                raise InvalidRequestError(f'tensor "{name[:200]}" stands in two files, the second is {place.name}')
            info: TensorInfo = file.tensors[name]
            self.tensors[name] = TensorMeta(info.dtype, info.shape, info.nbytes)
            self._where[name] = file
        self.shards.append(names)

    def load(self, name: str) -> Tensor:
        """One tensor: of a local file a view of its memory map."""
        return Tensor(name, self.tensors[name], self._where[name].data(name))

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give the pages of a local file back."""
        self._where[name].release(name, first, last)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()
        self._files = []

    def fingerprint(self) -> list[Any]:
        """Names, sizes and times of the files."""
        infos = [(place, place.info()) for place in self._places]
        return [[place.name, info.size, info.mtime_ns] for place, info in infos]


def open_file(place: Place) -> CheckpointSource:
    """A single safetensors file."""
    return CheckpointSource(place, [place], {})


def open_folder(place: Place) -> CheckpointSource:
    """A folder of safetensors files; where there is an index, just the files that it names.

    Raises
    ------
    InvalidRequestError
        The index is no good.
    """
    below = {place.relative(info.path): info for info in place.files(recursive=True)}
    top = [name for name in below if "/" not in name]
    indices = [name for name in top if name.endswith(".safetensors.index.json")]
    expected = None
    shards = [name for name in top if name.endswith(".safetensors")]
    if indices:
        # Some folders hold the weights twice; "model." is what the libraries load.
        index = "model.safetensors.index.json" if "model.safetensors.index.json" in indices else indices[0]
        expected = _read_index(place.child(index))
        shards = sorted(set(expected.values()))
    elif "model.safetensors" in shards:
        shards = ["model.safetensors"]
    companions = {
        name: place.child(name)
        for name in below
        if not name.endswith(WEIGHT_SUFFIXES) and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    }
    return CheckpointSource(place, [place.child(name) for name in shards], companions, expected)


def _read_index(place: Place) -> dict[str, str]:
    with place.open() as file:
        if file.size() > _MAX_INDEX_BYTES:
            raise InvalidRequestError(f"{place.name} has {file.size()} bytes; expected at most {_MAX_INDEX_BYTES}")
        raw = file.read()
    try:
        weight_map = json.loads(raw)["weight_map"]
        good = weight_map and all(
            isinstance(value, str) and value.endswith(".safetensors") and "/" not in value and "\\" not in value
            for value in weight_map.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise InvalidRequestError(
            f'{place.name} is no index; expected a JSON object whose "weight_map" names a .safetensors file of this '
            "folder for every tensor"
        )
    checked: dict[str, str] = weight_map
    return checked
