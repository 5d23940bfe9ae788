"""Safetensors files: a strict reader over a memory map, and the header of a file to be written.

The format is an 8-byte little-endian header length, a JSON header that maps names to dtype, shape and byte range, and
the tensors' bytes. The header comes from wherever the file does, so nothing in it is believed: ranges must lie in the
file, fit dtype and shape, and cover the data without holes or overlaps.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer

MAX_HEADER_BYTES = 100_000_000
"""As in the format's own library."""
_ALIGNMENT = 8

_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""The dtypes that can be quantized, as this package names them."""
STORAGE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I8": "|i1", "I32": "<i4", "I64": "<i8"}


class SafetensorsError(InvalidRequestError):
    """A file is not what the safetensors format says."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; ``begin`` and ``end`` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; packed 4- and 6-bit types fill whole bytes.

    Raises
    ------
    SafetensorsError
        An unknown dtype, or bits that do not fill whole bytes.
    """
    if dtype not in _BITS:
        raise SafetensorsError(f'unknown dtype "{dtype[:40]}"', field="dtype", got=dtype, expected=tuple(_BITS))
    bits = prod(shape) * _BITS[dtype]
    if bits % 8:
        raise SafetensorsError(f"{prod(shape)} values of {dtype} do not fill whole bytes", field="shape")
    return bits // 8


class SafetensorsFile:
    """A file's tensors as views of its memory map, nothing loaded before it is looked at.

    The views stay valid after :meth:`close`, which only gives up this object's own hold on the map.

    Attributes
    ----------
    tensors : dict of str to TensorInfo
        In the order of the file's bytes.
    metadata : dict of str to str

    Raises
    ------
    SafetensorsError
        The header is not what the format says.
    OSError
        The file cannot be opened or mapped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._start, self.tensors, self.metadata = read_header(file, size, self.path.name)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the map; it lives on as long as a view of it does."""
        del self._map

    def data(self, name: str) -> memoryview:
        """A tensor's bytes, shared with the map."""
        info = self.tensors[name]
        return memoryview(self._map)[self._start + info.begin : self._start + info.end]

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give back the pages of a tensor's bytes from ``first`` to ``last``."""
        info = self.tensors[name]
        begin = self._start + info.begin
        give_back(self._map, begin + first, self._start + info.end if last is None else begin + last)

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a read-only array of its shape; bfloat16 as uint16.

        Raises
        ------
        SafetensorsError
            NumPy has no such dtype.
        """
        info = self.tensors[name]
        if info.dtype not in STORAGE:
            raise SafetensorsError(f'tensor "{name}" has dtype {info.dtype}; expected {", ".join(STORAGE)}')
        return np.frombuffer(self.data(name), STORAGE[info.dtype]).reshape(info.shape)

    def layer(self, name: str) -> Layer:
        """A float tensor, ready to be quantized, sharing the map's memory.

        Raises
        ------
        SafetensorsError
            It is not of a float dtype that can be quantized.
        """
        info = self.tensors[name]
        if info.dtype not in FLOATS:
            raise SafetensorsError(f'tensor "{name}" has dtype {info.dtype}; expected {", ".join(FLOATS)}')
        return Layer(name, info.shape, FLOATS[info.dtype], self.array(name).reshape(-1))


def give_back(mapped: mmap.mmap, first: int, last: int) -> None:
    """Let the system take pages of a file's map from this process; who looks at them again gets them again."""
    page = mmap.PAGESIZE
    begin, end = -(-first // page) * page, last // page * page
    if end > begin:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def read_header(file: BinaryIO, size: int, name: str) -> tuple[int, dict[str, TensorInfo], dict[str, str]]:
    """Where the data begins, the tensors in the order of their bytes, and the metadata.

    Parameters
    ----------
    file : binary file
        At its beginning.
    size : int
        Bytes of the file.
    name : str
        What messages call it.

    Raises
    ------
    SafetensorsError
        The header is not what the format says.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise SafetensorsError(f"{name} has {size} bytes; a safetensors file has at least 8")
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, size - 8)
    if not 2 <= length <= limit:
        raise SafetensorsError(
            f"{name} is no safetensors file: its header would have {length} bytes, of {limit} possible"
        )
    start = 8 + length
    try:
        return start, *_parse_header(file.read(length), size - start)
    except SafetensorsError as error:
        raise SafetensorsError(f"{name} is no good safetensors file: {error}") from None


def _parse_header(raw: bytes, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise SafetensorsError("its header has a name twice")
        return seen

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique) if raw[:1] == b"{" else None
    except SafetensorsError:
        raise
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise SafetensorsError("its header is no JSON object in UTF-8")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError("its __metadata__ maps not only text to text")
    infos = {name: _parse_tensor(name, entry) for name, entry in header.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, info in ordered.items():
        if info.begin != position:
            problem = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            raise SafetensorsError(f'tensor "{name[:200]}" {problem}: it begins at {info.begin}, expected {position}')
        position = info.end
    if position != data_bytes:
        raise SafetensorsError(f"its tensors end at byte {position}, its data at {data_bytes}")
    return ordered, metadata


def _parse_tensor(name: str, entry: Any) -> TensorInfo:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)

    shown = f'tensor "{name[:200]}"'
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"{shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise SafetensorsError(f"{shown} has a dtype, shape or data_offsets of the wrong kind")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    if info.nbytes != tensor_bytes(dtype, info.shape):
        wanted = tensor_bytes(dtype, info.shape)
        raise SafetensorsError(f"{shown} has {info.nbytes} bytes; its dtype and shape make {wanted}")
    return info


def file_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The beginning of a file up to its data, and where each tensor stands, counted from the file's beginning.

    Parameters
    ----------
    tensors : mapping of str to (dtype, shape)
        Wide dtypes are laid first, so that each is aligned to its own size.
    metadata : mapping of str to str

    Raises
    ------
    SafetensorsError
        A dtype that the format does not have.
    """
    infos = dict(_laid_out(tensors))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in infos.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.begin, info.end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    start = 8 + len(raw)
    placed = {
        name: TensorInfo(info.dtype, info.shape, start + info.begin, start + info.end) for name, info in infos.items()
    }
    return len(raw).to_bytes(8, "little") + raw, placed


def _laid_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, TensorInfo]]:
    position = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -_BITS.get(item[1][0], 0)):
        end = position + tensor_bytes(dtype, shape)
        yield name, TensorInfo(dtype, shape, position, end)
        position = end
