"""A Flight server that reads what the service reads and writes what it writes, but computes nothing.

The floor of an exchange: every answer batch has the bytes of a real one, taken from memory that never changes. Run by
``exchange``; prints its address.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flightquant.cython_core.engine import Engine
from flightquant.spec import Command
from flightquant.wire import EndMessage


class SameSizes(flight.FlightServerBase):  # type: ignore[misc]
    """Answers the first batch of a shape with the engine, and every later one with the same answer again."""

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """One exchange."""
        session = Engine(1).session(reader.schema, Command.parse(descriptor.command))
        writer.begin(session.schema)
        known: dict[int, pa.RecordBatch] = {}
        end = EndMessage()
        for chunk in reader:
            size = len(chunk.data.column("weights").values)
            if size not in known:
                known[size] = session.quantize(chunk.data).batch
            writer.write_batch(known[size])
            end.rows += chunk.data.num_rows
        writer.write_metadata(end.to_json())


if __name__ == "__main__":
    server = SameSizes("grpc://127.0.0.1:0")
    print(json.dumps({"flight": f"grpc://127.0.0.1:{server.port}"}), flush=True)
    sys.stdin.read()
    os._exit(0)
