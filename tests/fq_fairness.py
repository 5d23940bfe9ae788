"""How long a small layer takes beside what others do: ``python tests/fq_fairness.py [SCHEME] [SECONDS]``.

One stream sends layers of 4 KiB, one after the other, for SECONDS: alone; while another process sends layers of 1 GiB
again and again, in one message each, then in parts as this project's client sends them; while a hundred clients that
write as fast as they may and read one answer of 256 KiB a second come; when their streams are full, in turns with
seconds in which their process is halted; and alone again.
Prints the milliseconds of the small layers' round trips, and the share of a CPU that the server and the others took
meanwhile: the hundred have the lowest priority, since on their own machines they would take nothing of the server's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fq_process import server_process
from pyarrow import flight

from flightquant.client import QuantClient

ROWS, COLUMNS = 65_536, 4096
PAUSE_S = 0.001
LIMITS = ("--max-layer-bytes", str(2 << 30), "--max-batch-bytes", str(2 << 30))
SLOW, SLOW_WEIGHTS, SLOW_S = 100, 1 << 18, 1.0
FILL_S = 20.0


def batch_of(weights: npt.NDArray[np.float32]) -> pa.RecordBatch:
    """One layer, without a copy."""
    offsets = pa.py_buffer(np.array([0, weights.size], np.int32))
    values = pa.array(weights.reshape(-1), pa.float32())
    layer = pa.Array.from_buffers(pa.list_(pa.float32()), 1, [None, offsets], children=[values])
    return pa.record_batch({"layer_name": ["w"], "weights": layer, "shape": pa.array([weights.shape])})


def descriptor(scheme: str) -> flight.FlightDescriptor:
    """A command of this scheme."""
    return flight.FlightDescriptor.for_command(json.dumps({"scheme": scheme}).encode())


def send_large(location: str, scheme: str, how: str) -> None:
    """Send a layer of 1 GiB for ever; a line for each that was answered."""
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    batch = batch_of(weights)
    while True:
        if how == "whole":
            with flight.connect(location) as client:
                writer, reader = client.do_exchange(descriptor(scheme))
                writer.begin(batch.schema)
                writer.write_batch(batch)
                reader.read_chunk()
                writer.close()
        else:
            with QuantClient(location) as ours:
                ours.quantize({"w": weights}, scheme)
        sys.stdout.write("answered\n")
        sys.stdout.flush()


def read_slowly(location: str, scheme: str) -> None:
    """Write for ever, and read an answer now and then."""
    batch = batch_of(np.ones((1, SLOW_WEIGHTS), np.float32))
    with flight.connect(location) as client, suppress(pa.ArrowException, StopIteration):
        writer, reader = client.do_exchange(descriptor(scheme))
        writer.begin(batch.schema)

        def write() -> None:
            with suppress(pa.ArrowException):
                while True:
                    writer.write_batch(batch)

        threading.Thread(target=write, daemon=True).start()
        while True:
            reader.read_chunk()
            time.sleep(SLOW_S)


def be_slow(location: str, scheme: str) -> None:
    """A hundred of them."""
    os.nice(19)
    threads = [threading.Thread(target=read_slowly, args=(location, scheme)) for _ in range(SLOW)]
    for thread in threads:
        thread.start()
    sys.stdout.write("here\n")
    sys.stdout.flush()
    for thread in threads:
        thread.join()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process until now."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def round_trips(location: str, scheme: str, seconds: float) -> list[float]:
    """Milliseconds of a layer of 4 KiB, sent again and again over one stream."""
    batch = batch_of(np.random.default_rng(1).standard_normal((8, 128), dtype=np.float32))
    found = []
    with flight.connect(location) as client:
        writer, reader = client.do_exchange(descriptor(scheme))
        writer.begin(batch.schema)
        until = time.perf_counter() + seconds
        while (started := time.perf_counter()) < until:
            writer.write_batch(batch)
            reader.read_chunk()
            found.append(1e3 * (time.perf_counter() - started))
            time.sleep(PAUSE_S)
        writer.close()
    return found


@contextmanager
def others(*arguments: str) -> Iterator[tuple[int, list[str]]]:
    """Others in a process of their own, from its first line on: its number, and the lines that it prints."""
    lines: list[str] = []
    with subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout
        assert out is not None
        out.readline()
        thread = threading.Thread(target=lambda: lines.extend(out))
        thread.start()
        try:
            yield process.pid, lines
        finally:
            process.kill()
            thread.join()


def measure(what: str, location: str, scheme: str, seconds: float, server: int, beside: int | None = None) -> None:
    """One line of the outcome; ``server`` and ``beside`` are the processes whose CPU time is told."""
    pids = [server] if beside is None else [server, beside]
    before = [cpu_seconds(pid) for pid in pids]
    found = round_trips(location, scheme, seconds)
    shares = [f"{(cpu_seconds(pid) - then) / seconds:.2f}" for pid, then in zip(pids, before, strict=True)]
    tell(what, found)
    sys.stdout.write(f"  CPUs of the server and the others: {', '.join(shares)}\n")
    sys.stdout.flush()


def in_turns(location: str, scheme: str, seconds: float, other: int) -> None:
    """A second beside a process, a second while it is halted, and so on: the same machine and server for both."""
    running, halted = [], []
    for _ in range(int(seconds)):
        running += round_trips(location, scheme, 1)
        os.kill(other, signal.SIGSTOP)
        halted += round_trips(location, scheme, 1)
        os.kill(other, signal.SIGCONT)
    tell(f"beside {SLOW} slow readers", running)
    tell(f"beside {SLOW} that are halted, in turns with it", halted)


def tell(what: str, found: list[float]) -> None:
    """One line of the outcome."""
    p50, p99 = np.percentile(found, [50, 99])
    sys.stdout.write(f"{what}: {len(found)} layers, p50 {p50:.2f}, p99 {p99:.1f}, longest {max(found):.0f} ms\n")
    sys.stdout.flush()


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["--large"]:
        send_large(*sys.argv[2:])
    if sys.argv[1:2] == ["--slow"]:
        be_slow(*sys.argv[2:])
        return
    scheme = sys.argv[1] if len(sys.argv) > 1 else "int4"
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    with server_process(*LIMITS) as server:
        location, pid = server.location, server.process.pid
        measure("alone", location, scheme, seconds, pid)
        for how in ("whole", "parts"):
            with others("--large", location, scheme, how) as (other, lines):
                measure(f"beside layers of 1 GiB, {how}", location, scheme, seconds, pid, other)
                sys.stdout.write(f"  of which {len(lines)} were answered\n")
    with server_process() as server:
        location, pid = server.location, server.process.pid
        measure("alone", location, scheme, seconds, pid)
        with others("--slow", location, scheme) as (other, _):
            measure(f"beside {SLOW} slow readers that come", location, scheme, seconds, pid, other)
            time.sleep(FILL_S)
            in_turns(location, scheme, seconds, other)
        measure("alone again", location, scheme, seconds, pid)


if __name__ == "__main__":
    main()
