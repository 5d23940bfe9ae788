"""GGUF files as sources, read by the ``gguf`` library."""

from __future__ import annotations

import mmap
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from flightquant.client.safetensors import give_back
from flightquant.client.sources.base import Source, Tensor, TensorMeta
from flightquant.client.sources.places import Place
from flightquant.errors import InvalidRequestError

MAX_VALUES = 1 << 21
"""In a header, with those of its arrays: the largest vocabularies, with their merges, have about a million."""
_TEXT, _ARRAY = 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, _TEXT: 8, 10: 8, 11: 8, 12: 8}
"""Of a value of each of GGUF's types, at least."""
_TENSOR_BYTES = 24
"""Of what a header says of a tensor, at least."""


class GGUFSource(Source):
    """The tensors of a GGUF file; shapes are row-major, so the reverse of what the file says.

    A file that is not local is first copied to a temporary one.

    Attributes
    ----------
    reader : gguf.GGUFReader
        For the metadata, which is kept when tensors are quantized again.

    Raises
    ------
    InvalidRequestError
        The library is not installed, or cannot make sense of the file.
    """

    def __init__(self, place: Place) -> None:
        try:
            import gguf
        except ModuleNotFoundError:
            raise InvalidRequestError(
                f'{place.name} needs the package gguf; install it with: pip install "flightquant[files]"'
            ) from None
        self.label = place.name
        self._temporary: Any = None
        path = place.local or self._copied(place)
        try:
            check_header(path)
            self.reader: Any = gguf.GGUFReader(path)
            self.tensors = {tensor.name: _meta(tensor) for tensor in self.reader.tensors}
            self._found = {tensor.name: tensor for tensor in self.reader.tensors}
            architecture = self.reader.fields.get("general.architecture")
            self.metadata = {} if architecture is None else {"general.architecture": str(architecture.contents())}
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
            self.close()
            raise InvalidRequestError(f"{place.name} is no good GGUF file: {str(error)[:200]}") from None
        self._place = place

    def _copied(self, place: Place) -> Path:
        self._temporary = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115 - closed by close()
        with place.open() as file:
            shutil.copyfileobj(file, self._temporary, 8 << 20)
        self._temporary.flush()
        return Path(self._temporary.name)

    def load(self, name: str) -> Tensor:
        """One tensor, as a view of the memory map."""
        first, last = self._range(name)
        return Tensor(name, self.tensors[name], memoryview(self.reader.data)[first:last])

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give the pages of the file back."""
        begin, end = self._range(name)
        give_back(self.reader.data._mmap, begin + first, end if last is None else begin + last)

    def _range(self, name: str) -> tuple[int, int]:
        found = self._found[name]
        return int(found.data_offset), int(found.data_offset) + int(found.n_bytes)

    def close(self) -> None:
        """Delete the temporary copy, if there is one."""
        if self._temporary is not None:
            self._temporary.close()

    def fingerprint(self) -> list[Any]:
        """Name, size and time of the file."""
        info = self._place.info()
        return [[self._place.name, info.size, info.mtime_ns]]


def _meta(tensor: Any) -> TensorMeta:
    # The only types that have the same name and bytes here and there: F32, F16, BF16, F64, I8, I16, I32, I64.
    return TensorMeta(tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)), int(tensor.n_bytes))


def check_header(path: str | Path) -> None:
    """Hold what a header announces against the file's size and :data:`MAX_VALUES`.

    The package gguf makes objects of about 1 KiB for each value of each array, also of those that the file does not
    hold: a header of 60 bytes would take all memory there is.

    Raises
    ------
    ValueError
        The header has more than the file, too much, or an array of arrays, which ggml does not read either.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _walk(data)
        except (struct.error, OverflowError):
            raise ValueError("its header is cut short") from None


def _walk(data: mmap.mmap) -> None:
    order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
    number, array = struct.Struct(f"{order}Q"), struct.Struct(f"{order}IQ")

    def past_texts(at: int, count: int) -> int:
        for _ in range(count):
            at += 8 + number.unpack_from(data, at)[0]
        return at

    tensors, pairs = struct.unpack_from(f"{order}QQ", data, 8)
    at, values = 24, tensors
    for _ in range(pairs):
        at = past_texts(at, 1)
        (kind,) = struct.unpack_from(f"{order}I", data, at)
        at, count = at + 4, 1
        if kind == _ARRAY:
            kind, count = array.unpack_from(data, at)
            at += array.size
        values += count
        if kind not in _BYTES or values > MAX_VALUES:
            problem = f"{values} values" if kind in _BYTES else f"a value of type {kind}"
            raise ValueError(f"its header has {problem}; expected at most {MAX_VALUES}, and no arrays of arrays")
        at = past_texts(at, count) if kind == _TEXT else at + count * _BYTES[kind]
    if at + tensors * _TENSOR_BYTES > len(data):
        raise ValueError("its header ends behind the end of the file")
