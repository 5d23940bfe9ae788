"""The probe that containers run: it tells a ready server from one that is not there."""

from __future__ import annotations

import subprocess
import sys

from flightquant.server.app import Server


def ask(*address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flightquant.server.probe", *address]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_ready_server(server: Server) -> None:
    done = ask(server.health_address)
    assert (done.returncode, done.stdout) == (0, f"{server.health_address}: SERVING\n")


def test_a_server_that_is_alive(server: Server) -> None:
    assert ask(server.health_address, "liveness").returncode == 0


def test_a_server_that_is_not_there() -> None:
    done = ask("127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr == "127.0.0.1:1: UNAVAILABLE\n"
