"""SIGTERM at any moment of a server's life: ``python tests/fq_signals.py [STARTS] [SEED] [--bare | --init]``.

Each start is sent SIGTERM at a seeded moment of its first three seconds, while it imports, starts itself again for its
heap, warms up, opens its ports or serves; every fourth a second one soon after. Meanwhile others knock at its ports. It
has to end, with the exit code of its state. ``--bare`` makes it process 1 of a namespace, which the kernel saves from
signals that it does not handle; ``--init`` makes ``tini`` that and the server its child, as the image does (both need
root). What does not end in time tells its Python stacks.
Prints how many ended how, and the longest that one took; exits 1 if one did not end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from fq_soak import free_port

from flightquant.server import heap

LATEST_S = 3.0
GRACE_S = 2.0
HANGS_S = 8.0
"""Seconds after which a server counts as hung: before its own last resort, 10 s after the grace period."""
ENDS = {
    0: "drained",
    -signal.SIGTERM: "ended before any handler",
    128 + signal.SIGTERM: "ended while it loaded, or by the second",
}
DROPPED = "had no handler yet: the kernel drops the signal of a process 1"
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
FIRST = {"--bare": NAMESPACE, "--init": (*NAMESPACE, "tini", "--")}
"""What starts the server as process 1, and as the child of one."""


def knock(ports: list[int], until: threading.Event) -> None:
    """Connect to every port again and again, and leave."""
    while not until.wait(0.01):
        for port in ports:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
                sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")


def inner(pid: int) -> int:
    """The namespace's first process, as seen from here, once it is what was to be started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not (found := children.read_text().split()) or Path(f"/proc/{found[0]}/comm").read_text() == "unshare\n":
        time.sleep(0.001)
    return int(found[0])


def dropped(pid: int) -> bool:
    """Whether a process neither handles SIGTERM nor holds it back."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return not any(int(status[mask], 16) >> signal.SIGTERM - 1 & 1 for mask in ("SigCgt", "SigBlk"))


def stacks(pid: int, log: str) -> str:
    """What every thread of a process is at, which ends it."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGABRT)
    time.sleep(1)
    return Path(log).read_text()


def start_and_stop(
    rng: np.random.Generator, first: tuple[str, ...] = (), latest_s: float = LATEST_S, hangs_s: float = HANGS_S
) -> tuple[str, float]:
    """One server's life behind the words ``first``: how it ended, and the seconds from the signal to its end."""
    ports = [free_port() for _ in range(3)]
    options = ["--location", f"grpc://127.0.0.1:{ports[0]}", "--metrics-port", str(ports[1])]
    options += ["--health-port", str(ports[2]), "--grace-s", str(GRACE_S)]
    words = [sys.executable, "-X", "faulthandler", "-m", "flightquant", "serve", *options]
    variables = {**os.environ, heap.VARIABLE: heap.TUNABLES}
    if rng.integers(0, 2):
        del variables[heap.VARIABLE]
    at, second = float(rng.uniform(0, latest_s)), not rng.integers(0, 4)
    gone = threading.Event()
    with (
        tempfile.NamedTemporaryFile("w+") as log,
        subprocess.Popen([*first, *words], stdout=-3, stderr=log, env=variables) as process,
    ):
        threading.Thread(target=knock, args=(ports, gone), daemon=True).start()
        try:
            pid = inner(process.pid) if first else process.pid
            time.sleep(at)
            if first == FIRST["--bare"] and dropped(pid):
                return DROPPED, at
            began = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            if second:
                time.sleep(float(rng.uniform(0, 0.5)))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            code = process.wait(hangs_s)
            took = time.monotonic() - began
        except subprocess.TimeoutExpired:
            return f"HANGS, signal after {at:.3f} s, second {second}:\n{stacks(pid, log.name)}", hangs_s
        finally:
            gone.set()
            process.kill()
    return ENDS.get(code, f"EXIT CODE {code}, signal after {at:.3f} s"), took


def main() -> None:
    """The command."""
    given = [int(word) for word in sys.argv[1:] if word not in FIRST]
    first = next((FIRST[word] for word in sys.argv[1:] if word in FIRST), ())
    starts, seed = given[0] if given else 200, given[1] if given[1:] else 20261121
    tally: Counter[str] = Counter()
    longest = {True: 0.0, False: 0.0}
    for number in range(starts):
        how, took = start_and_stop(np.random.default_rng([seed, number]), first)
        tally[how] += 1
        longest[how == DROPPED] = max(longest[how == DROPPED], took)
    for how, count in tally.most_common():
        sys.stdout.write(f"{count} {how}\n")
    sys.stdout.write(f"longest {longest[False]:.1f} s from the signal to the end\n")
    if tally[DROPPED]:
        sys.stdout.write(f"no handler until {longest[True]:.2f} s after the start at the latest\n")
    sys.exit(bool(set(tally) - {*ENDS.values(), DROPPED}))


if __name__ == "__main__":
    main()
