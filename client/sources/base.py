"""What every source is: named tensors with known shapes, read one at a time, whatever holds them."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from flightquant.client.safetensors import FLOATS, STORAGE, tensor_bytes
from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer, as_layer


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A tensor before it is read.

    Attributes
    ----------
    dtype : str
        As safetensors names it (``"BF16"``, ``"F32"``, ``"I64"``, ...), or a GGUF type such as ``"Q4_0"``.
    shape : tuple of int
    nbytes : int
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether it can be quantized: float32, float16, bfloat16 or float64."""
        return self.dtype in FLOATS


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that is read: ``data`` is a contiguous buffer of ``meta.nbytes`` bytes, little endian."""

    name: str
    meta: TensorMeta
    data: Any

    def layer(self) -> Layer:
        """The weights, sharing memory.

        Raises
        ------
        InvalidRequestError
            It is of no dtype that can be quantized.
        """
        if not self.meta.is_float:
            raise InvalidRequestError(
                f'tensor "{self.name}" has dtype {self.meta.dtype}; expected {", ".join(FLOATS)}',
                field="weights",
                got=self.meta.dtype,
                expected=tuple(FLOATS),
            )
        kind = STORAGE[self.meta.dtype]
        values = np.frombuffer(self.data, kind) if self.meta.nbytes else np.empty(0, kind)
        return Layer(self.name, self.meta.shape, FLOATS[self.meta.dtype], values)


class Source(Mapping[str, Layer]):
    """Named tensors of one model. As a mapping it holds the layers that can be quantized, each read when asked for.

    :meth:`read` is the way through a whole model: in the source's own order, with no more than one tensor (or one
    window of the file) held at a time.

    Attributes
    ----------
    label : str
        What messages call the source.
    tensors : dict of str to TensorMeta
        All tensors, floats or not, in reading order.
    metadata : dict of str to str
        What the source says of itself.
    """

    label: str
    tensors: dict[str, TensorMeta]
    metadata: dict[str, str]

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """One tensor. Going through the names in order is cheap, going back may read twice."""

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give up the memory of a tensor's bytes from ``first`` to ``last``.

        Its data stays valid for those who hold it still: what is looked at again is read again.
        """

    def close(self) -> None:
        """Close what is open."""

    def read(self, names: Collection[str] | None = None) -> Iterator[Tensor]:
        """These tensors (None: all), in the source's order; each is released when the next is asked for."""
        wanted = self.tensors.keys() if names is None else set(names)
        for name in self.tensors:
            if name in wanted:
                yield self.load(name)
                self.release(name)

    def layers(self, names: Collection[str] | None = None) -> Iterator[Layer]:
        """These layers (None: all that can be quantized), in the source's order."""
        for tensor in self.read(list(self) if names is None else names):
            yield tensor.layer()

    def __getitem__(self, name: str) -> Layer:
        return self.load(name).layer()

    def __iter__(self) -> Iterator[str]:
        return (name for name, meta in self.tensors.items() if meta.is_float)

    def __len__(self) -> int:
        return sum(meta.is_float for meta in self.tensors.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.tensors and self.tensors[name].is_float

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fingerprint(self) -> list[Any]:
        """What tells this source from another one or an older one, as JSON.

        Names, dtypes and shapes; where there are files, their names, sizes and times.
        """
        return [[name, meta.dtype, list(meta.shape)] for name, meta in self.tensors.items()]


_FROM_NUMPY = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


class MappingSource(Source):
    """A dict of NumPy, torch, ml_dtypes or pyarrow arrays, a state dict, an ``.npz`` that ``numpy.load`` opened.

    Raises
    ------
    InvalidRequestError
        A name is no text, or a value no array of a known dtype.
    """

    def __init__(self, weights: Mapping[str, Any], label: str = "the mapping") -> None:
        self.label = label
        self.metadata = {}
        self._weights = weights
        self.tensors = {name: _meta(name, tensor) for name, tensor in weights.items()}

    def load(self, name: str) -> Tensor:
        """One tensor; its memory is shared if it is contiguous."""
        tensor = self._weights[name]
        if _is_torch(tensor):
            # NumPy has neither bfloat16 nor 8-bit floats: the bytes say the same.
            held = tensor.detach().cpu().contiguous().flatten().view(sys.modules["torch"].uint8).numpy()
        else:
            held = tensor.data if isinstance(tensor, Layer) else np.asarray(tensor)
        flat = np.ascontiguousarray(held, dtype=held.dtype.newbyteorder("<")).reshape(-1)
        return Tensor(name, self.tensors[name], flat.view(np.uint8))

    def __getitem__(self, name: str) -> Layer:
        return as_layer(name, self._weights[name])  # which tells of strided tensors that had to be copied


def _is_torch(tensor: Any) -> bool:
    return type(tensor).__module__.split(".")[0] == "torch"


def _meta(name: Any, tensor: Any) -> TensorMeta:
    if not isinstance(name, str):
        raise InvalidRequestError(f"a layer's name is {name!r}; expected text", field="layer_name", got=repr(name))
    if isinstance(tensor, Layer):
        kind, shape = tensor.dtype, tensor.shape
    else:
        held = tensor if hasattr(tensor, "dtype") else np.asarray(tensor)
        kind, shape = str(held.dtype).removeprefix("torch."), tuple(map(int, held.shape))
        kind = kind if _is_torch(held) else held.dtype.name
    if kind not in _FROM_NUMPY:
        raise InvalidRequestError(
            f'layer "{name}" has dtype {kind}; expected {", ".join(FLOATS.values())}',
            field="weights",
            got=kind,
            expected=tuple(FLOATS.values()),
        )
    dtype = _FROM_NUMPY[kind]
    return TensorMeta(dtype, shape, tensor_bytes(dtype, shape))
