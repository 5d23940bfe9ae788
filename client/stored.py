"""Quantized files read back: compressed-tensors, bitsandbytes, GGUF and answer tables as float32 layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.client.bitsandbytes import STATE
from flightquant.client.compressed import FLOAT8
from flightquant.client.safetensors import FLOATS, STORAGE
from flightquant.client.sources import Source, Tensor, TensorMeta, place
from flightquant.errors import InvalidRequestError
from flightquant.reference import dynamic8, float8, matrix_shape, packed_bytes, scale_count
from flightquant.reference.integer import unpack
from flightquant.reference.numeric import F32, widen
from flightquant.schemes import NESTED, SCHEMES, LayerSpec
from flightquant.spec import Command


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A quantized weight in a file.

    Attributes
    ----------
    parts : tuple of str
        The tensors that it is made of.
    answer : callable
        Reads it as a batch of one answer row.
    """

    name: str
    shape: tuple[int, ...]
    spec: LayerSpec
    parts: tuple[str, ...]
    answer: Callable[[], pa.RecordBatch]

    def weights(self) -> F32:
        """float32 weights of its shape: by the kernels where this machine has them."""
        from flightquant import dequantize as restore

        (weights,) = restore(self.answer()).values()
        restored: F32 = weights
        return restored


def stored_layers(source: Source) -> dict[str, StoredLayer]:
    """The quantized weights of a source by their own names; the others stand as they are.

    Raises
    ------
    InvalidRequestError
        What stands beside a quantized weight does not fit it.
    """
    found: dict[str, StoredLayer] = {}
    for name, meta in source.tensors.items():
        if name.endswith(".weight_packed"):
            read = _micro if meta.dtype == "U8" else _integer
            layer = read(source, name.removesuffix("_packed"))
        elif meta.dtype == FLOAT8 and getattr(source.tensors.get(f"{name}_scale"), "dtype", "") == "U8":
            layer = _micro(source, name)
        elif meta.dtype == FLOAT8 and f"{name}_scale" in source.tensors:
            layer = _float8(source, name)
        elif f"{name}.absmax" in source.tensors:
            layer = _bitsandbytes(source, name)
        elif meta.dtype.lower() in SCHEMES and "gguf" in SCHEMES[meta.dtype.lower()].packings:
            layer = _gguf(source, name)
        else:
            continue
        found[layer.name] = layer
    return found


class DequantizedSource(Source):
    """A quantized source as the float layers that its weights stand for; everything else as it is.

    Parameters
    ----------
    dtype : str
        Of the dequantized weights, as safetensors names it: ``"F32"``, ``"F16"`` or ``"BF16"``.
    """

    def __init__(self, source: Source, dtype: str = "F32") -> None:
        self.label = source.label
        self.metadata = {key: value for key, value in source.metadata.items() if key != "quantization_config"}
        self.companions = getattr(source, "companions", {})
        self.stored = stored_layers(source)
        self._source = source
        self._dtype = dtype
        parts = {part: layer for layer in self.stored.values() for part in layer.parts}
        self.tensors = {}
        width = 4 if dtype == "F32" else 2
        for name, meta in source.tensors.items():
            if name not in parts:
                self.tensors[name] = meta
            elif parts[name].parts[0] == name:
                layer = parts[name]
                self.tensors[layer.name] = TensorMeta(dtype, layer.shape, prod(layer.shape) * width)

    def load(self, name: str) -> Tensor:
        """One tensor; a quantized one is computed now."""
        if name not in self.stored:
            return self._source.load(name)
        return Tensor(name, self.tensors[name], _as(self.stored[name].weights(), self._dtype))

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give up what the source holds."""
        if name not in self.stored:
            self._source.release(name, first, last)
            return
        for part in self.stored[name].parts:
            self._source.release(part)

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def fingerprint(self) -> list[Any]:
        """The source's own, and the dtype."""
        return [self._dtype, self._source.fingerprint()]


def _as(weights: F32, dtype: str) -> npt.NDArray[np.uint8]:
    flat = np.ascontiguousarray(weights).reshape(-1)
    if dtype == "BF16":
        # To the nearest, ties to even; what rounds beyond the largest becomes infinity, as everywhere.
        bits = flat.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return rounded.astype(np.uint16).view(np.uint8)
    return flat.astype({"F32": np.float32, "F16": np.float16}[dtype]).view(np.uint8)


def _misfit(source: Source, name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f'"{name}" of {source.label} {problem}', field="model")


def _array(source: Source, name: str) -> npt.NDArray[Any]:
    """A small tensor's values, floats as float32."""
    tensor = source.load(name)
    if tensor.meta.dtype in FLOATS:
        layer = tensor.layer()
        return widen(layer.data, layer.dtype)
    return np.frombuffer(tensor.data, STORAGE.get(tensor.meta.dtype, "|u1"))


def _answer(
    name: str,
    shape: tuple[int, ...],
    data: npt.NDArray[np.uint8],
    scales: F32 | None,
    zeros: F32 | None,
    spec: LayerSpec,
) -> pa.RecordBatch:
    """The answer row that packed bytes are."""

    def floats(values: F32 | None) -> pa.Array:
        held = None if values is None else np.ascontiguousarray(values, np.float32).reshape(-1)
        return pa.array([held], pa.list_(pa.float32()))

    packed = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    places = pa.array([0, packed.size], pa.int64()).buffers()[1]
    columns = {
        "layer_name": pa.array([name]),
        "shape": pa.array([shape], pa.list_(pa.int64())),
        "scheme": pa.array([spec.scheme.name]),
        "packing": pa.array([spec.scheme.packing]),
        "group_size": pa.array([spec.group_size], pa.int32()),
        "quantized_data": pa.Array.from_buffers(pa.large_binary(), 1, [None, places, pa.py_buffer(packed)]),
        "scales": floats(scales),
        "zero_points": floats(zeros),
    }
    return pa.RecordBatch.from_pydict(columns)


def _spec_of(scheme: str, scales: TensorMeta, rows: int, cols: int, *, symmetric: bool) -> LayerSpec:
    """The options that a file's scales tell of."""
    count = prod(scales.shape)
    options: dict[str, Any] = {"scheme": scheme, "symmetric": symmetric}
    if count == 1 and rows > 1:
        options["granularity"] = "tensor"
    elif count == rows:
        options["granularity"] = "channel"
    elif len(scales.shape) == 2 and scales.shape[0] != rows and "block" in SCHEMES[scheme].granularities:
        options["granularity"] = "block"
    elif count % rows == 0 and cols % (count // rows) == 0:
        options["group_size"] = cols // (count // rows)
    else:
        options["granularity"] = "channel"
    return Command.build(**options).layer_spec()


def _integer(source: Source, name: str) -> StoredLayer:
    shape_name, scale_name, zero_name = (f"{name}_{each}" for each in ("shape", "scale", "zero_point"))
    for needed in (shape_name, scale_name):
        if needed not in source.tensors:
            raise _misfit(source, needed, "is missing beside its packed weight")
    shape = _array(source, shape_name)
    if shape.size != 2 or shape.min() < 1:
        raise _misfit(source, shape_name, "is no shape of a matrix")
    rows, cols = (int(extent) for extent in shape)
    packed = source.tensors[f"{name}_packed"]
    bits = packed.shape[-1] * 32 // cols if cols >= 32 else 32 * packed.shape[-1] // max(cols, 1)
    scheme = f"int{bits}"
    zeros_meta = source.tensors.get(zero_name)
    if scheme not in SCHEMES:
        raise _misfit(source, f"{name}_packed", f"would have {bits} bits a weight; expected 2 to 8")
    spec = _spec_of(scheme, source.tensors[scale_name], rows, cols, symmetric=zeros_meta is None)
    words = packed.nbytes // max(rows, 1)
    count = scale_count(spec, rows, cols)
    if packed.nbytes != rows * words or words != -(-cols * bits // 32) * 4 or _count(source, scale_name) != count:
        raise _misfit(source, name, f"does not fit {scheme} of shape {[rows, cols]}")
    parts = (f"{name}_packed", scale_name, shape_name, *((zero_name,) if zeros_meta else ()))

    def answer() -> pa.RecordBatch:
        data = np.frombuffer(source.load(f"{name}_packed").data, np.uint8)
        if bits == 8:
            data = np.ascontiguousarray(data.reshape(rows, words)[:, :cols]).reshape(-1) ^ np.uint8(0x80)
        zeros = None
        if zeros_meta is not None:
            zeros = _zeros(_array(source, zero_name), zeros_meta, rows, bits)
        return _answer(name, (rows, cols), data, _array(source, scale_name), zeros, spec)

    return StoredLayer(name, (rows, cols), spec, parts, answer)


def _zeros(values: npt.NDArray[Any], meta: TensorMeta, rows: int, bits: int) -> F32:
    """Zero points, which the library packs along the rows, but leaves a tensor's only one as it is."""
    if meta.dtype == "I8":
        return values.astype(np.float32)
    columns = np.ascontiguousarray(values.reshape(meta.shape).T).view(np.uint8)
    codes = (columns ^ 0x80).view(np.int8)[:, :rows] if bits == 8 else unpack(columns, rows, bits)
    return np.ascontiguousarray(codes.T).reshape(-1).astype(np.float32)


def _count(source: Source, name: str) -> int:
    return prod(source.tensors[name].shape)


def _float8(source: Source, name: str) -> StoredLayer:
    shape = source.tensors[name].shape
    rows, cols = matrix_shape(shape)
    spec = _spec_of("fp8_e4m3", source.tensors[f"{name}_scale"], rows, cols, symmetric=True)
    if _count(source, f"{name}_scale") != scale_count(spec, rows, cols):
        raise _misfit(source, f"{name}_scale", f"does not fit weights of shape {list(shape)}")

    def answer() -> pa.RecordBatch:
        data = np.frombuffer(source.load(name).data, np.uint8)
        return _answer(name, shape, data, _array(source, f"{name}_scale"), None, spec)

    return StoredLayer(name, shape, spec, (name, f"{name}_scale"), answer)


def _micro(source: Source, name: str) -> StoredLayer:
    """Floats of 4 or 8 bits in groups whose scales are powers of two (mx) or 8-bit floats (nvfp4)."""
    data_name = f"{name}_packed" if f"{name}_packed" in source.tensors else name
    scale_name, whole_name = f"{name}_scale", f"{name}_global_scale"
    meta, scales_meta = source.tensors[data_name], source.tensors.get(scale_name)
    if scales_meta is None:
        raise _misfit(source, scale_name, "is missing beside its packed weight")
    scheme = "nvfp4" if scales_meta.dtype == FLOAT8 else "mxfp8" if data_name == name else "mxfp4"
    spec = Command.build(scheme=scheme).layer_spec()
    parts = (data_name, scale_name, *((whole_name,) if spec.scheme.whole_scale else ()))
    if len(meta.shape) != 2 or (spec.scheme.whole_scale and source.tensors.get(whole_name) is None):
        raise _misfit(source, name, f"is no {scheme}: expected a matrix with {', '.join(parts[1:])}")
    rows, cols = meta.shape[0], meta.shape[1] * (8 // spec.scheme.bits)
    fits = scales_meta.dtype in ("U8", FLOAT8) and scales_meta.shape == (rows, cols // spec.group_size)
    if not fits or cols % spec.group_size or (spec.scheme.whole_scale and _count(source, whole_name) != 1):
        raise _misfit(source, scale_name, f"does not fit {scheme} of shape {[rows, cols]}")

    def answer() -> pa.RecordBatch:
        codes = np.frombuffer(source.load(scale_name).data, np.uint8)
        if spec.scheme.whole_scale:
            groups = float8.decode(codes, float8.FORMATS["fp8_e4m3"])
            scales = np.append(groups, _array(source, whole_name).astype(np.float32))
        else:
            scales = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
        return _answer(name, (rows, cols), np.frombuffer(source.load(data_name).data, np.uint8), scales, None, spec)

    return StoredLayer(name, (rows, cols), spec, parts, answer)


def _bitsandbytes(source: Source, name: str) -> StoredLayer:
    state_name = next((each for each in source.tensors if each.startswith(f"{name}.{STATE}")), None)
    nested = f"{name}.nested_absmax" in source.tensors
    if state_name is None:
        raise _misfit(source, name, "has no quant_state")
    try:
        state = json.loads(bytes(source.load(state_name).data))
        packing = NESTED if nested else None
        spec = Command.build(scheme=state["quant_type"], group_size=state["blocksize"], packing=packing).layer_spec()
        shape = tuple(int(extent) for extent in state["shape"])
        offset = np.array([state["nested_offset"] if nested else 0], np.float32)
        known = not nested or state["nested_blocksize"] == dynamic8.NESTED_BLOCK
    except (ValueError, KeyError, TypeError):
        raise _misfit(source, state_name, "is no quant_state") from None
    rows, cols = matrix_shape(shape)
    bytes_of = (name, f"{name}.absmax") if nested else (name,)
    floats = f"{name}.nested_absmax" if nested else f"{name}.absmax"
    given = sum(source.tensors[each].nbytes for each in bytes_of)
    counted = _count(source, floats) + nested == scale_count(spec, rows, cols)
    if not (known and counted) or given != packed_bytes(spec, rows, cols):
        raise _misfit(source, name, f"does not fit {spec.scheme.name} of shape {list(shape)}")
    more = (floats, f"{name}.nested_quant_map") if nested else ()
    parts = (name, f"{name}.absmax", f"{name}.quant_map", state_name, *more)

    def answer() -> pa.RecordBatch:
        data = np.concatenate([np.frombuffer(source.load(each).data, np.uint8) for each in bytes_of])
        scales = _array(source, floats)
        return _answer(name, shape, data, np.append(scales, offset) if nested else scales, None, spec)

    return StoredLayer(name, shape, spec, parts, answer)


def _gguf(source: Source, name: str) -> StoredLayer:
    meta = source.tensors[name]
    spec = Command.build(scheme=meta.dtype.lower(), packing="gguf").layer_spec()

    def answer() -> pa.RecordBatch:
        return _answer(name, meta.shape, np.frombuffer(source.load(name).data, np.uint8), None, None, spec)

    return StoredLayer(name, meta.shape, spec, (name,), answer)


_SHOWN = ("layer_name", "shape", "scheme", "group_size", "sqnr_db")
_HEAVY = ("quantized_data", "scales", "zero_points")


class AnswerSource(Source):
    """A Parquet or Arrow file of answers as float32 layers."""

    def __init__(self, path: str, data: Any) -> None:
        self.label = place(path).name
        self.metadata = {}
        self.tensors = {}
        self._data = data
        missing = [name for name in ("layer_name", "shape") if name not in data.schema.names]
        if missing:
            raise InvalidRequestError(f"{self.label} has no column {missing[0]!r}", field=missing[0])
        for batch in self._read(["layer_name", "shape"]):
            for name, shape in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                self._add(name, shape)
        self._held: Iterator[tuple[str, F32]] = iter(())

    def _add(self, name: Any, shape: Any) -> None:
        if not isinstance(name, str) or not name or name in self.tensors:
            problem = (
                f'layer "{name[:200]}" stands twice' if isinstance(name, str) and name else "a row has no layer name"
            )
            raise InvalidRequestError(
                f"in {self.label} {problem}; expected one row for each whole layer", field="layer_name"
            )
        if not isinstance(shape, list) or not all(isinstance(extent, int) and extent >= 0 for extent in shape):
            raise InvalidRequestError(f'layer "{name[:200]}" of {self.label} has the shape {shape}', field="shape")
        self.tensors[name] = TensorMeta("F32", tuple(shape), 4 * prod(shape))

    def _read(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Rows, one after the other; of these columns those that there are."""
        known = [name for name in columns if name in self._data.schema.names]
        batches: Iterator[pa.RecordBatch] = self._data.to_batches(columns=known, batch_size=1, batch_readahead=1)
        return batches

    def rows(self) -> Iterator[dict[str, Any]]:
        """What inspects a row: its name, shape, scheme, group size, bytes, and ratio of signal to noise in dB."""
        for batch in self._read([*_SHOWN, *_HEAVY]):
            for row in range(batch.num_rows):
                cells = {name: batch.column(name)[row] for name in batch.schema.names}
                heavy = [cells.pop(name) for name in _HEAVY if name in cells]
                nbytes = sum(len(cell.as_buffer()) if isinstance(cell, pa.BinaryScalar) else cell.values.nbytes
                             for cell in heavy if cell.is_valid)  # fmt: skip
                shown = {name: cells[name].as_py() if name in cells else None for name in _SHOWN}
                yield shown | {"nbytes": nbytes}

    def _all(self) -> Iterator[tuple[str, F32]]:
        columns = ["layer_name", "shape", "status", "error", "scheme", "packing", "bit_width", "group_size",
                   "quantized_data", "scales", "zero_points", "row_offset"]  # fmt: skip
        from flightquant import dequantize

        for batch in self._read(columns):
            yield from dequantize(batch).items()

    def load(self, name: str) -> Tensor:
        """One layer, dequantized; going back reads from the beginning."""
        for again in (False, True):
            self._held = self._all() if again else self._held
            for found, weights in self._held:
                if found == name:
                    return Tensor(name, self.tensors[name], _as(weights, "F32"))
        raise KeyError(name)


def open_dequantized(path: str, dtype: str = "F32") -> Source:
    """Any model, quantized or not, with its weights as floats.

    Raises
    ------
    InvalidRequestError
        What is in the file does not fit together.
    OSError
        It cannot be read.
    """
    from flightquant.client.sources import open_source

    return open_answers(path) or DequantizedSource(open_source(path), dtype)


def open_answers(path: str) -> AnswerSource | None:
    """A Parquet or Arrow file of answers; None of anything else.

    Raises
    ------
    OSError
        It cannot be read.
    """
    where = place(path)
    if Path(where.path).suffix not in (".parquet", ".arrow", ".feather"):
        return None
    import pyarrow.dataset as ds

    where.info()
    kind = "parquet" if where.path.endswith(".parquet") else "ipc"
    data = ds.dataset(where.path, filesystem=where.filesystem, format=kind)
    return AnswerSource(path, data) if "quantized_data" in data.schema.names else None
