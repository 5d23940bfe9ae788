"""Calls that fail at the worst moment: ``python tests/fq_aborts.py [SECONDS] [SEED] [SITUATION]``.

gRPC aborts the process of a client that ends its writing just when the server, the deadline or the network ends the
stream (:mod:`flightquant.client.exchange` says how that is kept apart). Each situation is so many seconds of short
calls, on four threads of one client process after the other, with deadlines and moments from the seed.
Prints what came of the calls, and how many processes were aborted; exits 1 if one was, or did not end.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

SERVER = """
import random, sys, time
import pyarrow.flight as flight
kind, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
class Server(flight.FlightServerBase):
    def do_exchange(self, context, descriptor, reader, writer):
        if kind in ("stalls", "exits"):
            time.sleep(0.3)
        if kind in ("reads, then fails", "halted", "killed"):
            for _ in range(rng.randrange(5)):
                reader.read_chunk()
        time.sleep(rng.uniform(0, 0.002))
        if kind != "closes":
            raise flight.FlightUnavailableError("at a bad time")
server = Server("grpc://127.0.0.1:" + sys.argv[3])
print(server.port, flush=True)
server.serve()
"""
CLIENT = """
import collections, json, random, sys, threading
import numpy as np
from flightquant.client import QuantClient, Retry
from flightquant.errors import FlightquantError
uri, seed, calls, latest_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
sizes = {"small": (4, 128), "large": (256, 1024)}
weights = {name: {f"{i}": np.ones(shape, np.float32) for i in range(4)} for name, shape in sizes.items()}
ends = collections.Counter()
def run(number):
    rng = random.Random(seed + number)
    for _ in range(calls):
        timeout_s = rng.uniform(0.02, latest_s)
        with QuantClient(uri, timeout_s=timeout_s, window_batches=8, retry=Retry(patience_s=0)) as client:
            for _ in range(10):
                layers = weights[rng.choice(list(weights))]
                try:
                    client.quantize(dict(list(layers.items())[:rng.randrange(1, 5)]), "int8")
                    ends["answered"] += 1
                except FlightquantError as error:
                    ends[error.code] += 1
threads = [threading.Thread(target=run, args=(number * 1000,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(ends))
"""
EXITS = """
import sys, threading, time
import numpy as np
from flightquant.client import QuantClient, Retry
weights = {f"{i}": np.ones((64, 1024), np.float32) for i in range(4)}
def run():
    QuantClient(sys.argv[1], retry=Retry(patience_s=0)).quantize(weights, "int8")
threading.excepthook = lambda failed: None
for _ in range(12): threading.Thread(target=run, daemon=True).start()
time.sleep(float(sys.argv[2]))
print("{}")
"""
"""A program that ends while its calls do."""
SITUATIONS = ("fails", "closes", "reads, then fails", "stalls", "halted", "killed", "exits")
GIVEN_UP_S = 120.0


@contextmanager
def server(kind: str, seed: int, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that ends streams at bad times, and its port."""
    words = [sys.executable, "-c", SERVER, kind, str(seed), str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def client(port: int, seed: int, calls: int, latest_s: float) -> subprocess.Popen[str]:
    """A process that calls, ``calls`` times ten on each of four threads."""
    words = [sys.executable, "-c", CLIENT, f"grpc://127.0.0.1:{port}", str(seed), str(calls), str(latest_s)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    """A client's exit code, None if it did not end, and what it told."""
    try:
        out, errors = process.communicate(timeout=GIVEN_UP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, "did not end"
    return process.returncode, out.strip() if process.returncode == 0 else errors.strip()[-1000:]


def halt_now_and_then(process: subprocess.Popen[str], called: subprocess.Popen[str], rng: random.Random) -> None:
    """SIGSTOP and SIGCONT to a server while a client runs."""
    while called.poll() is None:
        time.sleep(rng.uniform(0.01, 0.2))
        process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0.05, 0.3))
        process.send_signal(signal.SIGCONT)


def one(situation: str, seed: int) -> tuple[int | None, str]:
    """One client process in one situation."""
    rng = random.Random(seed)
    latest_s = 2.0 if situation in SITUATIONS[:3] else 0.2
    with ExitStack() as held:
        process, port = held.enter_context(server(situation, seed))
        if situation == "exits":
            words = [sys.executable, "-c", EXITS, f"grpc://127.0.0.1:{port}", str(rng.uniform(0.27, 0.36))]
            called = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        else:
            called = client(port, seed, 10 if latest_s > 1 else 3, latest_s)
        held.callback(called.kill)
        if situation == "halted":
            halt_now_and_then(process, called, rng)
        while situation == "killed" and called.poll() is None:
            time.sleep(rng.uniform(0.01, 0.5))
            process.kill()
            process.wait()
            process, _ = held.enter_context(server(situation, seed, port))
        return ended(called)


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    seconds, seed = float(words[0]) if words else 30.0, int(words[1]) if words[1:] else 20261122
    bad = 0
    for situation in words[2:] or SITUATIONS:
        until = time.monotonic() + seconds
        ends: Counter[str] = Counter()
        processes = aborted = 0
        while time.monotonic() < until:
            code, told = one(situation, seed + processes)
            processes += 1
            if code == 0:
                ends.update(json.loads(told))
            else:
                aborted += 1
                sys.stderr.write(f"{situation}, seed {seed + processes - 1}: exit {code}: {told}\n")
        bad += aborted
        told = ", ".join(f"{count} {how}" for how, count in ends.most_common())
        sys.stdout.write(f"{situation}: {aborted} of {processes} processes aborted or hung; {told}\n")
        sys.stdout.flush()
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
