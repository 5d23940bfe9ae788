"""Client and server in two network namespaces: bandwidth limit, loss, latency, a black hole; prints the figures.

Needs root, iproute2 and nftables. Makes the namespaces, starts ``flightquant serve`` in one,
calls it from the other with answers compared by hash, and removes all. Exit code 1 if an answer was lost or wrong, or a
deadline did not hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from flightquant import reference
from flightquant.client import QuantClient
from flightquant.errors import DeadlineError, UnavailableError
from flightquant.spec import Command

SERVER, CLIENT = "fq-server", "fq-client"
ADDRESS = "10.232.7.1"
PORT = 8815
URI = f"grpc://{ADDRESS}:{PORT}"
TUN, TUNSETIFF, IFF_TUN, IFF_NO_PI = "/dev/net/tun", 0x400454CA, 0x0001, 0x1000
FAR = {SERVER: ("fq-far-s", "10.232.8.1"), CLIENT: ("fq-far-c", "10.232.8.2")}
"""Device and address of each side on the way that has latency."""
MTU = 9000
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
        sh(f'ip netns exec {name} nft add rule inet fq in iifname "fq*" {what} drop')
    try:
        yield
    finally:
        for name in (SERVER, CLIENT):
            sh(f"ip netns exec {name} nft delete table inet fq")


@contextmanager
def latency(round_trip_ms: int) -> Iterator[None]:
    """Another way to the server: every packet takes half of this in each direction. It ends with its carrier."""
    command = [sys.executable, __file__, "carry", str(round_trip_ms / 2000)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        for name, (device, address) in FAR.items():
            sh(f"ip link set {device} netns {name}")
            sh(f"ip -n {name} addr add {address}/30 dev {device}")
            sh(f"ip -n {name} link set {device} mtu {MTU} up")
        sh(f"ip -n {CLIENT} route add {ADDRESS}/32 dev {FAR[CLIENT][0]} src {FAR[CLIENT][1]}")
        yield
    finally:
        process.stdin.close()
        process.wait(30)


def carry(delay_s: float) -> None:
    """Carry packets between two TUN devices, each so much later, until standard input ends (netem is not everywhere).

    The devices are made in this process's network and moved to theirs by the parent: what holds them open stays.
    """
    ends = []
    for device, _ in FAR.values():
        end = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
        ends.append(end)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    due: deque[tuple[float, int, bytes]] = deque()
    print("made", flush=True)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        ready, _, _ = select.select([*ends, 0], [], [], wait)
        if 0 in ready:
            return
        now = time.monotonic()
        for end in ready:
            due.append((now + delay_s, other[end], os.read(end, 1 << 16)))
        while due and due[0][0] <= now:
            _, end, packet = due.popleft()
            with suppress(OSError):  # a full queue, or a device that is not up yet, loses packets, as networks do
                os.write(end, packet)


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
    with socket.create_connection((ADDRESS, PORT), timeout=10):  # the first one also learns the way
        pass
    started = time.monotonic()
    with socket.create_connection((ADDRESS, PORT), timeout=10):
        round_trip_ms = 1000 * (time.monotonic() - started)
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
    told = {"outcome": outcome, "exact": exact, "seconds": now - started, "last_s": now - last}
    print(json.dumps({**told, "round_trip_ms": round_trip_ms}))


def main() -> None:
    """Every condition once."""
    if sys.argv[1:2] == ["call"]:
        client(float(sys.argv[2]))
        return
    if sys.argv[1:2] == ["carry"]:
        carry(float(sys.argv[2]))
        return
    if os.geteuid():
        sys.exit("network namespaces need root")
    bad = []
    with namespaces(), serving():
        lossy = "meta l4proto tcp numgen random mod 100 <"
        cases: list[tuple[str, int, list[AbstractContextManager[None]]]] = [
            ("no limit", 0, []),
            ("1 Gbit/s", 0, [bandwidth(1000)]),
            ("100 Mbit/s", 0, [bandwidth(100)]),
            ("2 % of packets lost", 0, [dropping(f"{lossy} 2")]),
            ("10 ms", 10, []),
            ("100 ms", 100, []),
            ("10 ms, 1 % lost", 10, [dropping(f"{lossy} 1")]),
        ]
        for title, round_trip_ms, conditions in cases:
            with ExitStack() as stack:
                for condition in [*([latency(round_trip_ms)] if round_trip_ms else []), *conditions]:
                    stack.enter_context(condition)
                told = call(120)
            whole = told["outcome"] == "ok" and told["exact"] % LAYERS == 0 and told["exact"] > 0
            late = told["round_trip_ms"] >= round_trip_ms
            bad += [] if whole and late else [title]
            megabytes = told["exact"] * MIB_EACH * 1.048576
            print(
                f"{title:24} {told['exact']:4} answers, {'all exact' if whole else 'NOT ALL EXACT'}, "
                f"{megabytes / told['seconds']:7.1f} MB/s, connected in {told['round_trip_ms']:.1f} ms"
            )
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
