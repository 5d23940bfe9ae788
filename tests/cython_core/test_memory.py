"""Output memory is used again, never twice at once, and not hoarded."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pyarrow as pa

import flightquant
from flightquant.cython_core._memory import MAX_KEPT_BYTES, MIN_BYTES, OutputMemory, bytes_kept


def test_memory_returns_when_its_last_user_is_gone_and_is_taken_again() -> None:
    memory = OutputMemory(3 * MIN_BYTES)
    address = memory.address
    array = pa.Array.from_buffers(pa.uint8(), 3 * MIN_BYTES, [None, pa.py_buffer(memory)])
    before = bytes_kept()
    del memory
    gc.collect()
    assert bytes_kept() == before  # the array still uses it
    view = array.slice(5, 7)
    del array
    assert bytes_kept() == before
    del view
    assert bytes_kept() >= before + 3 * MIN_BYTES
    taken = [OutputMemory(3 * MIN_BYTES - 100) for _ in range(65)]  # more than are kept
    assert address in [again.address for again in taken]


def test_two_users_never_have_the_same_memory() -> None:
    held = [OutputMemory(MIN_BYTES + size) for size in (0, 10, 20, 0, 10, 20)]
    spans = sorted((memory.address, memory.address + memory.nbytes) for memory in held)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_memory_that_is_much_too_large_is_not_taken() -> None:
    large = OutputMemory(40 * MIN_BYTES)
    address = large.address
    del large
    assert OutputMemory(2 * MIN_BYTES).address != address


def test_the_store_keeps_a_bounded_amount() -> None:
    held = [OutputMemory(20 * MIN_BYTES) for _ in range(10)]
    assert held[0].address % 64 == 0
    del held
    assert bytes_kept() <= MAX_KEPT_BYTES


def test_a_large_answer_lives_in_it_and_outlives_the_call() -> None:
    weights = np.random.default_rng(0).standard_normal((2048, 1024)).astype(np.float32)
    first = flightquant.quantize({"w": weights}, "int8")
    address = first.column("quantized_data").chunk(0).buffers()[2].address
    expected = first.column("quantized_data")[0].as_py()
    second = flightquant.quantize({"w": -weights}, "int8")
    assert second.column("quantized_data").chunk(0).buffers()[2].address != address
    assert first.column("quantized_data")[0].as_py() == expected
    del first, second
    gc.collect()
    assert flightquant.quantize({"w": weights}, "int8").column("quantized_data")[0].as_py() == expected
