"""Coverage-guided fuzzing of the way from bytes to kernels: ``make fuzz SECONDS=300`` (needs atheris, from PyPI).

The guide sees the branches of our own Python, checks and engine, and those of the kernels where ``scripts/fuzz`` built
them for it. Bytes that parse as an Arrow stream go to a session of the engine, which must answer or refuse by a typed
error; anything else that is raised, and a crash, ends the run with the input in a file. It begins with a valid batch of
every weight type, of every scheme, and of quantized rows; arguments are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found,unused-ignore]

with atheris.instrument_imports(include=["flightquant"]):
    import fq_fuzz
    import numpy as np
    import pyarrow as pa
    from fq_ipc import serialized
    from fq_testing import request

    from flightquant.cython_core.engine import Engine
    from flightquant.cython_core.restore import QuantizedSession
    from flightquant.errors import FlightquantError, LayerError
    from flightquant.schemes import SCHEMES
    from flightquant.server.app import INLINE_TILES
    from flightquant.spec import Command

ENGINE = Engine(n_threads=1, inline_tiles=INLINE_TILES)
COMMAND = Command.build(scheme="int8", granularity="tensor")
DEQUANTIZE, VERIFY = Command.build(op="dequantize"), Command.build(op="verify")
UNREADABLE = (pa.ArrowException, OSError, EOFError, StopIteration, ValueError, KeyError, MemoryError)


def columns(schema: pa.Schema) -> list[str]:
    """The names of a schema that nobody has checked."""
    try:
        return list(schema.names)
    except UnicodeDecodeError:
        return []


def one_input(data: bytes) -> None:
    """Read, check and quantize, or give back what is quantized."""
    try:
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
    except UNREADABLE:
        return
    try:
        names = columns(batch.schema)
        if "quantized_data" in names:
            command = VERIFY if "weights" in names else DEQUANTIZE
            answer = QuantizedSession(ENGINE, batch.schema, command, fq_fuzz.LIMITS).answer(batch)
        else:
            answer = ENGINE.session(batch.schema, COMMAND, fq_fuzz.LIMITS).quantize(batch)
    except (FlightquantError, LayerError) as error:
        if error.code not in ("invalid_request", "too_large"):
            raise
        return
    answer.batch.validate(full=True)


def first_inputs() -> dict[str, pa.RecordBatch]:
    """Valid batches by name."""
    batches = {kind: fq_fuzz.valid_batch(kind) for kind in fq_fuzz.TYPES}
    batches |= {kind: fq_fuzz.quantized_batch(kind) for kind in fq_fuzz.QUANTIZED}
    weights = np.random.default_rng(1).standard_normal((2, 256), dtype=np.float32)
    batches |= {name: request({"w": weights}, columns={"scheme": pa.array([name])}) for name in SCHEMES}
    return batches


def main() -> None:
    """Write the first inputs, and go."""
    with tempfile.TemporaryDirectory() as folder:
        for name, batch in first_inputs().items():
            Path(folder, name).write_bytes(serialized(batch))
        atheris.Setup([sys.argv[0], "-max_len=16384", *sys.argv[1:], folder], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
