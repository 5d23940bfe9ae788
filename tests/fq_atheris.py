"""Coverage-guided fuzzing of the way from bytes to kernels: ``make fuzz SECONDS=300`` (needs atheris, from PyPI).

The guide sees the branches of our own Python, checks and engine. Bytes that parse as an Arrow stream go to a session of
the engine, which must answer or refuse by a typed error; anything else that is raised, and a crash, ends the run with
the input in a file. It begins with a valid batch of every weight type; arguments are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found,unused-ignore]

with atheris.instrument_imports(include=["flightquant"]):
    import fq_fuzz
    import pyarrow as pa
    from fq_ipc import serialized

    from flightquant.cython_core.engine import Engine
    from flightquant.errors import FlightquantError, LayerError
    from flightquant.server.app import INLINE_TILES
    from flightquant.spec import Command

ENGINE = Engine(n_threads=1, inline_tiles=INLINE_TILES)
COMMAND = Command.build(scheme="int8", granularity="tensor")
UNREADABLE = (pa.ArrowException, OSError, EOFError, StopIteration, ValueError, KeyError, MemoryError)


def one_input(data: bytes) -> None:
    """Read, check and quantize."""
    try:
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
    except UNREADABLE:
        return
    try:
        answer = ENGINE.session(batch.schema, COMMAND, fq_fuzz.LIMITS).quantize(batch)
    except (FlightquantError, LayerError) as error:
        if error.code not in ("invalid_request", "too_large"):
            raise
        return
    answer.batch.validate(full=True)


def main() -> None:
    """Write the first inputs, and go."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in fq_fuzz.TYPES:
            Path(folder, kind).write_bytes(serialized(fq_fuzz.valid_batch(kind)))
        atheris.Setup([sys.argv[0], "-max_len=16384", *sys.argv[1:], folder], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
