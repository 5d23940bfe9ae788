"""SIGTERM and Ctrl-C at any moment of a client's life: ``python tests/fq_interrupts.py [STARTS] [SEED] [CLIENT]``.

Each start is a client that we ship, or a script that uses the library, with a server in one of the states that make
clients wait, and is sent a signal at a seeded moment. It has to end soon, and must leave no half of an output. What
lives on tells its stacks, by py-spy where that is installed.
Prints the longest that each took from the signal to its end; exits 1 if one took too long or left something broken.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from fq_process import server_process
from safetensors.numpy import save_file

from flightquant.client import open_source

HANGS_S = 5.0
"""Seconds after which a client counts as hung."""
GIVEN_UP_S = 130.0
LATEST_S, LOCAL_LATEST_S = 5.0, 1.5
LAYERS, SHAPE = 24, (1024, 2048)

SCRIPT = """
import asyncio, signal, sys
import numpy as np
def end(number, frame): sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
import flightquant
from flightquant.client import AsyncQuantClient, QuantClient, Retry
uri = sys.argv[1]
made = np.random.default_rng(0).standard_normal((1024, 2048), np.float32)
weights = {f"layers.{i}.weight": made for i in range(24)}
"""
SCRIPTS = {
    "sync": "with QuantClient(uri) as client:\n    while True: client.quantize(weights, 'int4', group_size=128)\n",
    "stream": "with QuantClient(uri) as client:\n"
    "    while True:\n        for batch in client.stream(weights, 'q3_k'): pass\n",
    "asyncio": "async def main():\n    async with AsyncQuantClient(uri) as client:\n"
    "        while True:\n            async for batch in client.stream(weights, 'int4'): pass\n"
    "asyncio.run(main())\n",
    "gathered": "async def main():\n    async with AsyncQuantClient(uri) as client:\n"
    "        while True: await asyncio.gather(*(client.quantize(weights, 'int4') for _ in range(4)))\n"
    "asyncio.run(main())\n",
    "in-process": "big = np.resize(made, (8192, 8192))\nwhile True: flightquant.quantize({'big': big}, 'q3_k')\n",
}
COMMANDS = {
    "quantize": ("quantize", "MODEL", "-o", "OUT"),
    "quantize slowly": ("quantize", "MODEL", "-o", "OUT.parquet", "--scheme", "q3_k"),
    "verify": ("verify", "MODEL", "TWIN"),
    "dequantize": ("dequantize", "TWIN", "-o", "OUT"),
    "inspect": ("inspect", "MODEL"),
    "dry run": ("quantize", "MODEL", "-o", "OUT", "--dry-run"),
    "quantize on a server": ("quantize", "MODEL", "-o", "OUT", "--server", "URI"),
    "ping": ("ping", "URI", "--timeout", "300"),
}
"""The command line's clients: those with URI go to servers in all states."""


@contextmanager
def silent() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def black_hole() -> Iterator[str]:
    """A port whose queue is full: the kernel drops what comes, as a network that is gone does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as held:
        for _ in range(4):
            sock = held.enter_context(socket.socket())
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(listener.getsockname())
        yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    """A port where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"grpc://127.0.0.1:{sock.getsockname()[1]}"


class Situations:
    """The servers, each started once, in the states that a client may meet."""

    def __init__(self, held: ExitStack) -> None:
        self._good = held.enter_context(server_process("--log-level", "error"))
        self._full = held.enter_context(server_process("--log-level", "error", "--max-calls", "1", "--max-queued", "0"))
        occupier = [sys.executable, "-c", SCRIPT + "import time\ndef slow():\n"
                    "    for item in weights.items():\n        yield item\n        time.sleep(1e6)\n"
                    "class W(dict):\n    def items(self): return slow()\n"
                    "list(QuantClient(uri).stream(W(weights), 'int4'))\n"]  # fmt: skip
        self._occupier = subprocess.Popen([*occupier, self._full.location])
        held.callback(self._occupier.wait)
        held.callback(self._occupier.kill)
        self.uris = {
            "good": self._good.location,
            "halted later": self._good.location,
            "halted before": self._good.location,
            "overloaded": self._full.location,
            "silent": held.enter_context(silent()),
            "black hole": held.enter_context(black_hole()),
            "closed": held.enter_context(closed()),
            "two, one dead": f"{self._good.location},{held.enter_context(silent())}",
        }

    def halt(self) -> None:
        """SIGSTOP to the good server."""
        self._good.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._good.signal(signal.SIGCONT)


def stacks(pid: int) -> str:
    """What every thread of a process is at."""
    words = ["py-spy", "dump", "--pid", str(pid)]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}"


def clients(folder: Path) -> dict[str, tuple[Callable[[str, Path], list[str]], bool]]:
    """How each is started, given the server's address and the output's name, and whether it calls a server."""

    def script(text: str) -> Callable[[str, Path], list[str]]:
        return lambda uri, out: [sys.executable, "-c", SCRIPT + text, uri]

    def command(words: tuple[str, ...]) -> Callable[[str, Path], list[str]]:
        def made(uri: str, out: Path) -> list[str]:
            names = {"MODEL": folder / "model", "TWIN": folder / "twin", "URI": uri}
            filled = [str(names.get(word, word)).replace("OUT", str(out)) for word in words]
            return [sys.executable, "-m", "flightquant", *filled]

        return made

    found = {f"script: {name}": (script(text), name != "in-process") for name, text in SCRIPTS.items()}
    return found | {f"flightquant: {name}": (command(words), "URI" in words) for name, words in COMMANDS.items()}


def prepare(folder: Path) -> None:
    """A model and its quantized twin."""
    (folder / "model").mkdir()
    made = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    save_file({f"layers.{i}.weight": made for i in range(LAYERS)}, folder / "model" / "model.safetensors")
    words = [sys.executable, "-m", "flightquant", "quantize", str(folder / "model"), "-o", str(folder / "twin")]
    subprocess.run(words, check=True, capture_output=True)


def broken(folder: Path) -> str:
    """What is wrong with an output that is there, if one is."""
    for path in folder.glob("out*"):
        try:
            if path.suffix == ".parquet":
                parquet.read_table(path)
                continue
            with open_source(str(path)) as source:
                for _ in source.read():
                    pass
        except Exception as error:
            return f"{path.name}: {error}"
    return ""


def start_and_interrupt(
    rng: np.random.Generator, name: str, folder: Path, situations: Situations
) -> tuple[str, float, str]:
    """One client's life: where, the seconds from the signal to its end, and what was wrong."""
    made, remote = clients(folder)[name]
    where = str(rng.choice(list(situations.uris))) if remote else "here"
    number = signal.SIGINT if rng.integers(0, 2) else signal.SIGTERM
    at = float(rng.uniform(0, LATEST_S if remote else LOCAL_LATEST_S))
    uri = situations.uris.get(where, "")
    outputs = folder / "outputs"
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    if where == "halted before":
        situations.halt()
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            made(uri, outputs / "out"), stdout=out, stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    told = f"{name}, {where}, {number.name} after {at:.2f} s"
    problem = ""
    try:
        if where == "halted later":
            time.sleep(min(at, 2.0))
            situations.halt()
            time.sleep(max(0.0, at - 2.0))
        else:
            time.sleep(at)
        began = time.monotonic()
        early = process.poll() is not None
        process.send_signal(number)
        try:
            code = process.wait(HANGS_S)
        except subprocess.TimeoutExpired:
            problem = f"HANGS {told}:\n{stacks(process.pid)}"
            with suppress(subprocess.TimeoutExpired):
                process.wait(GIVEN_UP_S)
            problem += f"\n... lived for {time.monotonic() - began:.1f} s"
            code = None
        took = time.monotonic() - began
    finally:
        process.kill()
        process.wait()
        situations.go_on()
    text = log.read_text()
    if not early and code in (-signal.SIGABRT, -signal.SIGSEGV):
        problem = f"DIED of {code}, {told}: {text[-2000:]}"
    if not early and name.startswith("flightquant") and "Traceback" in text and "__main__.py" in text:
        problem = f"TRACEBACK {told}: {text[-3000:]}"
    problem = problem or (f"BROKEN {told}: {wrong}" if (wrong := broken(outputs)) else "")
    return ("ended before" if early else f"{number.name}: {code}"), 0.0 if early else took, problem


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    starts, seed = int(words[0]) if words else 200, int(words[1]) if words[1:] else 20261122
    longest: dict[str, float] = defaultdict(float)
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    problems = 0
    with tempfile.TemporaryDirectory() as made, ExitStack() as held:
        folder = Path(made)
        prepare(folder)
        situations = Situations(held)
        names = [name for name in clients(folder) if not words[2:] or words[2] in name]
        for number in range(starts):
            rng = np.random.default_rng([seed, number])
            name = names[number % len(names)]
            how, took, problem = start_and_interrupt(rng, name, folder, situations)
            ends[name][how] += 1
            longest[name] = max(longest[name], took)
            if problem:
                problems += 1
                sys.stdout.write(f"{number}: {problem}\n")
                sys.stdout.flush()
    for name in names:
        told = ", ".join(f"{count} {how}" for how, count in ends[name].most_common())
        sys.stdout.write(f"{name}: longest {longest[name]:.1f} s; {told}\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
