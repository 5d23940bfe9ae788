"""A stream of any length needs the memory of the batches in flight, not of the model."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from fq_flight import Reply, exchange, open_exchange
from fq_process import server_process
from fq_testing import request
from pyarrow import flight

from flightquant.server import heap

BATCH_BYTES = 16 << 20
COMMAND = {"scheme": "int4", "group_size": 128}


@pytest.mark.parametrize("volume", [512 << 20, pytest.param(4 << 30, marks=pytest.mark.slow)], ids=["512 MiB", "4 GiB"])
def test_growth_while_streaming(volume: int) -> None:
    """Under 256 MiB over idle, whatever the volume; nothing is left of it in Arrow's pool."""
    weights = np.random.default_rng(0).standard_normal((1024, BATCH_BYTES // 4096), np.float32)
    batch = request({"layer": weights})
    with server_process(env={heap.VARIABLE: None}) as server, flight.connect(server.location) as client:
        process = psutil.Process(server.process.pid)
        exchange(client, COMMAND, [request({"a": np.ones((1, 128), np.float32)})])
        idle = process.memory_info().rss
        peak = idle
        reply = Reply()
        with open_exchange(client, COMMAND, batch.schema) as (writer, reader):

            def write() -> None:
                for _ in range(volume // BATCH_BYTES):
                    writer.write_batch(batch)
                writer.done_writing()

            thread = threading.Thread(target=write)
            thread.start()
            while reply.end is None:
                reply.take(reader.read_chunk())
                reply.batches.clear()
                peak = max(peak, process.memory_info().rss)
            thread.join()
        assert reply.end["bytes_in"] == volume
        growth = peak - idle
        print(f"growth over idle: {growth / 2**20:.0f} MiB")  # noqa: T201
        assert growth < 256 << 20


@pytest.mark.parametrize(
    ("given", "found"), [(None, heap.TUNABLES.split(":")[0]), ("glibc.malloc.arena_max=3", "glibc.malloc.arena_max=3")]
)
def test_the_process_sets_up_its_heap_unless_its_operator_has(given: str | None, found: str) -> None:
    with server_process(env={heap.VARIABLE: given}) as server:
        # glibc cuts the rest of the variable off once it has read it.
        assert psutil.Process(server.process.pid).environ()[heap.VARIABLE].split(":")[0] == found


def test_glibc_knows_the_settings() -> None:
    """With a misspelt name or a value out of range it would go on without a word."""
    loader = next(Path("/").glob("lib*/ld-linux-*.so.*"))
    listed = subprocess.run(
        [loader, "--list-tunables"], env={heap.VARIABLE: heap.TUNABLES}, check=True, capture_output=True, text=True
    ).stdout
    for entry in heap.TUNABLES.split(":"):
        name, value = entry.split("=")
        assert f"\n{name}: {int(value):#x} " in listed
