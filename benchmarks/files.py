"""A bf16 checkpoint to a compressed-tensors folder in-process, beside the rate at which its files are read from cache.

Usage: python -m flightquant.benchmarks.files [BLOCKS] [FOLDER]

Each block of the model has the seven matrices of a transformer layer (4096x4096 and 11008x4096, 405 MB of random
bfloat16); five make 2 GB. The model is written below FOLDER (default: the system's temporary folder), read once so that
it is in the disk cache, and then, in turns: read by one thread and by two into a reused buffer of 1 MiB, looked at by
one thread, each word of the mapped files once, and quantized to int4 in groups of 128 on two threads, with and without
quality, with all else that a call does: hashing of the plan, the journal, output that is on the disk at the end.
Rates are bytes of the model in a second, medians of the turns; CPU time is that of the whole process, which is what two
cores cannot end before half of; the peak memory is that of the process that quantizes.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from flightquant.client.convert import Selection
    from flightquant.spec import Command

SHAPES = {
    **{f"self_attn.{which}_proj": (4096, 4096) for which in "qkvo"},
    **{f"mlp.{which}_proj": (11008, 4096) for which in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
BUFFER = 1 << 20
WINDOW = 16 << 20
ROUNDS = 7


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


def look_at_all(folder: Path) -> None:
    """Every word of the mapped files, whose pages are given back behind it."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for at in range(0, len(mapped) // 8 * 8, WINDOW):
                words = np.frombuffer(mapped, np.uint64, min(WINDOW, len(mapped) - at) // 8, at)
                np.bitwise_or.reduce(words)
                del words
                mapped.madvise(mmap.MADV_DONTNEED, at, min(WINDOW, len(mapped) - at))


def quantizer(model: Path, output: Path, quality: bool) -> Callable[[], object]:
    """The call to measure; its output is thrown away before the next."""
    from flightquant.client import QuantClient, open_source
    from flightquant.client.convert import convert
    from flightquant.client.recipes import Recipe

    client = QuantClient("local", n_threads=2)
    recipe = Recipe.parse({"scheme": "int4", "group_size": 128})

    def quantize(layers: Selection, command: Command) -> Iterator[pa.RecordBatch]:
        return client.stream(layers, **{**command.options(), "metrics": quality})

    def call() -> object:
        with open_source(model) as source:
            return convert(source, output, recipe, quantize)

    return call


def child(model: Path, output: Path) -> None:
    """Print the median seconds and CPU seconds of each way, and the peak memory in KiB, as JSON."""
    ways: tuple[Callable[[], object], ...] = (
        lambda: read_all(model, 1),
        lambda: read_all(model, 2),
        lambda: look_at_all(model),
        quantizer(model, output, quality=True),
        quantizer(model, output, quality=False),
    )
    taken: list[list[tuple[float, float]]] = [[] for _ in ways]
    for turn in range(ROUNDS + 1):
        for way, held in zip(ways, taken, strict=True):
            shutil.rmtree(output, ignore_errors=True)
            started, busy = time.perf_counter(), time.process_time()
            way()
            if turn:  # the first warms up
                held.append((time.perf_counter() - started, time.process_time() - busy))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    medians = [[statistics.median(each) for each in zip(*held, strict=True)] for held in taken]
    print(json.dumps([*medians, peak]))


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
        *taken, peak = json.loads(done.stdout)
    reading = [seconds for seconds, _ in taken[:3]]
    print(f"{nbytes / 1e9:.2f} GB of bfloat16, medians of {ROUNDS}; load {os.getloadavg()[0]:.1f}")
    for name, seconds in zip(("read, 1 thread", "read, 2 threads", "looked at, mapped"), reading, strict=True):
        print(f"{name:<26} {nbytes / seconds / 1e9:6.2f} GB/s")
    for name, (seconds, busy) in zip(("int4", "int4, without quality"), taken[3:], strict=True):
        shares = ", ".join(f"{each / seconds:.2f}" for each in reading)
        print(f"{name:<26} {nbytes / seconds / 1e9:6.2f} GB/s, {shares} of these; {busy:.2f} s of CPU time")
    print(f"{'peak memory':<26} {peak / 1024:6.0f} MiB")


if __name__ == "__main__":
    main()
