"""Answers are whole, the same on every run, and hold nothing but their own layer."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import KINDS, answer_bytes, check_row, reference_layer, request, stored_as, weights_like

from flightquant.cython_core.engine import Engine
from flightquant.errors import InvalidRequestError
from flightquant.spec import Command

CANARY = 0xC5
COMMANDS = [
    Command.build(**options)
    for options in (
        {"scheme": "int8"},
        {"scheme": "int4", "granularity": "channel", "symmetric": False},
        {"scheme": "int4", "group_size": 32},
        {"scheme": "int8", "granularity": "tensor", "symmetric": False},
        {"scheme": "int3", "granularity": "channel"},
        {"scheme": "fp8_e4m3", "granularity": "tensor"},
        {"scheme": "q8_0"},
        {"scheme": "q4_0"},
        {"scheme": "q5_1"},
        {"scheme": "iq4_nl"},
        {"scheme": "q3_k"},
        {"scheme": "q4_k"},
        {"scheme": "nvfp4"},
        {"scheme": "fp8_e4m3", "granularity": "block"},
        {"scheme": "nf4"},
        {"scheme": "fp4", "group_size": 4096},
    )
]


def fill_heap() -> None:
    """Leave the canary in freed memory of many sizes, of Arrow's pool and of NumPy."""
    sizes = [1 << power for power in range(6, 21)] * 4
    held: list[Any] = [pa.allocate_buffer(size) for size in sizes]
    arrays = [np.frombuffer(buffer, np.uint8) for buffer in held] + [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        array[:] = CANARY


def buffers_of(column: pa.Array) -> list[np.ndarray]:
    """Every byte behind a column, null slots and children included."""
    return [np.frombuffer(buffer, np.uint8) for buffer in column.buffers() if buffer is not None]


def runs_of_canary(column: pa.Array) -> int:
    return sum(bytes(buffer).count(bytes([CANARY]) * 4) for buffer in buffers_of(column))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.scheme}-{command.granularity}")
def test_no_byte_of_the_memorys_last_user_is_answered(isa_engine: Engine, command: Command) -> None:
    bad = np.ones((9, 96), np.float32)
    bad[8, 95] = np.nan
    layers = {
        "odd": np.ones((5, 3), np.float32),
        "bad at the end": bad,
        "even": np.ones((4, 64), np.float32),
        "bad at once": np.full((3, 64), np.inf, np.float32),
        "empty": np.zeros((0, 32), np.float32),
        "large and bad": np.concatenate([np.ones((1100, 64), np.float32), np.full((1, 64), np.nan, np.float32)]),
    }
    batch = request(layers, columns={"x_note": pa.array(["n"] * len(layers))})
    session = isa_engine.session(batch.schema, command)
    for _ in range(5):
        fill_heap()
        answers = session.quantize(batch).batch
        for name in answers.schema.names:
            assert runs_of_canary(answers.column(name)) == 0, name
        data = answers.column("quantized_data")
        offsets = np.frombuffer(data.buffers()[1], np.int32)
        content = np.frombuffer(data.buffers()[2], np.uint8)
        for i, status in enumerate(answers.column("status").to_pylist()):
            if status != "ok":
                assert not content[offsets[i] : offsets[i + 1]].any(), f"row {i} was refused and left its bytes"
        for name in ("scales", "zero_points"):
            lists = answers.column(name)
            starts = np.frombuffer(lists.buffers()[1], np.int32)
            values = lists.values.to_numpy()
            for i in np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False)):
                assert not values[starts[i] : starts[i + 1]].any(), f"{name} of row {i}"


def test_the_same_batch_gives_the_same_bytes_every_time(any_engine: Engine) -> None:
    rng = np.random.default_rng(0)
    layers = {kind: weights_like(kind, 70_016, "float32", rng).reshape(-1, 64) for kind in KINDS}
    batch = request(layers)
    for command in COMMANDS:
        answers = set()
        for _ in range(10):
            fill_heap()
            answers.add(answer_bytes(any_engine.session(batch.schema, command).quantize(batch).batch))
        assert len(answers) == 1, command


def test_calls_at_once_never_mix(any_engine: Engine) -> None:
    """Eight callers with their own data, small and large: each gets its own reference's answer."""
    problems: list[BaseException] = []
    start = threading.Barrier(8)

    def caller(number: int) -> None:
        try:
            rng = np.random.default_rng(number)
            shapes = [(1, 64), (3, 64), (40 * number + 1, 64), (600 + number, 128)]
            dtype = ("float32", "bfloat16")[number % 2]
            layers = {f"{number}/{i}": stored_as(rng.standard_normal(shape), dtype) for i, shape in enumerate(shapes)}
            command = COMMANDS[number % len(COMMANDS)]
            expected = [reference_layer(weights, dtype, command) for weights in layers.values()]
            batch = request(layers, dtype, columns={"x_caller": pa.array([number] * len(layers))})
            session = any_engine.session(batch.schema, command)
            start.wait(timeout=60)
            for _ in range(40):
                answers = session.quantize(batch).batch
                assert answers.column("x_caller").to_pylist() == [number] * len(layers)
                assert answers.column("layer_name").to_pylist() == list(layers)
                for i, layer in enumerate(expected):
                    check_row(answers, i, layer)
            assert session.end.rows == 40 * len(layers)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not problems, problems[0]
    assert not any(thread.is_alive() for thread in threads)


def test_many_small_layers_in_one_batch(any_engine: Engine) -> None:
    rng = np.random.default_rng(3)
    layers = {f"w{i}": rng.standard_normal((1 + i % 3, 32)).astype(np.float32) for i in range(3000)}
    batch = request(layers)
    for command in (COMMANDS[2], COMMANDS[0]):
        answers = any_engine.session(batch.schema, command).quantize(batch).batch
        for i, weights in itertools.islice(enumerate(layers.values()), 0, None, 17):
            check_row(answers, i, reference_layer(weights, "float32", command))


def test_schemas_are_told_apart_by_their_metadata_however_often_they_came(isa_engine: Engine) -> None:
    names = pa.field("layer_name", pa.utf8())
    halves = pa.list_(pa.uint16())
    for _ in range(2):
        tagged = pa.schema([names, pa.field("weights", halves, metadata={"dtype": "bfloat16"})])
        assert isa_engine.session(tagged, Command.build(scheme="int8")).value_bytes == 2
        with pytest.raises(InvalidRequestError, match="bfloat16"):
            isa_engine.session(pa.schema([names, pa.field("weights", halves)]), Command.build(scheme="int8"))
        noted = isa_engine.session(tagged.with_metadata({"by": "me"}), Command.build(scheme="int8"))
        assert noted.schema.equals(isa_engine.session(tagged, Command.build(scheme="int8")).schema)
