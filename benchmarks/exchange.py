"""The whole exchange over loopback, against one whose server does not compute: ``flightquant bench exchange``.

Both servers are processes of their own; one client process streams the same batches to each in turn. GB/s of input; CPU
seconds of the server for each GiB of input.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flightquant.benchmarks.harness import OtherLoad, header, machine, weights, write_json
from flightquant.layers import layers_batch

GIB = 1 << 30
SERVE = (
    str(Path(sys.executable).with_name("flightquant")),
    "serve",
    *("--location", "grpc://127.0.0.1:0", "--metrics-port", "0", "--health-port", "0", "--log-level", "warning"),
)
SAME_SIZES = (sys.executable, "-m", "flightquant.benchmarks.same_sizes_server")


@contextmanager
def server(command: tuple[str, ...]) -> Iterator[tuple[dict[str, str], int]]:
    """A server process: its addresses, as it prints them, and its process id."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline() if process.stdout else "null")
        yield ready, process.pid
    finally:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stages(metrics: str) -> dict[str, float]:
    """Seconds that a server has spent in each stage, from its metrics."""
    with urllib.request.urlopen(metrics, timeout=30) as answer:  # noqa: S310 -- of our own server
        lines = answer.read().decode().splitlines()
    name = 'flightquant_stage_seconds_sum{stage="'
    found = (line.removeprefix(name).split('"} ') for line in lines if line.startswith(name))
    return {stage: float(seconds) for stage, seconds in found}


def exchange(client: flight.FlightClient, batch: pa.RecordBatch, count: int, command: dict[str, Any]) -> None:
    """Stream one batch so many times and read all answers; fails unless every row was answered."""
    descriptor = flight.FlightDescriptor.for_command(json.dumps(command).encode())
    writer, reader = client.do_exchange(descriptor)
    with writer:
        writer.begin(batch.schema)

        def write() -> None:
            for _ in range(count):
                writer.write_batch(batch)

        thread = threading.Thread(target=write)
        thread.start()
        answered = sum(reader.read_chunk().data.num_rows for _ in range(count))
        thread.join()
        writer.done_writing()  # not beside a read: see flightquant.client.exchange
        end = json.loads(reader.read_chunk().app_metadata.to_pybytes())
    if answered != count * batch.num_rows:
        raise RuntimeError(f"{answered} rows answered, {count * batch.num_rows} sent, end message {end}")


def compare(batch_bytes: int, total: int, rounds: int, command: dict[str, Any]) -> dict[str, Any]:
    """One batch size: both servers, round by round."""
    cols = 1024
    layer = weights((batch_bytes // 4 // cols, cols))
    batch = layers_batch([layer])
    count = max(4, total // batch_bytes)
    nbytes = count * layer.nbytes
    sides: dict[str, dict[str, list[float]]] = {}
    with server(SERVE) as computing, server(SAME_SIZES) as floor:
        clients = {"flightquant": computing, "no computing": floor}
        connections = {name: flight.connect(ready["flight"]) for name, (ready, _) in clients.items()}
        checking = 0.0
        for turn in range(rounds + 1):
            for name, (_, pid) in clients.items():
                before, start = cpu_seconds(pid), time.perf_counter()
                exchange(connections[name], batch, count, command)
                seconds = time.perf_counter() - start
                if turn:
                    side = sides.setdefault(name, {"gb_s": [], "cpu_s_per_gib": []})
                    side["gb_s"].append(nbytes / 1e9 / seconds)
                    side["cpu_s_per_gib"].append((cpu_seconds(pid) - before) / (nbytes / GIB))
            if not turn:
                checking = -stages(computing[0]["metrics"])["validate"]
        checking += stages(computing[0]["metrics"])["validate"]
    ratios = [a / b for a, b in zip(sides["flightquant"]["gb_s"], sides["no computing"]["gb_s"], strict=True)]
    medians = {
        name: {key: statistics.median(values) for key, values in side.items()}
        | {"min": min(side["gb_s"]), "max": max(side["gb_s"])}
        for name, side in sides.items()
    }
    took = sum(nbytes / 1e9 / rate for rate in sides["flightquant"]["gb_s"])
    checks = {"checks_us": checking / rounds / count * 1e6, "checks_share": checking / took}
    return {"batch_bytes": batch_bytes, "bytes": nbytes, **medians, "ratio": statistics.median(ratios), **checks}


def run(scheme: str, batch_mib: list[int], total_mib: int, rounds: int, json_file: Path | None) -> None:
    """Run, print, and write JSON where asked for."""
    facts, load = machine(), OtherLoad()
    print(header(facts))
    print(f"{scheme}, float32, {total_mib} MiB a round, {rounds} rounds, loopback")
    found = []
    for mib in batch_mib:
        row = compare(mib << 20, total_mib << 20, rounds, {"scheme": scheme})
        found.append(row)
        for name in ("flightquant", "no computing"):
            side = row[name]
            print(
                f"  {mib:3} MiB  {name:<13} {side['gb_s']:5.2f} GB/s ({side['min']:.2f} to {side['max']:.2f})"
                f"  server CPU {side['cpu_s_per_gib']:.2f} s/GiB"
            )
        print(f"  {mib:3} MiB  ratio {row['ratio']:.2f} (median of the rounds' ratios)")
        checks = f"{row['checks_us']:.0f} us a batch, {row['checks_share']:.1%} of its time"
        print(f"  {mib:3} MiB  checks and layout {checks}")
    print(f"CPU time stolen by the host: {load.shares()['stolen']:.1%}")
    write_json(json_file, {"machine": facts, "exchange": found})
