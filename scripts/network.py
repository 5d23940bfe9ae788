"""Client and server in two network namespaces: bandwidth limit, loss, latency, a black hole; prints the figures.

Needs root, iproute2 and nftables. Makes the namespaces, starts ``flightquant serve`` in one,
calls it from the other with answers compared by hash, and removes all. Exit code 1 if an answer was lost or wrong, or a
deadline did not hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flightquant import reference
from flightquant.client import QuantClient
from flightquant.errors import DeadlineError, UnavailableError
from flightquant.spec import Command

SERVER, CLIENT = "fq-server", "fq-client"
ADDRESS = "10.232.7.1"
URI = f"grpc://{ADDRESS}:8815"
LAYERS, MIB_EACH = 12, 4


def sh(command: str, *, check: bool = True) -> None:
    """A command line of ours."""
    subprocess.run(command.split(), check=check, capture_output=not check)


@contextmanager
def namespaces() -> Iterator[None]:
    """Two namespaces and a cable between them."""
    for name in (SERVER, CLIENT):
        sh(f"ip netns delete {name}", check=False)
        sh(f"ip netns add {name}")
        sh(f"ip -n {name} link set lo up")
    try:
        sh(f"ip link add fq0 netns {SERVER} type veth peer name fq0 netns {CLIENT}")
        sh(f"ip -n {SERVER} addr add {ADDRESS}/30 dev fq0")
        sh(f"ip -n {CLIENT} addr add 10.232.7.2/30 dev fq0")
        for name in (SERVER, CLIENT):
            sh(f"ip -n {name} link set fq0 up")
        yield
    finally:
        for name in (SERVER, CLIENT):
            sh(f"ip netns delete {name}", check=False)


@contextmanager
def serving() -> Iterator[None]:
    """A server in its namespace."""
    flightquant = str(Path(sys.executable).with_name("flightquant"))
    command = ["ip", "netns", "exec", SERVER, flightquant, "serve", "--location", f"grpc://{ADDRESS}:8815"]
    process = subprocess.Popen([*command, "--log-level", "error"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the server does not start")
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def bandwidth(megabits: int) -> Iterator[None]:
    """Both directions no faster than this."""
    for name in (SERVER, CLIENT):
        sh(f"ip netns exec {name} tc qdisc add dev fq0 root tbf rate {megabits}mbit burst 256kb latency 50ms")
    try:
        yield
    finally:
        for name in (SERVER, CLIENT):
            sh(f"ip netns exec {name} tc qdisc del dev fq0 root")


@contextmanager
def dropping(what: str) -> Iterator[None]:
    """Packets that match are lost, in both directions."""
    for name in (SERVER, CLIENT):
        sh(f"ip netns exec {name} nft add table inet fq")
        sh(f"ip netns exec {name} nft add chain inet fq in {{ type filter hook input priority 0 ; }}")
        sh(f"ip netns exec {name} nft add rule inet fq in iifname fq0 {what} drop")
    try:
        yield
    finally:
        for name in (SERVER, CLIENT):
            sh(f"ip netns exec {name} nft delete table inet fq")


def call(timeout_s: float, black_hole_after_s: float | None = None) -> dict[str, Any]:
    """Run the client in its namespace; what it tells."""
    command = ["ip", "netns", "exec", CLIENT, sys.executable, __file__, "call", str(timeout_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if black_hole_after_s is not None:
        time.sleep(black_hole_after_s)
        with dropping(""):
            out, _ = process.communicate(timeout=180)
    else:
        out, _ = process.communicate(timeout=300)
    told: dict[str, Any] = json.loads(out)
    return told


def client(timeout_s: float) -> None:
    """One call with a deadline, every answer compared; prints what came of it."""
    rng = np.random.default_rng(3)
    weights = {f"layers.{i}.w": rng.standard_normal((MIB_EACH * 256, 1024), np.float32) for i in range(LAYERS)}
    spec = Command.build(scheme="int4").layer_spec()
    right = {
        name: hashlib.sha256(reference.quantize(w, spec, "float32", measure=False).data.tobytes()).hexdigest()
        for name, w in weights.items()
    }
    exact, outcome = 0, "ok"
    started = last = time.monotonic()
    try:
        with QuantClient(URI, timeout_s=timeout_s) as quantizer:
            while time.monotonic() - started < 4 or not exact:
                last = time.monotonic()
                table = quantizer.quantize(weights, scheme="int4")
                for name, data in zip(table.column("layer_name"), table.column("quantized_data"), strict=True):
                    exact += hashlib.sha256(data.as_buffer()).hexdigest() == right[name.as_py()]
    except (DeadlineError, UnavailableError) as error:
        outcome = type(error).__name__
    now = time.monotonic()
    print(json.dumps({"outcome": outcome, "exact": exact, "seconds": now - started, "last_s": now - last}))


def main() -> None:
    """Every condition once."""
    if sys.argv[1:2] == ["call"]:
        client(float(sys.argv[2]))
        return
    if os.geteuid():
        sys.exit("network namespaces need root")
    bad = []
    with namespaces(), serving():
        for title, condition in {
            "no limit": None,
            "1 Gbit/s": bandwidth(1000),
            "100 Mbit/s": bandwidth(100),
            "2 % of packets lost": dropping("meta l4proto tcp numgen random mod 100 < 2"),
        }.items():
            if condition is None:
                told = call(120)
            else:
                with condition:
                    told = call(120)
            whole = told["outcome"] == "ok" and told["exact"] % LAYERS == 0 and told["exact"]
            bad += [] if whole else [title]
            megabytes = told["exact"] * MIB_EACH * 1.048576
            print(f"{title:24} {told['exact']:4} answers, all exact, {megabytes / told['seconds']:7.1f} MB/s")
        told = call(8, black_hole_after_s=3)
        held = told["outcome"] == "DeadlineError" and told["last_s"] < 8 + 2
        bad += [] if held else ["black hole"]
        print(f"black hole in mid-call   {told['outcome']} after {told['last_s']:.1f} s; its deadline was 8 s")
        told = call(60)
        bad += [] if told["outcome"] == "ok" else ["afterwards"]
        print(f"after it                 {told['outcome']}, {told['exact']} answers")
    print(f"failed: {', '.join(bad)}" if bad else "nothing lost, deadlines held")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
