"""The local stream: the one-call answer, in windows, with memory given up as it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flightquant
from flightquant.client import QuantClient, calls, in_process
from flightquant.cython_core import engine
from flightquant.errors import DeadlineError, LayerError
from flightquant.spec import Command

RNG = np.random.default_rng(5)
WEIGHTS = {
    "small.a": RNG.standard_normal((8, 128), np.float32),
    "small.b": RNG.standard_normal((8, 128)).astype(np.float16),
    "large": RNG.standard_normal((512, 256), np.float32),
    "last": RNG.standard_normal((8, 128), np.float32),
}
FREE = ("kernel_ns", "bytes_copied")


class Watched(Mapping[str, Any]):
    """A mapping that notes what is loaded and what is given up."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __getitem__(self, name: str) -> Any:
        self.seen.append((name, "loaded"))
        return WEIGHTS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(WEIGHTS)

    def __len__(self) -> int:
        return len(WEIGHTS)

    def release(self, name: str) -> None:
        self.seen.append((name, "given up"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "RUN_BYTES", 6 << 10)
    monkeypatch.setattr(engine, "SLICE_TILES", 1)


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"symmetric": False}], ids=str)
def test_windows_give_what_one_call_gives(options: dict[str, Any]) -> None:
    told: list[tuple[str, float]] = []
    held = Watched()
    client = QuantClient("local", n_threads=1)
    table = pa.Table.from_batches(client.stream(held, "int8", **options, progress=lambda *each: told.append(each)))
    expected = flightquant.quantize(WEIGHTS, "int8", **options)
    for name in expected.schema.names:
        if name not in FREE:
            assert table[name].combine_chunks().equals(expected[name].combine_chunks()), name
    assert [name for name, share in told if share == 1.0] == list(WEIGHTS)
    # Of one scale for all, the magnitude is found first: two passes over two tiles.
    shares = (0.25, 0.5, 0.75, 1.0) if "granularity" in options else (0.5, 1.0)
    assert [share for name, share in told if name == "large"] == list(shares)
    assert [name for name, what in held.seen if what == "given up"] == [name for name, _ in told]
    # What is loaded next ends a run; nothing further is loaded before the run is given up.
    assert held.seen.index(("small.a", "given up")) < held.seen.index(("large", "loaded"))


@pytest.mark.parametrize("beside", [1 << 20, 100 << 10], ids=["all side by side", "a large one alone"])
def test_layers_side_by_side_give_what_one_call_gives(beside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "MAX_BESIDE_BYTES", beside)
    told: list[tuple[str, float]] = []
    held = Watched()
    stream = QuantClient("local", n_threads=2).stream(held, "int4", progress=lambda *each: told.append(each))
    table = pa.Table.from_batches(stream)
    expected = flightquant.quantize(WEIGHTS, "int4")
    for name in expected.schema.names:
        if name not in FREE:
            assert table[name].combine_chunks().equals(expected[name].combine_chunks()), name
    for name in WEIGHTS:
        assert max(share for other, share in told if other == name) == 1
        assert (name, "given up") in held.seen


def test_a_bad_layer_ends_those_beside_it() -> None:
    bad = {**WEIGHTS, "bad": np.full((8, 128), np.nan, np.float32)}
    begun: set[str] = set()
    stream = QuantClient("local", n_threads=2).stream(
        bad | {f"after.{i}": WEIGHTS["large"] for i in range(64)},
        "int4",
        on_error="abort",
        progress=lambda name, share: begun.add(name),
    )
    with pytest.raises(LayerError, match='"bad"'):
        list(stream)
    assert "after.63" not in begun


def test_who_stops_taking_answers_ends_those_at_work() -> None:
    told: list[float] = []
    layers = {str(i): WEIGHTS["large"] for i in range(64)}
    stream = QuantClient("local", n_threads=2).stream(layers, "int4", progress=lambda name, share: told.append(share))
    next(iter(stream))
    del stream
    assert sum(share == 1.0 for share in told) < 16


def test_who_is_at_work_when_nobody_takes_answers_ends_within_a_slice() -> None:
    told: list[float] = []

    def progress(name: str, share: float) -> None:
        if name == "long":
            told.append(share)
            time.sleep(0.05)

    layers = {"first": WEIGHTS["last"], "long": np.ones((20 * 256, 256), np.float32)}
    stream = iter(QuantClient("local", n_threads=2).stream(layers, "int4", progress=progress))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(told) < 20


def test_a_deadline_ends_it() -> None:
    stream = QuantClient("local", timeout_s=1e-9).stream(WEIGHTS, "int8")
    with pytest.raises(DeadlineError):
        list(stream)


def test_a_call_that_is_cancelled_ends_within_a_layer() -> None:
    cancellation = calls.Cancellation()
    command = Command.build(scheme="int8")
    told: list[float] = []

    def progress(name: str, share: float) -> None:
        told.append(share)
        cancellation.now()

    large = {"large": WEIGHTS["large"]}
    with pytest.raises(calls.CallCancelledError):
        list(in_process.answers(large, command, None, None, progress, cancellation))
    assert told == [0.5]


def test_the_number_of_threads_is_checked() -> None:
    with pytest.raises(ValueError, match="n_threads is 0"):
        QuantClient("local", n_threads=0).quantize(WEIGHTS, "int8")
