"""Weights as people hold them, turned into request batches without a copy.

A dict of NumPy arrays or torch tensors, a table, a batch, a reader or anything with ``__arrow_c_stream__`` becomes one
stream of RecordBatches with the contract's columns. Neither torch nor ml_dtypes is imported: their arrays are
recognised by what they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.errors import InvalidRequestError

_ARROW_VALUES = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "float64": pa.float64(),
    "bfloat16": pa.uint16(),
}


NUMBERS = re.compile("[0-9]+")


def layer_class(name: str) -> str:
    """A layer's name with every number replaced by ``*``: ``model.layers.*.mlp.up_proj.weight``."""
    return NUMBERS.sub("*", name)


@dataclass(frozen=True, slots=True)
class Layer:
    """One named tensor, ready for Arrow.

    Attributes
    ----------
    data : ndarray of shape (n,)
        The weights in row-major order: float32, float16 or float64, or uint16 with bfloat16's bits.
    copied : int
        Bytes that had to be copied to get there (0 unless the tensor was strided or of foreign byte order).
    importance : float32 array of shape (shape[-1],), optional
        What an error in each column counts, in schemes that search.
    global_amax : float, optional
        Magnitude to take in place of its own largest one, where layers share the scale of the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: npt.NDArray[Any]
    copied: int = 0
    importance: npt.NDArray[np.float32] | None = None
    global_amax: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.data.nbytes

    def part(self, first: int, last: int) -> Layer:
        """The rows from ``first`` up to ``last`` of the first axis, sharing memory."""
        width = self.data.size // self.shape[0]
        importance = self.importance
        if importance is not None and len(self.shape) == 1 and importance.size == self.shape[0]:
            importance = importance[first:last]
        data = self.data[first * width : last * width]
        shape = (last - first, *self.shape[1:])
        return Layer(self.name, shape, self.dtype, data, importance=importance, global_amax=self.global_amax)


def as_layer(name: str, tensor: Any) -> Layer:
    """A NumPy array, torch tensor, ml_dtypes array or pyarrow array as a layer; memory is shared where it can be.

    Raises
    ------
    InvalidRequestError
        The name is no text, or the values are not float32, float16, bfloat16 or float64, or not there (a tensor on the
        ``meta`` device, masked ones, nulls).
    """
    if not isinstance(name, str):
        raise InvalidRequestError(f"a layer's name is {name!r}; expected text", field="layer_name", got=repr(name))
    if isinstance(tensor, Layer):
        return tensor
    try:
        array, dtype = _as_array(tensor)
    except (TypeError, ValueError, RuntimeError, pa.ArrowException) as error:  # each library's own
        raise InvalidRequestError(
            f'layer "{name}" gives no array: {(str(error).splitlines() or [type(error).__name__])[0][:200]}',
            field="weights",
            got=type(tensor).__name__,
        ) from error
    if dtype not in _ARROW_VALUES:
        raise InvalidRequestError(
            f'layer "{name}" has dtype {dtype}; expected {", ".join(_ARROW_VALUES)}',
            field="weights",
            got=dtype,
            expected=tuple(_ARROW_VALUES),
        )
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    copied = 0 if np.may_share_memory(flat, array) else flat.nbytes
    if dtype == "bfloat16":
        flat = flat.view(np.uint16)
    return Layer(name, tuple(map(int, array.shape)), dtype, flat.reshape(-1), copied)


def _as_array(tensor: Any) -> tuple[npt.NDArray[Any], str]:
    """A tensor's memory as an array, and its dtype."""
    if type(tensor).__module__.split(".")[0] == "torch":
        return _from_torch(tensor)
    if np.ma.is_masked(tensor):
        raise ValueError("some of its values are masked")
    array = tensor.to_numpy(zero_copy_only=True) if isinstance(tensor, pa.Array) else np.asarray(tensor)
    return array, array.dtype.name


def _from_torch(tensor: Any) -> tuple[npt.NDArray[Any], str]:
    """A torch tensor's memory as an array, and its dtype; bfloat16, which NumPy lacks, as a view of its bits."""
    held = tensor.detach().cpu()
    dtype = str(held.dtype).removeprefix("torch.")
    if dtype not in _ARROW_VALUES:
        return np.empty(0), dtype
    if dtype == "bfloat16":
        bits: npt.NDArray[Any] = held.view(sys.modules["torch"].int16).numpy()
        return bits.view(np.uint16), dtype
    return held.numpy(), dtype


def weights_field(dtype: str, *, large: bool = False) -> pa.Field:
    """The ``weights`` field of the contract for one dtype; ``large`` allows more than 2^31 - 1 weights in a batch."""
    values = pa.field("item", _ARROW_VALUES[dtype], nullable=False)
    kind = pa.large_list(values) if large else pa.list_(values)
    return pa.field("weights", kind, metadata={"dtype": dtype})


def with_importance(layer: Layer, importance: Mapping[str, Any] | None) -> Layer:
    """The layer with the importance that the mapping has under its name, if any, as float32.

    Raises
    ------
    InvalidRequestError
        It is no mapping, or what stands there is no vector of numbers.
    """
    if importance is None:
        return layer
    if not isinstance(importance, Mapping):
        raise InvalidRequestError(
            f"importance is a {type(importance).__name__}; expected a mapping of layer names to vectors",
            field="importance",
            got=type(importance).__name__,
        )
    given = importance.get(layer.name)
    if given is None:
        return layer
    held = given.detach().cpu() if type(given).__module__.split(".")[0] == "torch" else given
    try:
        values = np.asarray(held, np.float32)
    except (TypeError, ValueError):
        values = np.zeros((0, 0), np.float32)
    if values.ndim != 1:
        raise InvalidRequestError(
            f'the importance of layer "{layer.name}" is no vector of numbers; expected one number for each column',
            field="importance",
            expected="a vector of one number for each column",
        )
    return replace(layer, importance=np.ascontiguousarray(values))


def layers_batch(
    layers: Sequence[Layer], row_offsets: Sequence[int | None] | None = None, *, importance: bool = False
) -> pa.RecordBatch:
    """One request batch of layers that share a dtype; a single layer is borrowed, several are joined (one copy).

    Parameters
    ----------
    row_offsets : sequence, optional
        For layers sent in parts: where each part starts on the first axis.
    importance : bool
        Whether the batch has a column of the layers' importance, null for those that have none.
    """
    dtype = layers[0].dtype
    sizes = np.array([layer.data.size for layer in layers], dtype=np.int64)
    data = layers[0].data if len(layers) == 1 else np.concatenate([layer.data for layer in layers])
    large = data.size > np.iinfo(np.int32).max
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    field = weights_field(dtype, large=large)
    values = pa.array(data, type=_ARROW_VALUES[dtype]) if data.size else pa.array([], type=_ARROW_VALUES[dtype])
    array_type = pa.LargeListArray if large else pa.ListArray
    offset_type = pa.int64() if large else pa.int32()
    weights = array_type.from_arrays(pa.array(offsets, type=offset_type), values, type=field.type)
    columns = [pa.array([layer.name for layer in layers], pa.utf8()), weights]
    fields = [pa.field("layer_name", pa.utf8()), field]
    columns.append(pa.array([list(layer.shape) for layer in layers], pa.list_(pa.int64())))
    fields.append(pa.field("shape", pa.list_(pa.int64())))
    if row_offsets is not None:
        columns.append(pa.array(list(row_offsets), pa.int64()))
        fields.append(pa.field("row_offset", pa.int64()))
    if importance:
        columns.append(pa.array([layer.importance for layer in layers], pa.list_(pa.float32())))
        fields.append(pa.field("importance", pa.list_(pa.float32())))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def refuse_importance(importance: Any) -> None:
    """Raise InvalidRequestError if there is any: Arrow data has it in a column."""
    if importance is not None:
        raise InvalidRequestError(
            'importance stands beside a mapping of layers; expected a column "importance" in Arrow data',
            field="importance",
            expected="a column of list<float32>",
        )


def named_layers(weights: Mapping[str, Any], importance: Mapping[str, Any] | None = None) -> Iterator[Layer]:
    """The layers of a mapping, in its order, each with its importance if it has one."""
    for name, tensor in weights.items():
        yield with_importance(as_layer(name, tensor), importance)


def as_reader(weights: Any) -> pa.RecordBatchReader:
    """A table, batch, reader or any object with ``__arrow_c_stream__`` as one stream of request batches.

    Raises
    ------
    InvalidRequestError
        It is none of these.
    """
    if isinstance(weights, pa.RecordBatch):
        return pa.RecordBatchReader.from_batches(weights.schema, [weights])
    if isinstance(weights, pa.Table):
        return weights.to_reader()
    if isinstance(weights, pa.RecordBatchReader):
        return weights
    if hasattr(weights, "__arrow_c_stream__"):
        try:
            return pa.RecordBatchReader.from_stream(weights)
        except pa.ArrowException as error:
            raise InvalidRequestError(
                f"weights is a {type(weights).__name__} that gives no stream of batches: {str(error)[:200]}",
                field="weights",
                got=type(weights).__name__,
            ) from error
    mapping = "" if isinstance(weights, Mapping) else "a mapping of names to arrays, "
    raise InvalidRequestError(
        f"weights is a {type(weights).__name__}; expected {mapping}a pyarrow Table, RecordBatch or reader, or an "
        "object with __arrow_c_stream__",
        field="weights",
        got=type(weights).__name__,
    )
