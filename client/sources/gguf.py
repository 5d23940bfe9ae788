"""GGUF files as sources, read by the ``gguf`` library."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from flightquant.client.safetensors import give_back
from flightquant.client.sources.base import Source, Tensor, TensorMeta
from flightquant.client.sources.places import Place
from flightquant.errors import InvalidRequestError


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
            self.reader: Any = gguf.GGUFReader(path)
            self.tensors = {tensor.name: _meta(tensor) for tensor in self.reader.tensors}
            self._found = {tensor.name: tensor for tensor in self.reader.tensors}
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
            self.close()
            raise InvalidRequestError(f"{place.name} is no good GGUF file: {str(error)[:200]}") from None
        self._place = place
        architecture = self.reader.fields.get("general.architecture")
        self.metadata = {} if architecture is None else {"general.architecture": str(architecture.contents())}

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
