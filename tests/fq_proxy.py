"""HAProxy with ``deploy/proxy/haproxy.cfg`` before a server."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from fq_flight import eventually
from fq_identity import Authority, Pair
from fq_soak import free_port

CONFIG = Path(__file__).parents[1] / "deploy" / "proxy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")


@dataclass
class Proxy:
    """A running proxy, its process and what clients need."""

    process: subprocess.Popen[bytes]
    port: int
    pem: Path
    authority: Authority
    folder: Path

    @property
    def location(self) -> str:
        """Where our clients connect."""
        return f"grpc+tls://127.0.0.1:{self.port}"

    def channel(self) -> grpc.Channel:
        """A channel of gRPC's own to it."""
        roots = grpc.ssl_channel_credentials(self.authority.file.read_bytes())
        return grpc.secure_channel(f"127.0.0.1:{self.port}", roots)

    def certificate(self) -> str:
        """What it shows now."""
        return ssl.get_server_certificate(("127.0.0.1", self.port))


def write_pem(pem: Path, pair: Pair) -> None:
    """Put a certificate and its key in place of those that are there."""
    new = pem.with_suffix(".new")
    new.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    new.rename(pem)


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def proxy_process(upstream: str, folder: Path, idle_s: float, mode: str = "-W") -> Iterator[Proxy]:
    """One before a server, with a certificate of its own; ``mode``: ``-W`` has a worker, ``-db`` is one process."""
    authority, port, pem = Authority(folder), free_port(), folder / "server.pem"
    write_pem(pem, authority.issue_server())
    variables = {
        "FLIGHTQUANT_PROXY_BIND": f"127.0.0.1:{port}",
        "FLIGHTQUANT_PROXY_PEM": str(pem),
        "FLIGHTQUANT_PROXY_UPSTREAM": upstream.removeprefix("grpc://"),
        "FLIGHTQUANT_PROXY_IDLE": f"{idle_s:g}s",
    }
    with subprocess.Popen([str(HAPROXY), mode, "-f", str(CONFIG)], env=variables, stderr=subprocess.PIPE) as process:
        try:
            eventually(lambda: listens(port))
            yield Proxy(process, port, pem, authority, folder)
        finally:
            process.kill()
