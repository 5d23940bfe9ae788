"""Floods of reset streams: ``python tests/fq_floods.py [FLOODS [STREAMS]] [--proxy]`` prints what they cost.

So many connections at once (8) open STREAMS (2,000) streams each and reset every one as it is opened, straight at the
server or, with ``--proxy``, at HAProxy with ``deploy/proxy/haproxy.cfg`` before it. Told are the seconds until the
server answers a call of ours, until its threads are given back, and the CPU seconds of both processes.
"""

from __future__ import annotations

import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from fq_fairness import cpu_seconds
from fq_faults import PREFACE, frame, headers_block
from fq_process import server_process
from fq_proxy import proxy_process
from fq_soak import QUIET_THREADS, usage

from flightquant.client import Credentials, QuantClient
from flightquant.errors import FlightquantError


def flood(port: int, streams: int, context: ssl.SSLContext | None) -> None:
    """Open and reset all streams of one connection; whoever cuts it off may."""
    try:
        with ExitStack() as held:
            sock: socket.socket = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            if context is not None:
                sock = held.enter_context(context.wrap_socket(sock, server_hostname="localhost"))
            sock.sendall(PREFACE + frame(4))
            for first in range(1, 2 * streams, 200):
                sock.sendall(
                    b"".join(
                        frame(1, 4, number, headers_block()) + frame(3, 0, number, struct.pack(">I", 8))
                        for number in range(first, first + 200, 2)
                    )
                )
            sock.settimeout(1)
            while sock.recv(1 << 16):
                pass
    except OSError:
        pass


def served(location: str, credentials: Credentials | None) -> bool:
    """Whether a call is answered now."""
    try:
        with QuantClient(location, credentials=credentials, retry=None, timeout_s=20) as client:
            return bool(client.quantize({"w": np.ones((1, 32), np.float32)}, "int8").num_rows == 1)
    except FlightquantError:
        return False


def main() -> None:
    """The command."""
    given = [int(word) for word in sys.argv[1:] if word != "--proxy"]
    floods, streams = given[0] if given else 8, given[1] if given[1:] else 2000
    with tempfile.TemporaryDirectory() as folder, server_process() as server, ExitStack() as held:
        pids, location, credentials, context = [server.process.pid], server.location, None, None
        if "--proxy" in sys.argv:
            proxy = held.enter_context(proxy_process(server.location, Path(folder), 600, "-db"))
            pids.append(proxy.process.pid)
            location, credentials = proxy.location, Credentials(ca=proxy.authority.file)
            context = ssl.create_default_context(cafile=str(proxy.authority.file))
            context.set_alpn_protocols(["h2"])
        while not served(location, credentials):
            time.sleep(0.1)
        port = int(location.rpartition(":")[2])
        before = [cpu_seconds(pid) for pid in pids]
        threads = [threading.Thread(target=flood, args=(port, streams, context)) for _ in range(floods)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        answered: list[float] = []

        def wait() -> None:
            while not served(server.location, None):
                time.sleep(0.1)
            answered.append(time.monotonic() - started)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        most = 0.0
        while any(thread.is_alive() for thread in threads):
            most = max(most, usage(pids[0])["threads"])
            time.sleep(0.05)
        while usage(pids[0])["threads"] > QUIET_THREADS:
            time.sleep(0.05)
        rested = time.monotonic() - started
        used = [cpu_seconds(pid) - then for pid, then in zip(pids, before, strict=True)]
    sys.stdout.write(
        f"{floods} floods of {streams} resets: at most {most:.0f} threads, served after {answered[0]:.1f} s, "
    )
    sys.stdout.write(f"at rest after {rested:.1f} s; CPU seconds {', '.join(f'{each:.2f}' for each in used)}\n")


if __name__ == "__main__":
    main()
