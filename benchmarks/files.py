"""A bf16 checkpoint to a compressed-tensors folder in-process, beside the rate at which its files are read from cache.

Usage: python -m flightquant.benchmarks.files [BLOCKS] [FOLDER]

Each block of the model has the seven matrices of a transformer layer (4096x4096 and 11008x4096, 405 MB of random
bfloat16); five make 2 GB. The model is written below FOLDER (default: the system's temporary folder), read once so that
it is in the disk cache, and then, in turns: read by one thread and by two into a reused buffer of 1 MiB, and quantized
to int4 in groups of 128 on two threads, with all that a call does: hashing of the plan, quality, output on the disk.
Rates are bytes of the model in a second, medians of five turns; the peak memory is that of the process that quantizes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SHAPES = {
    **{f"self_attn.{which}_proj": (4096, 4096) for which in "qkvo"},
    **{f"mlp.{which}_proj": (11008, 4096) for which in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
BUFFER = 1 << 20
ROUNDS = 5


def write_model(folder: Path, blocks: int) -> int:
    """A folder of one shard for each block; its bytes."""
    folder.mkdir()
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    bits = (noise.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    for block in range(blocks):
        header, position = {}, 0
        for name, shape in SHAPES.items():
            end = position + 2 * shape[0] * shape[1]
            header[f"model.layers.{block}.{name}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [position, end],
            }
            position = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / f"model-{block + 1:05}-of-{blocks:05}.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for number, shape in enumerate(SHAPES.values()):
                file.write(np.resize(np.roll(bits, 64 * (7919 * block + number)), shape).tobytes())
    (folder / "config.json").write_text("{}")
    return sum(path.stat().st_size for path in folder.iterdir())


def read_all(folder: Path, threads: int) -> None:
    """Every file, each thread its share, into one buffer for each thread."""

    def read(number: int) -> None:
        buffer = memoryview(bytearray(BUFFER))
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            at, end = size * number // threads, size * (number + 1) // threads
            file = os.open(path, os.O_RDONLY)
            try:
                while at < end:
                    at += os.preadv(file, [buffer[: min(BUFFER, end - at)]], at)
            finally:
                os.close(file)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def quantizer(model: Path, output: Path) -> Callable[[], object]:
    """The call to measure; its output is thrown away before the next."""
    from flightquant.client import QuantClient, open_source
    from flightquant.client.convert import convert
    from flightquant.client.recipes import Recipe

    client = QuantClient("local", n_threads=2)
    recipe = Recipe.parse({"scheme": "int4", "group_size": 128})

    def call() -> object:
        with open_source(model) as source:
            return convert(source, output, recipe, lambda layers, command: client.stream(layers, **command.options()))

    return call


def child(model: Path, output: Path) -> None:
    """Print the median seconds of reading with one thread, with two, of quantizing, and the peak memory in KiB."""
    ways: tuple[Callable[[], object], ...] = (
        lambda: read_all(model, 1),
        lambda: read_all(model, 2),
        quantizer(model, output),
    )
    seconds: list[list[float]] = [[], [], []]
    for turn in range(ROUNDS + 1):
        for way, held in zip(ways, seconds, strict=True):
            shutil.rmtree(output, ignore_errors=True)
            started = time.perf_counter()
            way()
            if turn:  # the first warms up
                held.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(*(statistics.median(held) for held in seconds), peak)


def main() -> None:
    """Make the model, measure in a process of its own, print a row for each."""
    if len(sys.argv) == 4:
        child(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    parent = sys.argv[2] if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        model, output = Path(folder) / "model", Path(folder) / "out"
        nbytes = write_model(model, blocks)
        command = [sys.executable, "-m", "flightquant.benchmarks.files", "child", str(model), str(output)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        one, two, quantized, peak = map(float, done.stdout.split())
    print(f"{nbytes / 1e9:.2f} GB of bfloat16, median of {ROUNDS}; load {os.getloadavg()[0]:.1f}")
    print(f"read, 1 thread   {nbytes / one / 1e9:6.2f} GB/s")
    print(f"read, 2 threads  {nbytes / two / 1e9:6.2f} GB/s")
    shares = f"{one / quantized:.2f} and {two / quantized:.2f} of reading"
    print(f"int4, 2 threads  {nbytes / quantized / 1e9:6.2f} GB/s, {shares}")
    print(f"peak memory      {peak / 1024:6.0f} MiB")


if __name__ == "__main__":
    main()
