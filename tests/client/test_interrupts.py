"""Ctrl-C and SIGTERM while a client waits: for a connection, a server, a repetition, or inside a library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.flight as flight
import pytest
from safetensors.numpy import save_file

from flightquant.client.batching import Request, pack
from flightquant.client.exchange import Exchange, Window
from flightquant.errors import UnavailableError
from flightquant.layers import named_layers
from flightquant.spec import Command

COMMAND = Command.build(scheme="int4")


def requests() -> Iterator[Request]:
    return iter(list(pack(named_layers({"w": np.ones((4, 128), np.float32)}), COMMAND)))


class Unreachable:
    """A Flight client whose server is not found, for as long as nobody says so; and the call that it opens then."""

    def __init__(self) -> None:
        self.opening, self.found, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.closed = threading.Event()

    def do_exchange(self, descriptor: Any, options: Any) -> tuple[Any, Any]:
        self.opening.set()
        if not self.found.wait(20):
            raise flight.FlightUnavailableError("not found")
        return self, self

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed.set()


def test_a_stream_that_does_not_open_holds_nobody_up() -> None:
    client: Any = Unreachable()
    exchange = Exchange(client, b"", flight.FlightCallOptions(), requests(), Window(1 << 20, 2))

    def interrupt() -> None:
        client.opening.wait(20)
        exchange.cancel(KeyboardInterrupt())

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(exchange)
    client.found.set()
    assert client.cancelled.wait(20), "what opens too late goes on"
    assert client.closed.wait(20), "Arrow complains on standard error"


def test_a_stream_that_does_not_open_is_a_lost_server() -> None:
    client: Any = Unreachable()
    exchange = Exchange(client, b"", flight.FlightCallOptions(), requests(), Window(1 << 20, 2), 0.2)
    with pytest.raises(UnavailableError, match=r"the server was lost: no answer for 0\.2 s"):
        list(exchange)
    client.found.set()


PROGRAM = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it
def deaf():
    "From now on another thread takes Ctrl-C: nothing wakes the main thread, on which Python handles it."
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT, signal.SIGTERM}})
def tell_asleep():
    "Say that the main thread waits, once it has been found so twenty times in a row."
    found = 0
    while found < 20:
        with open(f"/proc/self/task/{{os.getpid()}}/stat") as file:
            found = found + 1 if file.read().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.01)
    print("now", flush=True)
"""
WAITING = """
import conftest, logging, numpy as np
from flightquant.client import QuantClient, Retry
from flightquant.errors import OverloadedError
full = OverloadedError("full", retry_after_s=1000)
FAULTS
servers = [conftest.ReferenceServer(conftest.Faults(**FAULT)) for _ in range(SERVERS)]
class Told(logging.Handler):
    def emit(self, record): print("waits", flush=True)
logging.getLogger("flightquant.client").addHandler(Told())
def tell():
    while not any(server.faults.seen for server in servers): time.sleep(0.01)
    print("waits", flush=True)
if "hang_after" in FAULT: threading.Thread(target=tell, daemon=True).start()
deaf()
try:
    client = QuantClient(",".join(server.uri for server in servers), retry=Retry(patience_s=1e4))
    client.quantize({"w": np.ones((4, 128), np.float32)}, "int4")
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)
"""
WAITS = {
    "for an answer": ('{"hang_after": 0}', 1),
    "for one of several servers": ('{"hang_after": 0}', 2),
    "for the next attempt": ('{"fail_after": (0, full)}', 1),
}


def interrupted(program: str, word: str, number: int, again: bool = False) -> tuple[int, str, str]:
    """A program that is sent a signal when it has said a word; its exit code and what it says after that."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == word
            process.send_signal(number)
            if again:
                assert process.stdout.readline().strip() == "tidies"
                process.send_signal(number)
            out, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, out.strip(), errors.strip()


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_that_another_thread_takes_is_heard(wait: str) -> None:
    fault, servers = WAITS[wait]
    program = WAITING.replace("FAULTS\n", f"FAULT, SERVERS = {fault}, {servers}\n")
    code, out, errors = interrupted(program, "waits", signal.SIGINT)
    assert (code, out.splitlines()[-1:]) == (0, ["interrupted"]), errors


COMMANDS = {
    "loads": ("print('now', flush=True)\nwhile True: pass", False),
    "hears nothing": ("interrupts.loaded()\ndeaf()\nthreading.Thread(target=tell_asleep, daemon=True).start()\n"
                      "lock = threading.Lock()\nlock.acquire()\nlock.acquire()", False),
    "tidies for too long": ("interrupts.loaded()\ntry:\n    print('now', flush=True)\n    time.sleep(1000)\n"
                            "except KeyboardInterrupt:\n    print('tidies', flush=True)\n    time.sleep(1000)", True),
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_whatever_it_does(command: str, number: signal.Signals) -> None:
    program, again = COMMANDS[command]
    watching = "from flightquant import interrupts\ninterrupts.TIDYING_S = 1000\ninterrupts.watch()\n"
    code, out, errors = interrupted(watching + program, "now", number, again)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert (code, out, errors) == (128 + number, "", f"flightquant: {word}")


def test_a_signal_that_is_ignored_stays_so() -> None:
    program = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom flightquant import interrupts\ninterrupts.watch()\n"
    program += "os.kill(os.getpid(), signal.SIGINT)\nprint('on', flush=True)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program + "while True: pass"], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (143, b"on", b"flightquant: terminated")


def test_commands_with_a_command_line_of_their_own_end_in_the_same_words() -> None:
    program = "from flightquant import interrupts\ninterrupts.watch()\nfrom flightquant.client.cli import main\n"
    program += "import flightquant.benchmarks.cli as bench, typer\nbench.app = typer.Typer()\n@bench.app.command()\n"
    program += "def wait():\n    print('now', flush=True)\n    time.sleep(1000)\nsys.argv[1:] = ['bench']\nmain()"
    code, _, errors = interrupted(program, "now", signal.SIGTERM)
    assert (code, errors.splitlines()[-1]) == (143, "flightquant: terminated")


def test_sigterm_is_told_and_leaves_no_output(serve: Any, faults: Any, tmp_path: Path) -> None:
    save_file({"up.weight": np.ones((256, 512), np.float32)}, tmp_path / "m.safetensors")
    server = serve(faults(hang_after=0))
    words = ["quantize", "m.safetensors", "-o", "out", "--server", server.uri]
    process = subprocess.Popen(
        [sys.executable, "-m", "flightquant", *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while not server.faults.seen and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors.splitlines()[-1].endswith("flightquant: terminated")
    assert os.listdir(tmp_path) == ["m.safetensors"]
