"""Arrow data as a source: tables, streams, Parquet and Arrow IPC files, data sets. Rows have the request columns."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flightquant import wire
from flightquant.client.safetensors import FLOATS, give_back
from flightquant.client.sources.base import Source, Tensor, TensorMeta
from flightquant.client.sources.places import Place
from flightquant.errors import InvalidRequestError, shown
from flightquant.layers import as_reader

_CODES = {dtype: code for code, dtype in FLOATS.items()}
_COLUMNS = ("layer_name", "weights", "shape")
_TEXTS = (pa.utf8(), pa.large_utf8(), pa.string_view())


class _Run(ABC):
    """Rows that are read in one go, again and again: a row group, a record batch, a scan.

    ``name`` is the layer's where the path says it and not a column (a data set partitioned by ``layer_name``).
    """

    name: str | None = None
    schema: pa.Schema

    @abstractmethod
    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows in order, few at a time, as nobody has checked them."""

    def checked(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows in order, of which every offset and length fits: a file may hold anything.

        Raises
        ------
        InvalidRequestError
            They break Arrow's own rules or cannot be decoded.
        """
        batches = self.batches(columns)
        while True:
            with readable("the rows cannot be read"):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)
            yield batch

    def release(self, batch: pa.RecordBatch) -> None:  # noqa: B027 - most have nothing to give up
        """Give up the memory of a batch, if it can be read again."""


@contextlib.contextmanager
def readable(problem: str) -> Iterator[None]:
    """What Arrow says of bytes that it cannot read becomes the caller's mistake; what the system says stays."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InvalidRequestError(f"{problem}: {str(error)[:200]}") from None


class _Held(_Run):
    """A batch in memory."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self.schema = batch.schema

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield self._batch.select(columns)


class _RowGroup(_Run):
    """One row group of a Parquet file, decoded a row at a time."""

    def __init__(self, file: Any, group: int, name: str | None) -> None:
        self._file = file
        self._group = group
        self.schema = file.schema_arrow
        self.name = name

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(1, row_groups=[self._group], columns=columns, use_threads=False)


class _Stored(_Run):
    """One record batch of an Arrow IPC file, in the file's memory map."""

    def __init__(self, file: _Mapped, number: int, name: str | None) -> None:
        self._file = file
        self._number = number
        self.schema = file.reader.schema
        self.name = name

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield self._file.reader.get_batch(self._number).select(columns)

    def release(self, batch: pa.RecordBatch) -> None:
        self._file.release(batch)


class _Mapped:
    """An Arrow IPC file: a local one mapped, so that its pages can be given back; another read batch by batch."""

    def __init__(self, place: Place) -> None:
        self._map: mmap.mmap | None = None
        if place.local is None:
            file = place.open()
        else:
            with place.local.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            file = pa.BufferReader(pa.py_buffer(self._map))
        try:
            self.reader = pa.ipc.open_file(file)
        except pa.ArrowException as error:
            raise InvalidRequestError(f"{place.name} is no good Arrow file: {str(error)[:200]}") from None

    def release(self, batch: pa.RecordBatch) -> None:
        if self._map is None:
            return
        base = np.frombuffer(self._map, np.uint8).ctypes.data
        for buffer in (each for column in batch.columns for each in column.buffers() if each is not None):
            first = buffer.address - base
            if first >= 0 and first + buffer.size <= len(self._map):
                give_back(self._map, first, first + buffer.size)


class _Scan(_Run):
    """A scan of a data set, which may be filtered."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.schema = dataset.schema

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self._dataset.to_batches(
            columns=columns, batch_size=1, batch_readahead=1, fragment_readahead=1, use_threads=False
        )


class TableSource(Source):
    """Layers as rows.

    Raises
    ------
    InvalidRequestError
        The columns are not the contract's request columns, a name is null or stands twice, a shape does not fit.
    """

    def __init__(self, label: str, runs: list[_Run], held: Any = None) -> None:
        self.label = label
        self.metadata = {}
        self.tensors = {}
        self._runs = runs
        self._open = held
        self._rows: dict[str, tuple[int, int]] = {}
        self._at: tuple[int, int, pa.RecordBatch, Iterator[pa.RecordBatch]] | None = None
        for number, run in enumerate(runs):
            self._index(number, run)

    def _index(self, number: int, run: _Run) -> None:
        with readable("the columns cannot be read"):
            dtype = self._check(run)
        has_shape = "shape" in run.schema.names
        columns = [name for name in _COLUMNS if name in run.schema.names and (name != "weights" or not has_shape)]
        row = 0
        for batch in run.checked(columns):
            names = batch.column("layer_name").to_pylist() if run.name is None else [run.name] * batch.num_rows
            shapes = batch.column("shape") if has_shape else pc.list_value_length(batch.column("weights"))
            for name, shape in zip(names, shapes.to_pylist(), strict=True):
                self._add(name, shape if has_shape else [shape], dtype, (number, row))
                row += 1

    def _check(self, run: _Run) -> str:
        names = run.schema.names
        if "quantized_data" in names:
            raise InvalidRequestError(f"{self.label} holds quantized layers already; flightquant dequantize reads them")
        for name in ("layer_name", "weights"):
            if name not in names and not (name == "layer_name" and run.name is not None):
                raise InvalidRequestError(
                    f'{self.label} has no column "{name}"; expected layer_name, weights and shape', field=name
                )
        kind = run.schema.field("layer_name").type if "layer_name" in names else pa.utf8()
        if not any(map(kind.equals, _TEXTS)) and not pa.types.is_dictionary(kind):
            # A column of nulls may have 2^62 rows in no bytes.
            raise InvalidRequestError(f"in {self.label} layer_name is {kind}; expected text", field="layer_name")
        return wire.weights_dtype(run.schema.field("weights"))

    def _add(self, name: str | None, shape: list[int | None] | None, dtype: str, at: tuple[int, int]) -> None:
        if not name or name in self._rows:
            problem = f'layer "{name[:200]}" stands twice' if name else "a layer has no name"
            raise InvalidRequestError(f"in {self.label} {problem}; expected one row for each layer", field="layer_name")
        good = isinstance(shape, list) and all(isinstance(extent, int) and extent >= 0 for extent in shape)
        if not good or shape is None or prod(extent or 0 for extent in shape) >= 2**63:
            raise InvalidRequestError(f'layer "{name[:200]}" has the shape {shown(shape)}', field="shape", got=shape)
        extents = tuple(int(extent) for extent in shape if extent is not None)
        itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
        self.tensors[name] = TensorMeta(_CODES[dtype], extents, prod(extents) * itemsize)
        self._rows[name] = at

    def load(self, name: str) -> Tensor:
        """One layer's row; rows are passed over until it comes."""
        number, row = self._rows[name]
        columns = ["weights"]
        if self._at is None or self._at[0] != number or self._at[1] > row:
            batches = self._runs[number].checked(columns)
            self._at = (number, 0, next(batches), batches)
        _, first, batch, batches = self._at
        while row >= first + batch.num_rows:
            first += batch.num_rows
            batch = next(batches)
        self._at = (number, first, batch, batches)
        meta = self.tensors[name]
        data = _values(batch.column("weights")[row - first], name)
        if data.nbytes != meta.nbytes:
            got = data.nbytes * prod(meta.shape) // meta.nbytes if meta.nbytes else data.nbytes
            raise InvalidRequestError(
                f'layer "{name}" of shape {list(meta.shape)} has {got} weights; expected {prod(meta.shape)}',
                field="shape",
            )
        return Tensor(name, meta, data)

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give back what can be read again."""
        if self._at is not None:
            self._runs[self._at[0]].release(self._at[2])

    def close(self) -> None:
        """Close the file, delete the temporary one."""
        self._at = None
        self._runs = []
        if self._open is not None:
            self._open.close()


def _values(cell: Any, name: str) -> Any:
    """The bytes of one cell of a list column."""
    if not cell.is_valid or cell.values.null_count:
        raise InvalidRequestError(f'layer "{name}" has null weights; expected numbers', field="weights")
    values = cell.values
    width = values.type.bit_width // 8
    if len(values) == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(values.buffers()[1], np.uint8, len(values) * width, values.offset * width)


def open_arrow(thing: Any) -> TableSource:
    """A table, a batch, a data set, or a stream, which goes through a temporary file because it can be read only once.

    Raises
    ------
    InvalidRequestError
        It is none of these.
    """
    label = f"the {type(thing).__name__}"
    if isinstance(thing, pa.RecordBatch):
        return TableSource(label, [_Held(thing)])
    if isinstance(thing, pa.Table):
        return TableSource(label, [_Held(batch) for batch in thing.to_batches()])
    if hasattr(thing, "to_batches") and hasattr(thing, "scanner"):
        return TableSource(label, [_Scan(thing)])
    reader = as_reader(thing)
    spool = tempfile.NamedTemporaryFile(suffix=".arrow")  # noqa: SIM115 - closed by the source
    try:
        with pa.ipc.new_file(spool, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)
        spool.flush()
        where = Path(spool.name)
        file = _Mapped(Place(None, str(where), label, where))
        return TableSource(label, _stored(file, None), spool)
    except BaseException:
        spool.close()
        raise


def _stored(file: _Mapped, name: str | None) -> list[_Run]:
    return [_Stored(file, number, name) for number in range(file.reader.num_record_batches)]


class FileTableSource(TableSource):
    """Parquet or Arrow IPC files, one or a partitioned folder of them."""

    def __init__(self, place: Place, kind: str) -> None:
        import pyarrow.dataset as ds

        self._infos: list[Any] = []
        runs: list[_Run] = []
        stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo, readable(f"{place.name} is no good {kind} file"):
            undo.callback(stack.close)
            whole = ds.dataset(place.path, filesystem=place.filesystem, format=kind, partitioning="hive")
            for fragment in whole.get_fragments():
                self._infos.append(place.filesystem.get_file_info(fragment.path))
                keys = ds.get_partition_keys(fragment.partition_expression)
                name = keys.get("layer_name")
                runs += _file_runs(place, fragment.path, kind, None if name is None else str(name), stack)
            undo.pop_all()
        super().__init__(place.name, runs, stack)

    def fingerprint(self) -> list[Any]:
        """Paths, sizes and times of the files."""
        return [[info.path, info.size, info.mtime_ns] for info in self._infos]


def _file_runs(place: Place, path: str, kind: str, name: str | None, stack: contextlib.ExitStack) -> list[_Run]:
    each = Place(place.filesystem, path, path, Path(path) if place.local else None)
    if kind == "ipc":
        return _stored(_Mapped(each), name)
    import pyarrow.parquet as pq

    file = stack.enter_context(pq.ParquetFile(each.open(), pre_buffer=False, buffer_size=1 << 20))
    return [_RowGroup(file, group, name) for group in range(file.num_row_groups)]
