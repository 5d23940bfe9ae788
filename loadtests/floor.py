"""A Flight server that answers right without computing: every batch is quantized once, later ones get that answer.

The same traffic as the service's, so that what the service adds is the difference. Run by run.py; prints its address.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flightquant.cython_core.engine import Engine
from flightquant.server.heap import tune_heap
from flightquant.spec import Command
from flightquant.wire import EndMessage


class Floor(flight.FlightServerBase):  # type: ignore[misc]
    """Knows an answer by the first layer's name: the mixes never use one name for two contents."""

    def __init__(self, location: str) -> None:
        self._engine = Engine(1)
        self._known: dict[tuple[bytes, str], pa.RecordBatch] = {}
        super().__init__(location)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """One exchange."""
        session = self._engine.session(reader.schema, Command.parse(descriptor.command))
        writer.begin(session.schema)
        end = EndMessage()
        for chunk in reader:
            key = descriptor.command, chunk.data.column("layer_name")[0].as_py()
            if key not in self._known:
                self._known[key] = session.quantize(chunk.data).batch
            writer.write_batch(self._known[key])
            end.rows += chunk.data.num_rows
        writer.write_metadata(end.to_json())


if __name__ == "__main__":
    tune_heap()
    server = Floor("grpc://127.0.0.1:0")
    print(json.dumps({"flight": f"grpc://127.0.0.1:{server.port}"}), flush=True)
    sys.stdin.read()
    os._exit(0)
