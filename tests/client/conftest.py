"""A server in a few lines: answers by the NumPy reference, with faults that a test can switch on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from flightquant import reference, wire
from flightquant.errors import FlightquantError, LayerError
from flightquant.reference import quality
from flightquant.spec import OVERRIDE_KEYS, Command


@dataclass
class Faults:
    """What goes wrong, in how many first calls (None: in all), and what was seen."""

    calls: int | None = None

    close_after: int | None = None
    no_end: bool = False
    end_rows: int = 0
    drop_row: bool = False
    extra_batch: bool = False
    unknown_message: bool = False
    contract: str = "1"
    fail_after: tuple[int, Exception] | None = None
    read_first: int = 0
    hang_after: int | None = None
    released: Event = field(default_factory=Event)
    received: list[tuple[int, int]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    seen: int = 0


def answer_row(batch: pa.RecordBatch, row: int, command: Command, dtype: str) -> tuple[dict[str, Any], Any]:
    """The contract's answer to one request row, and its quality sums."""
    given = {n: batch.column(n)[row].as_py() for n in OVERRIDE_KEYS if n in batch.schema.names}
    spec = command.override({k: v for k, v in given.items() if v is not None}).layer_spec()
    values = batch.column("weights")[row].values
    if pa.types.is_fixed_size_binary(values.type):
        data = np.frombuffer(values.buffers()[1], np.uint16, len(values), values.offset * 2)
    else:
        data = values.to_numpy(zero_copy_only=True)
    names = batch.schema.names
    shape = batch.column("shape")[row].as_py() if "shape" in names else [data.size]
    amax = batch.column("global_amax")[row].as_py() if "global_amax" in names else None
    rows, cols = reference.matrix_shape(tuple(shape))
    known = {
        "layer_name": batch.column("layer_name")[row].as_py(),
        "shape": shape,
        "row_offset": batch.column("row_offset")[row].as_py() if "row_offset" in names else None,
        "status": "ok",
        "scheme": spec.scheme.name,
        "packing": spec.scheme.packing,
        "bit_width": spec.scheme.bits,
        "group_size": spec.group_size,
        "scale_dtype": spec.scale_dtype_for(dtype),
        "kernel_ns": 1000,
        "bytes_in": data.nbytes,
        "bytes_out": 0,
        "bytes_copied": 0,
    }
    known |= {f"{n}": batch.column(n)[row].as_py() for n in names if n.startswith("x_")}
    if data.size == 0:
        return known | {"quantized_data": b"", "scales": [], "zero_points": []}, np.zeros(4)
    try:
        layer = reference.quantize(data.reshape(rows, cols), spec, dtype, amax, measure=command.metrics)
    except LayerError as error:
        return known | {"status": error.status, "error": error.message}, np.zeros(4)
    known |= {
        "quantized_data": layer.data.tobytes(),
        "scales": layer.scales,
        "zero_points": layer.zero_points,
        "bytes_out": layer.data.nbytes + sum(a.nbytes for a in (layer.scales, layer.zero_points) if a is not None),
    }
    if command.metrics:
        names = ("sqnr_db", "cosine", "max_abs_error")
        known |= {name: column[0] for name, column in zip(names, quality.columns(layer.sums), strict=True)}
    return known, layer.sums


def answer_batch(batch: pa.RecordBatch, command: Command) -> tuple[pa.RecordBatch, np.ndarray]:
    dtype = wire.check_request_schema(batch.schema)
    answered = [answer_row(batch, i, command, dtype) for i in range(batch.num_rows)]
    schema = wire.answer_schema(batch.schema)
    columns = [pa.array([row.get(f.name) for row, _ in answered], f.type) for f in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema), np.array([sums for _, sums in answered])


class HeaderFactory(flight.ServerMiddlewareFactory):
    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def start_call(self, info: Any, headers: Any) -> None:
        self.seen.extend(headers)


class ReferenceServer(flight.FlightServerBase):
    """Quantizes by the reference; see :class:`Faults` for what it can do wrong."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        super().__init__("grpc://127.0.0.1:0", middleware={"headers": HeaderFactory(self.faults.headers)})

    @property
    def uri(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        try:
            self._exchange(descriptor, reader, writer)
        except FlightquantError as error:
            raise flight.FlightServerError(error.wire_message(), extra_info=json.dumps(error.to_json())) from None

    def _exchange(self, descriptor: Any, reader: Any, writer: Any) -> None:
        faults, end = self.faults, wire.EndMessage()
        faults.seen += 1
        if faults.calls is not None and faults.seen > faults.calls:
            faults = Faults(received=faults.received)
        command = Command.parse(descriptor.command)
        metadata = {"flightquant.contract": faults.contract}
        writer.begin(wire.answer_schema(reader.schema).with_metadata(metadata))
        queued = [reader.read_chunk().data for _ in range(faults.read_first)]
        while True:
            if faults.hang_after == end.batches:
                faults.released.wait(60)
            if faults.close_after == end.batches:
                return
            if faults.fail_after and faults.fail_after[0] == end.batches:
                raise faults.fail_after[1]
            try:
                batch = queued.pop(0) if queued else reader.read_chunk().data
            except StopIteration:
                break
            faults.received.append((batch.num_rows, sum(map(len, batch.column("weights").to_pylist()))))
            answer, sums = answer_batch(batch, command)
            end.rows += batch.num_rows
            end.batches += 1
            if faults.drop_row:
                answer = answer.slice(1)
            for _ in range(2 if faults.extra_batch else 1):
                writer.write_with_metadata(answer, sums.tobytes())
        if faults.unknown_message:
            writer.write_metadata(b"{}")
        end.rows += faults.end_rows
        if not faults.no_end:
            writer.write_metadata(end.to_json())


@pytest.fixture
def serve() -> Iterator[Callable[[Faults | None], ReferenceServer]]:
    """Start reference servers that end with the test."""
    servers: list[ReferenceServer] = []

    def start(faults: Faults | None = None) -> ReferenceServer:
        servers.append(ReferenceServer(faults))
        return servers[-1]

    yield start
    for server in servers:
        server.faults.released.set()
        server.shutdown()


@pytest.fixture
def faults() -> type[Faults]:
    return Faults
