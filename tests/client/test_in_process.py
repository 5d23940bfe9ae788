"""The local stream: the one-call answer, in windows, with memory given up as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flightquant
from flightquant.client import QuantClient, batching, in_process
from flightquant.errors import DeadlineError

RNG = np.random.default_rng(5)
WEIGHTS = {
    "small.a": RNG.standard_normal((8, 128), np.float32),
    "small.b": RNG.standard_normal((8, 128)).astype(np.float16),
    "large": RNG.standard_normal((64, 256), np.float32),
    "last": RNG.standard_normal((8, 128), np.float32),
}
FREE = ("kernel_ns", "bytes_copied")


class Watched(Mapping[str, Any]):
    """A mapping that notes what is loaded and what is given up."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def __getitem__(self, name: str) -> Any:
        self.seen.append((name, None, None))
        return WEIGHTS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(WEIGHTS)

    def __len__(self) -> int:
        return len(WEIGHTS)

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        self.seen.append((name, first, last))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_BYTES", 16 << 10)
    monkeypatch.setattr(batching, "TARGET_BYTES", 16 << 10)
    monkeypatch.setattr(in_process, "RUN_BYTES", 6 << 10)
    monkeypatch.setattr(in_process, "WINDOW_BYTES", 32 << 10)


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"symmetric": False}], ids=str)
def test_windows_give_what_one_call_gives(options: dict[str, Any]) -> None:
    told: list[tuple[str, float]] = []
    held = Watched()
    stream = QuantClient("local", n_threads=1).stream(held, "int8", **options, progress=lambda *each: told.append(each))
    table = pa.Table.from_batches(stream)
    expected = flightquant.quantize(WEIGHTS, "int8", **options)
    for name in expected.schema.names:
        if name not in FREE:
            assert table[name].combine_chunks().equals(expected[name].combine_chunks()), name
    assert told == [("small.a", 1.0), ("small.b", 1.0), *(("large", k / 4) for k in (1, 2, 3, 4)), ("last", 1.0)]
    parts = [("large", first, first + 0x4000) for first in range(0, 0x10000, 0x4000)]
    assert [each for each in held.seen if each[1] is not None] == [
        ("small.a", 0, None), ("small.b", 0, None), *parts, ("last", 0, None)
    ]  # fmt: skip


def test_a_layer_is_loaded_when_the_one_before_it_is_given_up() -> None:
    held = Watched()
    stream = QuantClient("local").stream(held, "int8")
    next(stream)
    # What the run before a large layer may hold: the large one ends the run.
    assert {name for name, *_ in held.seen} == {"small.a", "small.b"}


def test_a_deadline_ends_it() -> None:
    stream = QuantClient("local", timeout_s=1e-9).stream(WEIGHTS, "int8")
    with pytest.raises(DeadlineError):
        list(stream)


def test_the_number_of_threads_is_checked() -> None:
    with pytest.raises(ValueError, match="n_threads is 0"):
        QuantClient("local", n_threads=0).quantize(WEIGHTS, "int8")
