"""The server as a process of its own, started as an operator starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from flightquant.server import heap

SERVE = "import typer; from flightquant.server.cli import serve; typer.run(serve)"
FREE_PORTS = ("--location", "grpc://127.0.0.1:0", "--metrics-port", "0", "--health-port", "0")


@dataclass
class ServerProcess:
    """A server that is ready."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    log: IO[str]

    @property
    def location(self) -> str:
        """Where its Flight service listens."""
        return str(self.ready["flight"])

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, timeout_s: float = 30.0) -> tuple[int, str, list[str]]:
        """Wait for its end: exit code, the rest of its standard output, the lines of its log."""
        out, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, lines(self.log)


def lines(log: IO[str]) -> list[str]:
    """What stands in a log file by now."""
    log.seek(0)
    return log.read().splitlines()


def command(*options: str) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-c", SERVE, *options]


@contextmanager
def server_process(*options: str, env: Mapping[str, str | None] | None = None) -> Iterator[ServerProcess]:
    """A ready server on free ports; killed at the end if it still runs.

    Parameters
    ----------
    env : mapping, optional
        Variables to set, or with None to unset. By default the one that saves the second start is set.
    """
    variables = {**os.environ, heap.VARIABLE: heap.TUNABLES, **(env or {})}
    # A pipe that nobody reads would stop the server once it is full.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(*FREE_PORTS, *options),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait()
                raise AssertionError(f"no ready line: {lines(log)}")
            yield ServerProcess(process, json.loads(line), log)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()
