"""Parquet and Arrow IPC files: one row for each layer, with the contract's answer columns."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flightquant.client.sinks.base import Sink
from flightquant.client.sources import Tensor
from flightquant.wire import answer_schema


class TableSink(Sink):
    """A table of answers. Tensors that are not quantized are not in it.

    Each row goes to a file of its own first, since neither format can be gone on with once its writer is gone;
    the table is made of them at the end, in the source's order, a row group or batch for each layer.
    """

    def _begin(self) -> None:
        self._schema = answer_schema(pa.schema([]))
        self._rows = self._work.folder / "rows"
        self._rows.mkdir(exist_ok=True)
        self._numbers = {name: number for number, name in enumerate(self.plan.commands)}

    @property
    def kept(self) -> list[str]:
        """None: the table holds the quantized layers alone."""
        return []

    def _path(self, name: str) -> str:
        return str(self._rows / f"{self._numbers[name]}.arrow")

    def _write_row(self, batch: pa.RecordBatch, row: int, name: str) -> int:
        single = batch.slice(row, 1).select(self._schema.names).replace_schema_metadata(self._schema.metadata)
        with pa.OSFile(self._path(name), "wb") as file, pa.ipc.new_file(file, self._schema) as writer:
            writer.write_batch(single)
        return int(batch.column("bytes_out")[row].as_py())

    def _write_kept(self, tensor: Tensor, first: int, data: Any) -> None:
        raise AssertionError(f"{tensor.name} has no row")  # kept is empty

    def _finish(self) -> None:
        path = str(self._work.output)
        if self.plan.target == "parquet":
            with pq.ParquetWriter(path, self._schema) as writer:
                self._fill(writer)
        else:
            with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, self._schema) as writer:
                self._fill(writer)

    def _fill(self, writer: Any) -> None:
        for name in self._numbers:
            with pa.memory_map(self._path(name)) as file:
                writer.write_batch(pa.ipc.open_file(file).get_batch(0))

    def _close(self) -> None:
        """Nothing is open between two rows."""
