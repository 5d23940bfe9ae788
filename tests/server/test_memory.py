"""A stream of any length needs the memory of the batches in flight, not of the model."""

from __future__ import annotations

import threading

import numpy as np
import psutil
import pytest
from fq_flight import Reply, exchange, open_exchange
from fq_process import server_process
from fq_testing import request
from pyarrow import flight

BATCH_BYTES = 16 << 20
COMMAND = {"scheme": "int4", "group_size": 128}


@pytest.mark.parametrize("volume", [512 << 20, pytest.param(4 << 30, marks=pytest.mark.slow)], ids=["512 MiB", "4 GiB"])
def test_growth_while_streaming(volume: int) -> None:
    """Under 256 MiB over idle, whatever the volume; nothing is left of it in Arrow's pool."""
    weights = np.random.default_rng(0).standard_normal((1024, BATCH_BYTES // 4096), np.float32)
    batch = request({"layer": weights})
    with server_process(env={"MALLOC_ARENA_MAX": None}) as server, flight.connect(server.location) as client:
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


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("3", "3")])
def test_the_process_has_one_heap_unless_its_operator_wants_more(given: str | None, found: str) -> None:
    with server_process(env={"MALLOC_ARENA_MAX": given}) as server:
        assert psutil.Process(server.process.pid).environ()["MALLOC_ARENA_MAX"] == found
