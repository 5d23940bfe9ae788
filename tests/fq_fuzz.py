"""Seeded mutations of a valid request batch against the engine, in a process of its own.

``python tests/fq_fuzz.py TYPE COUNT SEED`` prints one JSON line of totals. Every batch that still parses goes to
``Session.quantize``, which must refuse it by a typed error or answer every ``ok`` row as the reference does, and never
with a byte of the canary that the heap was filled with. The number of the mutation under work stands in the file named
by FLIGHTQUANT_FUZZ_AT, so that a crash names its input. ``--unchecked`` switches the checks off: then it must not pass.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from fq_testing import check_row, reference_layer, request, same_bits, stored_as

from flightquant import reference
from flightquant.cython_core import _quantize
from flightquant.cython_core import engine as engine_module
from flightquant.cython_core._arrow import ListColumn
from flightquant.cython_core.engine import Engine, Limits
from flightquant.cython_core.magnitude import AmaxSession
from flightquant.cython_core.restore import QuantizedSession
from flightquant.cython_core.validate import CheckedBatch, Request
from flightquant.errors import FlightquantError, LayerError
from flightquant.reference.numeric import widen
from flightquant.server.app import INLINE_TILES
from flightquant.spec import OVERRIDE_KEYS, Command
from flightquant.wire import check_request_schema

TYPES: dict[str, tuple[str, str, pa.DataType | None]] = {
    f"{name}-{kind}": (name.split("_")[0], kind, pa.binary(2) if name == "bfloat16_binary" else None)
    for name in ("float32", "float16", "float64", "bfloat16", "bfloat16_binary")
    for kind in ("list", "large_list", "fixed_size_list")
}
QUANTIZED = {
    "dequantize": ("dequantize", False),
    "dequantize-large": ("dequantize", True),
    "verify": ("verify", False),
    "verify-large": ("verify", True),
}
"""Batches of quantized rows: the operation that they are sent to, and whether their offsets have 64 bits."""
AMAX = {"amax": "float32-list", "amax-bfloat16": "bfloat16-large_list"}
"""Batches that are asked for magnitudes: their weights."""
CANARY = b"\xc5\x1a\x9e\xb7\xd3\x8f\xa6\xe1"
LIMITS = Limits(max_rows=1000, max_layer_bytes=1 << 20, max_batch_bytes=1 << 22)
INTERESTING = (0, 1, -1, 5, 100, -7, 2**31 - 1, -(2**31), 10**6, 10**9, 2**62, 2**63 - 1, -(2**63), 4, 8, 64)


def valid_batch(kind: str) -> pa.RecordBatch:
    """Six small layers with every optional column that has a pointer behind it."""
    dtype, lists, storage = TYPES[kind]
    rng = np.random.default_rng(1)
    layers = {f"model.layers.{i}.w": stored_as(rng.standard_normal((2, 32)), dtype) for i in range(6)}
    columns = {
        "scheme": pa.array([None, "int8", "q8_0", "int4", None, "q4_0"]),
        "group_size": pa.array([None, None, None, 64, 32, None], pa.int32()),
        "symmetric": pa.array([None, False, None, None, True, None]),
        "global_amax": pa.array([None, 3.0, None, None, None, None], pa.float32()),
        "row_offset": pa.array([None, 2, None, 0, None, None], pa.int64()),
        "x_note": pa.array(["a", None, "ccc", "", "e", "f"]),
        "x_list": pa.array([[1, 2], None, [], [3], [4], [5, 6, 7]], pa.list_(pa.int16())),
    }
    batch = request(layers, dtype, kind=lists, storage=storage, columns=columns)
    if kind == "float32-large_list":
        names = batch.column("layer_name").dictionary_encode()
        batch = pa.RecordBatch.from_arrays(
            [names, *batch.columns[1:]], schema=batch.schema.set(0, pa.field("layer_name", names.type))
        )
    return batch


def quantized_batch(kind: str) -> pa.RecordBatch:
    """Eight small layers as six families answer them, with every column that has a pointer behind it."""
    op, large = QUANTIZED[kind]
    rng = np.random.default_rng(1)
    schemes = ["int4", "int8", "q8_0", "fp8_e4m3", "nf4", "q5_1", "int3", "arrowquant"]
    layers = {f"layers.{i}.w": rng.standard_normal((2, 64)).astype(np.float32) for i in range(len(schemes))}
    columns = {
        "scheme": pa.array(schemes),
        "group_size": pa.array([32, None, None, None, None, None, 64, None], pa.int32()),
        "symmetric": pa.array([False, True, True, True, True, True, False, True]),
        "granularity": pa.array([None, "tensor", None, None, None, None, None, None]),
        "x_note": pa.array(["a", None, "ccc", "", "e", "f", "g", "h"]),
    }
    sent = request(layers, columns=columns)
    engine = Engine(n_threads=1)
    batch = engine.session(sent.schema, Command.build(scheme="int4", metrics=False)).quantize(sent).batch
    names = ["layer_name", "shape", "status", "error", "scheme", "packing", "bit_width", "group_size", "quantized_data"]
    batch = batch.select([*names, "scales", "zero_points", "x_note"])
    if large:
        for name in ("layer_name", "scheme", "quantized_data", "scales", "zero_points", "shape"):
            kind_of = batch.schema.field(name).type
            if pa.types.is_list(kind_of):
                kind_of = pa.large_list(kind_of.value_type)
            else:
                kind_of = pa.large_binary() if name == "quantized_data" else pa.large_utf8()
            batch = batch.set_column(batch.schema.names.index(name), name, batch.column(name).cast(kind_of))
    if op == "verify":
        batch = batch.append_column(sent.schema.field("weights"), sent.column("weights"))
    return batch


def check_restored(batch: pa.RecordBatch, answer: Any, op: str) -> int:
    """Compare every ``ok`` row with the reference; the number of such rows."""
    answers = answer.batch
    answers.validate(full=True)
    assert answers.num_rows == batch.num_rows
    good = 0
    for i in range(batch.num_rows):
        if answers.column("status")[i].as_py() != "ok":
            continue
        good += 1
        row = batch.slice(i, 1)
        shape = batch.column("shape")[i].as_py()
        if 0 in shape:
            continue
        (weights,) = reference.dequantize(row).values()
        nan = np.isnan(weights.reshape(-1))
        if op == "verify":
            given = batch.column("weights")[i].values.to_numpy().reshape(reference.matrix_shape(tuple(shape)))
            assert np.isfinite(given).all()
            zeros = row.column("zero_points")[0]
            counted = row.column("scales")[0]
            spec = reference.stored_spec(
                row.column("scheme")[0].as_py(),
                bit_width=row.column("bit_width")[0].as_py() if "bit_width" in row.schema.names else None,
                group_size=row.column("group_size")[0].as_py() if "group_size" in row.schema.names else None,
                one_scale=len(counted) == 1 and len(given) != 1 if counted.is_valid else None,
                asymmetric=zeros.is_valid,
            )
            expected = reference.compare(given, weights.reshape(given.shape), spec)
            np.testing.assert_array_equal(answer.sums[i], expected)
            continue
        got = answers.column("weights")[i].values.to_numpy()
        assert (np.isnan(got) == nan).all()
        same_bits(np.where(nan, 0, got).astype("f4"), np.where(nan, 0, weights.reshape(-1)).astype("f4"), "weights")
    return good


def mutate(stream: bytes, rng: np.random.Generator) -> bytes:
    """One to four small changes: bytes, bits, and integers that like to break bounds."""
    changed = bytearray(stream)
    for _ in range(int(rng.integers(1, 5))):
        how = int(rng.integers(0, 4))
        at = int(rng.integers(0, len(changed) - 8))
        if how == 0:
            changed[at] = int(rng.integers(0, 256))
        elif how == 1:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        else:
            width = 4 if how == 2 else 8
            at -= at % width
            value = int(rng.choice(np.array(INTERESTING, object))) & (2 ** (8 * width) - 1)
            changed[at : at + width] = value.to_bytes(width, "little")
    return bytes(changed)


def decoded(batch: pa.RecordBatch, i: int, dtype: str) -> Any:
    """Row ``i``'s weights with their shape, from a batch that the engine has found valid; None if it has nulls."""
    cell = batch.column("weights")[i]
    if not cell.is_valid or cell.values.null_count:
        return None
    if pa.types.is_fixed_size_binary(cell.values.type):
        values = np.array([int.from_bytes(value.as_py(), "little") for value in cell.values], np.uint16)
    else:
        values = cell.values.to_numpy(zero_copy_only=False)
    shape = batch.column("shape")[i].as_py() if "shape" in batch.schema.names else None
    return values.reshape(values.size if shape is None else shape)


def check_answer(batch: pa.RecordBatch, answers: pa.RecordBatch, sums: Any, dtype: str, command: Command) -> int:
    """Compare every ``ok`` row with the reference; the number of such rows."""
    answers.validate(full=True)
    assert answers.num_rows == batch.num_rows
    good = 0
    for i in range(batch.num_rows):
        if answers.column("status")[i].as_py() != "ok":
            continue
        weights = decoded(batch, i, dtype)
        assert weights is not None, "a row with nulls was answered"
        present = [name for name in OVERRIDE_KEYS if name in batch.schema.names]
        given = {name: batch.column(name)[i].as_py() for name in present}
        row_command = command.override({name: value for name, value in given.items() if value is not None})
        spec = row_command.layer_spec()
        amax = batch.column("global_amax")[i].as_py() if "global_amax" in batch.schema.names else None
        shared = spec.granularity == "tensor" and spec.symmetric
        expected = remembered(weights, dtype, row_command, amax if shared else None)
        check_row(answers, i, expected)
        same_bits(sums[i], expected.sums, "sums")
        good += 1
    return good


_REMEMBERED: dict[Any, Any] = {}


def remembered(weights: Any, dtype: str, command: Command, amax: float | None) -> Any:
    """:func:`reference_layer`, once for each layer: most mutations leave most rows as they were."""
    key = dtype, weights.tobytes(), weights.shape, command, amax
    if key not in _REMEMBERED:
        if len(_REMEMBERED) >= 1000:
            _REMEMBERED.clear()
        _REMEMBERED[key] = reference_layer(weights, dtype, command, amax)
    return _REMEMBERED[key]


def check_amax(batch: pa.RecordBatch, answers: pa.RecordBatch, dtype: str) -> int:
    """Compare the magnitude of every ``ok`` row; the number of such rows."""
    answers.validate(full=True)
    assert answers.num_rows == batch.num_rows
    good = 0
    for i in range(batch.num_rows):
        amax = answers.column("amax")[i].as_py()
        assert (amax is not None) == (answers.column("status")[i].as_py() == "ok")
        if amax is None:
            continue
        weights = decoded(batch, i, dtype)
        assert weights is not None, "a row with nulls was answered"
        assert amax == np.abs(widen(weights, dtype)).max(initial=0)
        good += 1
    return good


def fill_heap(nbytes: int) -> None:
    """Leave the canary in memory that Arrow's pool and NumPy will hand out next."""
    for size in (64, 256, 1024, 4096, nbytes):
        held = [pa.allocate_buffer(size) for _ in range(4)]
        arrays = [np.frombuffer(buffer, np.uint8) for buffer in held]
        arrays += [np.empty(size, np.uint8) for _ in range(4)]
        for array in arrays:
            array.view("V8")[:] = CANARY


def unchecked(batch: pa.RecordBatch, request: Request, limits: Limits) -> CheckedBatch:
    """What ``check_content`` returns, with nothing checked: the control."""
    weights = ListColumn(batch.column("weights"))
    lengths = np.diff(weights.offsets)
    starts = weights.address + weights.offsets[:-1] * weights.value_bytes
    matrix = np.stack([lengths // 32, np.full_like(lengths, 32)], axis=1)
    names, shapes = (batch.column(name) for name in ("layer_name", "shape"))
    return CheckedBatch(names, weights, starts, lengths, int(lengths.sum()), matrix, shapes)


def run(kind: str, count: int, seed: int) -> dict[str, int]:
    """Try ``count`` mutations; the totals."""
    op = QUANTIZED[kind][0] if kind in QUANTIZED else "amax" if kind in AMAX else "quantize"
    batch = quantized_batch(kind) if kind in QUANTIZED else valid_batch(AMAX.get(kind, kind))
    if op == "amax":
        batch = batch.drop_columns(["global_amax"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    stream = sink.getvalue().to_pybytes()
    at: Any = bytearray(8)
    if "FLIGHTQUANT_FUZZ_AT" in os.environ:
        with open(os.environ["FLIGHTQUANT_FUZZ_AT"], "r+b") as file:
            at = mmap.mmap(file.fileno(), 8)
    # As in the server: small batches are computed on the caller's thread.
    engine = Engine(n_threads=2, inline_tiles=INLINE_TILES)
    command = Command.build(scheme="int8", granularity="tensor") if op == "quantize" else Command.build(op=op)
    totals = {"tried": 0, "unreadable": 0, "refused": 0, "answered": 0, "rows_ok": 0, "rows_failed": 0}
    usual = _quantize.STREAM_FROM
    for number in range(count):
        at[:8] = number.to_bytes(8, "little")
        _quantize.STREAM_FROM = (usual, 0)[number % 2]  # every second one stores packed bytes as large batches do
        rng = np.random.default_rng([seed, number])
        mutated = stream if number == 0 else mutate(stream, rng)
        totals["tried"] += 1
        try:
            with pa.ipc.open_stream(mutated) as reader:
                batches = [reader.read_next_batch()]
        except (pa.ArrowException, OSError, EOFError, StopIteration, ValueError, KeyError, MemoryError):
            totals["unreadable"] += 1
            continue
        for read in batches:
            fill_heap(len(stream))
            try:
                if op == "quantize":
                    answer = engine.session(read.schema, command, LIMITS).quantize(read)
                elif op == "amax":
                    answer = AmaxSession(engine, read.schema, command, LIMITS).quantize(read)
                else:
                    answer = QuantizedSession(engine, read.schema, command, LIMITS).answer(read)
            except (FlightquantError, LayerError) as error:
                assert error.code in ("invalid_request", "too_large"), error.code
                totals["refused"] += 1
                continue
            totals["answered"] += 1
            if op == "quantize":
                ok = check_answer(read, answer.batch, answer.sums, check_request_schema(read.schema), command)
            elif op == "amax":
                ok = check_amax(read, answer.batch, check_request_schema(read.schema))
            else:
                ok = check_restored(read, answer, op)
            totals["rows_ok"] += ok
            totals["rows_failed"] += read.num_rows - ok
            assert CANARY not in answer.batch.serialize().to_pybytes(), "a byte of the heap's last user was answered"
    return totals


def main() -> None:
    """Run one type from the command line."""
    kind, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:] == ["--unchecked"]:
        with (
            mock.patch.object(engine_module, "check_frame", return_value=None),
            mock.patch.object(engine_module, "plain_call", return_value=None),
            mock.patch.object(engine_module, "check_content", unchecked),
        ):
            totals = run(kind, count, seed)
    else:
        totals = run(kind, count, seed)
    sys.stdout.write(json.dumps(totals) + "\n")


if __name__ == "__main__":
    main()
