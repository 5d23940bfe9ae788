"""``bytes_copied`` is 0 because the kernels read the received buffers and write the answer's: shown by addresses."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from fq_testing import request, stored_as

import flightquant
from flightquant.cython_core import _plain as plain_module
from flightquant.cython_core import local
from flightquant.cython_core import output as output_module
from flightquant.cython_core import work as work_module
from flightquant.cython_core._memory import OutputMemory
from flightquant.cython_core._quantize import Layout, Plan
from flightquant.cython_core.engine import Engine
from flightquant.spec import Command

MIB = 1 << 20
COMMAND = Command.build(scheme="int4", group_size=128, symmetric=False)
WEIGHTS = np.random.default_rng(0).standard_normal((3, 2, 128)).astype(np.float32)
STORAGES = [
    ("float32", pa.float32()),
    ("float16", pa.float16()),
    ("float64", pa.float64()),
    ("bfloat16", pa.uint16()),
    ("bfloat16", pa.binary(2)),
]


@contextmanager
def plans() -> Iterator[list[dict[str, np.ndarray]]]:
    """The addresses that the kernels get in all plans made meanwhile."""
    seen: list[dict[str, np.ndarray]] = []

    def note(jobs: np.ndarray, *outputs: int) -> None:
        # The first columns of a job: where its weights are, and its bytes, scales and zero points in their outputs.
        seen.append({"weights": jobs[:, 0].copy()})
        for column, (name, base) in enumerate(zip(("data", "scales", "zeros"), outputs, strict=True), start=1):
            seen[-1][name] = jobs[:, column] + base

    def spy(jobs: np.ndarray, amax: np.ndarray, isa: str, measure: bool, *rest: Any) -> Plan:
        note(jobs, *rest[:3])
        return Plan(jobs, amax, isa, measure, *rest)

    class Spy(Layout):
        def __init__(self, *arrays: np.ndarray) -> None:
            self.jobs = arrays[7]

        def plan(self, isa: str, measure: bool, *rest: Any) -> Plan:
            note(self.jobs, *rest[:3])
            return super().plan(isa, measure, *rest)

    with mock.patch.object(work_module, "Plan", spy), mock.patch.object(plain_module, "Layout", Spy):
        yield seen


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize(("dtype", "storage"), STORAGES, ids=str)
def test_kernels_read_the_received_buffer_and_write_the_answers(
    any_engine: Engine, dtype: str, storage: pa.DataType, kind: str
) -> None:
    layers = {f"w{i}": stored_as(matrix, dtype) for i, matrix in enumerate(WEIGHTS)}
    batch = request(layers, dtype, kind=kind, storage=storage, alignment=5)
    values = batch.column("weights").values.buffers()[1]
    row_bytes = 256 * (8 if dtype == "float64" else 4 if dtype == "float32" else 2)
    for first in range(3):
        view = batch.slice(first)
        with plans() as seen:
            answers = any_engine.session(view.schema, COMMAND).quantize(view).batch
        assert len(seen) == 1
        assert seen[0]["weights"].tolist() == [values.address + i * row_bytes for i in range(first, 3)]
        for name, column, width in (
            ("data", "quantized_data", 128),
            ("scales", "scales", 8),
            ("zeros", "zero_points", 8),
        ):
            child = answers.column(column) if name == "data" else answers.column(column).values
            start = child.buffers()[2 if name == "data" else 1].address
            assert seen[0][name].tolist() == [start + i * width for i in range(3 - first)], name
        assert answers.column("bytes_copied").to_pylist() == [0] * (3 - first)


def test_a_received_message_is_read_where_it_lies(any_engine: Engine) -> None:
    """One contiguous buffer, as Flight hands it over, and a batch that points into it."""
    sink = pa.BufferOutputStream()
    batch = request({"a": WEIGHTS[0], "b": WEIGHTS[1]})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    message = sink.getvalue()
    received = pa.ipc.open_stream(message).read_next_batch()
    with plans() as seen:
        any_engine.session(received.schema, COMMAND).quantize(received)
    addresses = seen[0]["weights"]
    assert ((addresses >= message.address) & (addresses < message.address + message.size)).all()


POOLS: list[pa.MemoryPool] = []
"""Kept for ever: a buffer must not outlive its pool."""


@contextmanager
def allocations() -> Iterator[dict[str, int]]:
    """Peak bytes that Arrow's pool and Python (NumPy included) allocated meanwhile, and bytes of large outputs."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    POOLS.append(pool)
    peaks: dict[str, int] = {"outputs": 0}

    def output_memory(nbytes: int) -> OutputMemory:
        peaks["outputs"] += nbytes
        return OutputMemory(nbytes)

    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        with (
            mock.patch.object(output_module, "OutputMemory", output_memory),
            mock.patch.object(plain_module, "OutputMemory", output_memory),
        ):
            yield peaks
        peaks["python"] = tracemalloc.get_traced_memory()[1]
        peaks["arrow"] = pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int2", "int5", "fp8_e4m3", "q8_0", "q4_0", "q5_1", "iq4_nl"])
@pytest.mark.parametrize(("dtype", "storage"), STORAGES, ids=str)
def test_a_call_allocates_its_answer_and_little_else(
    any_engine: Engine, dtype: str, storage: pa.DataType, scheme: str, metrics: bool
) -> None:
    weights = stored_as(np.tile(WEIGHTS.reshape(-1), 8192), dtype).reshape(-1, 1024)
    batch = request({"w": weights}, dtype, storage=storage)
    session = any_engine.session(batch.schema, Command.build(scheme=scheme, metrics=metrics))
    session.quantize(batch)
    with allocations() as peaks:
        answers = session.quantize(batch).batch
    out = answers.column("bytes_out")[0].as_py()
    assert weights.nbytes >= 12 * MIB
    assert out <= peaks["arrow"] + peaks["outputs"] <= out + MIB // 16
    assert peaks["python"] < MIB // 4


def test_nothing_is_held_after_the_answer_is_dropped(any_engine: Engine) -> None:
    def once() -> None:
        batch = request({"w": np.tile(WEIGHTS, (64, 1, 1))})
        any_engine.session(batch.schema, COMMAND).quantize(batch)

    once()
    before = pa.total_allocated_bytes()
    for _ in range(20):
        once()
    assert pa.total_allocated_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_the_local_call_reads_arrays_where_they_lie(dtype: str) -> None:
    values = WEIGHTS.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arrays = {"a": values[0], "b": values[1:]}
    with plans() as seen:
        table = flightquant.quantize(arrays, "int4")
    assert [int(start) for plan in seen for start in plan["weights"]] == [
        array.ctypes.data for array in arrays.values()
    ]
    assert len(seen) == 1, "layers of one dtype are answered together"
    assert table.column("bytes_copied").to_pylist() == [0, 0]


def test_the_local_call_answers_runs_of_layers_together() -> None:
    arrays: dict[str, Any] = {f"w{i}": WEIGHTS[i % 3].astype(["<f4", "<f2"][i // 2 % 2]) for i in range(7)}
    with mock.patch.object(local, "MAX_JOINED_LAYERS", 2), plans() as seen:
        table = flightquant.quantize(arrays, "int4")
    assert [len(plan["weights"]) for plan in seen] == [2, 2, 2, 1]
    assert table.column("layer_name").to_pylist() == list(arrays)
    for i, (name, array) in enumerate(arrays.items()):
        alone = flightquant.quantize({name: array}, "int4").drop_columns(["kernel_ns"])
        assert table.slice(i, 1).drop_columns(["kernel_ns"]).to_pylist() == alone.to_pylist()


def test_the_local_call_reads_tables_where_they_lie() -> None:
    batches = [request({"a": WEIGHTS[0]}), request({"b": WEIGHTS[1], "c": WEIGHTS[2]})]
    with plans() as seen:
        flightquant.quantize(pa.Table.from_batches(batches), "int8")
    expected = [batch.column("weights").values.buffers()[1].address for batch in batches]
    assert [int(plan["weights"][0]) for plan in seen] == expected


@pytest.mark.parametrize("array", [WEIGHTS[:, :, ::2], WEIGHTS.astype(">f4"), WEIGHTS.transpose(2, 0, 1)])
def test_a_copy_that_had_to_be_made_is_counted(array: Any) -> None:
    table = flightquant.quantize({"plain": WEIGHTS, "strided": array}, "int8")
    assert table.column("bytes_copied").to_pylist() == [0, array.nbytes]
