"""Hours of faults against live servers: ``python tests/fq_soak.py --minutes 60`` prints figures, exits 1 if one is bad.

Two servers run. One is killed and restarted, or drained and restarted, at random; the other lives to the end, so that
its memory, threads and descriptors can be watched. Both are given the faults of fq_faults in a seeded order. Clients of
ours, with retries, quantize beside them all the time, and every answer is compared with the local call's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fq_faults import FAULTS, Fault, corpus_file
from fq_process import ServerProcess, lines, server_process

import flightquant
from flightquant.client import QuantClient, Retry
from flightquant.errors import FlightquantError

SCHEMES = ("int8", "int4", "q4_0", "q8_0", "fp8_e4m3", "nf4")
LIMITS = ("--max-calls", "48", "--max-layer-bytes", str(64 << 20), "--max-batch-bytes", str(64 << 20), "--grace-s", "4")
SAMPLE_S = 5.0
SETTLE_S = 300.0
QUIET_THREADS = 80


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Tally:
    """What happened, counted from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.problems: list[str] = []

    def count(self, *names: str) -> None:
        """Count one of each."""
        with self._lock:
            self.counts.update(names)

    def problem(self, text: str) -> None:
        """Something that must not be."""
        with self._lock:
            self.problems.append(text)
        sys.stderr.write(f"PROBLEM {text}\n")


class Servers:
    """A server at a fixed port that can be killed, drained and started again."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.location = f"grpc://127.0.0.1:{free_port()}"
        self._stack = ExitStack()
        self.process: ServerProcess
        self.start()

    def start(self) -> None:
        """Start it; ready when this returns."""
        self.process = self._stack.enter_context(server_process(*LIMITS, "--location", self.location))

    @property
    def pid(self) -> int:
        """Of the running server."""
        return self.process.process.pid

    def end(self, number: int) -> None:
        """End it by a signal; its exit code and its log must be right."""
        alive = self.process.process.poll()
        if alive is not None:
            self.tally.problem(f"the server had ended by itself with {alive}: {lines(self.process.log)[-3:]}")
        else:
            self.process.signal(number)
        code, _, log = self.process.end(60)
        expected = -signal.SIGKILL if number == signal.SIGKILL else 0
        if code != expected:
            self.tally.problem(f"exit code {code} instead of {expected}: {log[-3:]}")
        events = [json.loads(line) for line in log if line.startswith("{")]
        calls = [event for event in events if event["event"] == "call"]
        if len({call["request_id"] for call in calls}) != len(calls):
            self.tally.problem("a call has two lines in the log")
        for call in calls:
            self.tally.count(f"server outcome {call['outcome']}")
        for event in events:
            if event["event"] == "unexpected error":
                self.tally.problem(f"internal error: {event}")
        self._stack.close()


def good_client(seed: int, servers: list[Servers], tally: Tally, until: float, pause_s: float) -> None:
    """Calls of our client, one after the other; every table is compared with the local one's."""
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    shapes = [(8, 128), (64, 512), (256, 1024), (3000, 2048)]
    weights = {f"{seed}.layers.{i}.w": numbers.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
    local: dict[str, pa.Table] = {}
    while time.monotonic() < until:
        scheme, server = rng.choice(SCHEMES), rng.choice(servers)
        if scheme not in local:
            local[scheme] = flightquant.quantize(weights, scheme).drop(["kernel_ns"])
        tally.count("calls")
        started = time.monotonic()
        try:
            with QuantClient(server.location, timeout_s=120, retry=Retry(patience_s=60)) as client:
                table = client.quantize(weights, scheme).drop(["kernel_ns"])
        except FlightquantError as error:
            tally.count(f"call failed: {error.code}")
        except Exception as error:
            tally.problem(f"a call ended with {error!r}")
        else:
            tally.seconds.append(time.monotonic() - started)
            if table.equals(local[scheme]):
                tally.count("call ok", "call ok and bit-equal")
            else:
                tally.count("call ok")
                tally.problem(f"{scheme}: another answer than the local call's")
        time.sleep(pause_s * rng.uniform(0.5, 1.5))


def faulty_client(
    seed: int, faults: dict[str, Fault], servers: list[Servers], tally: Tally, until: float, pause_s: float
) -> None:
    """One fault after the other, in a seeded order."""
    number = 0
    while time.monotonic() < until:
        rng = np.random.default_rng([seed, number])
        name = str(rng.choice(list(faults)))
        server = servers[int(rng.integers(0, len(servers)))]
        try:
            seen = faults[name](server.location, rng)
        except AssertionError as error:
            tally.problem(f"{name} (seed {seed}, number {number}): {error}")
        except OSError:
            seen = "not reached"
        except Exception as error:
            seen = type(error).__name__
        tally.count(f"fault {name}", f"seen {name}: {seen}")
        number += 1
        time.sleep(pause_s * float(rng.uniform(0.5, 1.5)))


def restarter(seed: int, server: Servers, tally: Tally, until: float, every_s: float) -> None:
    """Kill or drain the first server, and start it again."""
    rng = random.Random(seed)
    while time.monotonic() + every_s * 1.5 + 60 < until:
        time.sleep(every_s * rng.uniform(0.5, 1.5))
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        tally.count(f"server {number.name}")
        server.end(number)
        server.start()


def usage(pid: int) -> dict[str, float]:
    """Memory, threads and descriptors of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
    }


def in_flight(server: Servers) -> float:
    """The server's own count of calls that run."""
    with urllib.request.urlopen(server.process.ready["metrics"], timeout=30) as page:
        text: str = page.read().decode()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("flightquant_calls_in_flight ")))


def settle(server: Servers) -> float:
    """Seconds until all that its clients left behind is worked off: each stream of a flood has a thread until then."""
    started = time.monotonic()
    while time.monotonic() - started < SETTLE_S:
        if usage(server.pid)["threads"] <= QUIET_THREADS and in_flight(server) == 0:
            break
        time.sleep(0.5)
    return time.monotonic() - started


def slope(samples: list[tuple[float, float]]) -> float:
    """MiB an hour over the second half of the run, by least squares."""
    late = np.array(samples[len(samples) // 2 :])
    return float(np.polyfit(late[:, 0] / 3600, late[:, 1], 1)[0]) if len(late) > 2 else 0.0


def by_minute(samples: list[tuple[float, float]]) -> list[float]:
    """The median of each minute: a heap that warms up levels off, a leak does not."""
    minutes: dict[int, list[float]] = {}
    for when, value in samples:
        minutes.setdefault(int(when // 60), []).append(value)
    return [float(np.median(values)) for _, values in sorted(minutes.items())]


def run(minutes: float, seed: int, pause_s: float, corpus: Path | None) -> dict[str, Any]:
    """The whole soak; its figures."""
    tally, started = Tally(), time.monotonic()
    until = started + minutes * 60
    faults = dict(FAULTS)
    if corpus is not None:
        faults["fuzz file"] = corpus_file([path for path in sorted(corpus.iterdir()) if path.suffix != ".md"])
    mortal, immortal = Servers(tally), Servers(tally)
    both = [mortal, immortal]
    jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (good_client, (seed + 1, both, tally, until, pause_s)),
        (good_client, (seed + 2, both, tally, until, pause_s)),
        (faulty_client, (seed + 3, faults, both, tally, until, pause_s)),
        (faulty_client, (seed + 4, faults, both, tally, until, pause_s)),
        (restarter, (seed + 5, mortal, tally, until, 40 * pause_s)),
    ]
    threads = [threading.Thread(target=target, args=args, daemon=True) for target, args in jobs]
    for thread in threads:
        thread.start()
    samples = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(SAMPLE_S)
        samples.append((time.monotonic() - started, usage(immortal.pid)))
    settle_s = settle(immortal)
    end, running = usage(immortal.pid), in_flight(immortal)
    if running or end["threads"] > QUIET_THREADS:
        tally.problem(f"{running} calls and {end['threads']} threads are left {SETTLE_S} s after the last client")
    first = next(sample for when, sample in samples if when > min(60.0, minutes * 6))
    for server in both:
        server.end(signal.SIGTERM)
    failed = sum(count for name, count in tally.counts.items() if name.startswith("call failed"))
    if tally.counts["calls"] != tally.counts["call ok"] + failed:
        tally.problem("the numbers of calls and of outcomes differ")
    rss = [(when, sample["rss_mib"]) for when, sample in samples]
    seconds = np.array(tally.seconds or [0.0])
    return {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "seed": seed,
        "calls": tally.counts["calls"],
        "ok": tally.counts["call ok"],
        "bit_equal": tally.counts["call ok and bit-equal"],
        "failed": failed,
        "faults": sum(count for name, count in tally.counts.items() if name.startswith("fault ")),
        "seconds_p50": round(float(np.quantile(seconds, 0.5)), 3),
        "seconds_p99": round(float(np.quantile(seconds, 0.99)), 3),
        "longest_s": round(float(seconds.max()), 3),
        "first_minute": first,
        "settle_s": round(settle_s, 1),
        "end": end,
        "peak_rss_mib": round(max(value for _, value in rss), 1),
        "slope_mib_per_hour": round(slope(rss), 1),
        "rss_mib_by_minute": [round(value) for value in by_minute(rss)],
        "counts": dict(sorted(tally.counts.items())),
        "problems": tally.problems,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--pause-s", type=float, default=1.0, help="mean pause of each client between two calls")
    parser.add_argument("--corpus", type=Path, help="a folder of fuzz files of the Arrow project")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        figures = run(given.minutes, given.seed, given.pause_s, given.corpus)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    sys.exit(bool(figures["problems"]))


if __name__ == "__main__":
    main()
