"""How soon the kernels stop when a client leaves: ``python tests/fq_cancellation.py [SCHEME ...]``.

For each scheme a server is sent one layer of 1 GiB; when its kernels have been at work for a tenth of a second the
client cancels the call. Prints the milliseconds from there until the server's threads rested: used no more than a tenth
of a processor for 0.3 s. As a control, the same without the cancellation.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
from fq_process import ServerProcess, server_process
from pyarrow import flight

ROWS, COLUMNS = 65_536, 4096
QUIET_S, QUIET_SHARE, POLL_S, WORKING_S = 0.3, 0.1, 0.002, 0.1
LIMITS = ("--max-layer-bytes", str(2 << 30), "--max-batch-bytes", str(2 << 30))


def cpu_ns(pid: int) -> int:
    """Nanoseconds that the process's threads have run."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def computing(server: ServerProcess) -> bool:
    """Whether a batch is in the engine."""
    with urllib.request.urlopen(server.ready["metrics"], timeout=30) as page:
        return b"\nflightquant_engine_batches 1.0" in page.read()


def quiet_after(pid: int) -> float:
    """Seconds until the process rests."""
    started = quiet_since = time.perf_counter()
    used = cpu_ns(pid)
    while time.perf_counter() - quiet_since < QUIET_S:
        time.sleep(POLL_S)
        now, more = time.perf_counter(), cpu_ns(pid)
        if more - used > QUIET_SHARE * 1e9 * (now - quiet_since):
            quiet_since, used = now, more
    return quiet_since - started


def measure(server: ServerProcess, scheme: str, batch: pa.RecordBatch, cancel: bool = True) -> float:
    """Seconds from the cancellation, or from where it would be, to the rest."""
    descriptor = flight.FlightDescriptor.for_command(json.dumps({"scheme": scheme}).encode())
    with flight.connect(server.location) as client:
        writer, reader = client.do_exchange(descriptor, flight.FlightCallOptions(timeout=300))
        writer.begin(batch.schema)

        def write() -> None:
            with suppress(pa.ArrowException, OSError):
                writer.write_batch(batch)

        thread = threading.Thread(target=write)
        thread.start()
        while not computing(server):
            time.sleep(0.005)
        time.sleep(WORKING_S)
        if cancel:
            reader.cancel()
        found = quiet_after(server.process.pid)
        reader.cancel()
        thread.join()
    return found


def main() -> None:
    """The command."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(ROWS * COLUMNS, dtype=np.float32)
    offsets = pa.py_buffer(np.array([0, weights.size], np.int32))
    layer = pa.Array.from_buffers(
        pa.list_(pa.float32()), 1, [None, offsets], children=[pa.array(weights, pa.float32())]
    )
    shape = pa.array([[ROWS, COLUMNS]], pa.list_(pa.int64()))
    batch = pa.record_batch({"layer_name": ["w"], "weights": layer, "shape": shape})
    with server_process(*LIMITS) as server:
        for scheme in sys.argv[1:] or ["int8", "nf4", "q6_k", "q4_k", "iq4_nl"]:
            found = sorted(measure(server, scheme, batch) for _ in range(5))
            line = " ".join(f"{1e3 * value:.0f}" for value in found)
            control = measure(server, scheme, batch, cancel=False)
            sys.stdout.write(f"{scheme}: {line} ms; not cancelled {1e3 * control:.0f} ms\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
