"""The engine is the reference, bit for bit: every scheme, dtype, size, instruction set and number of threads."""

from __future__ import annotations

import itertools
import zlib
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import (
    KINDS,
    GoldenCase,
    answer_bytes,
    check_row,
    golden_cases,
    reference_layer,
    request,
    same_bits,
    stored_as,
    weights_like,
)

from flightquant.cython_core import _quantize
from flightquant.cython_core.engine import Engine
from flightquant.errors import LayerError
from flightquant.reference import nf4
from flightquant.spec import Command

DTYPES = ("float32", "float16", "bfloat16", "float64")
GROUPS = (32, 64, 128, 256)
OPTIONS: list[dict[str, Any]] = [
    *(
        {"scheme": scheme, "symmetric": symmetric, **unit}
        for scheme, symmetric, unit in itertools.product(
            ("int8", "int4"),
            (True, False),
            ({"granularity": "tensor"}, {"granularity": "channel"}, *({"group_size": size} for size in GROUPS)),
        )
    ),
    *(
        {"scheme": f"int{bits}", "symmetric": symmetric, **unit}
        for bits, symmetric, unit in itertools.product(
            (2, 3, 5, 6, 7), (True, False), ({"granularity": "channel"}, {"group_size": 32})
        )
    ),
    {"scheme": "int2", "granularity": "tensor", "symmetric": False},
    {"scheme": "int3", "granularity": "tensor"},
    *(
        {"scheme": scheme, "granularity": granularity}
        for scheme, granularity in itertools.product(("fp8_e4m3", "fp8_e5m2"), ("channel", "tensor", "block"))
    ),
    *({"scheme": scheme} for scheme in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")),
    *({"scheme": f"q{bits}_k"} for bits in range(2, 7)),
    *({"scheme": scheme} for scheme in ("mxfp4", "mxfp8", "nvfp4")),
    *({"scheme": scheme, "group_size": 32 << k} for scheme in ("nf4", "fp4") for k in range(8)),
    *({"scheme": "bnb8", "group_size": size} for size in (64, 1024, 4096)),
    *({"scheme": "nf4", "packing": "bnb-nested", "group_size": size} for size in (32, 4096)),
    {"scheme": "fp4", "packing": "bnb-nested"},
    *(
        {"scheme": scheme, "packing": packing, "symmetric": symmetric, **unit}
        for (scheme, packing), symmetric, unit in itertools.product(
            (
                ("int4", "gptq"),
                ("int4", "gptq-v2"),
                ("int4", "awq"),
                ("int8", "gptq-v2"),
                ("int3", "gptq"),
                ("int2", "gptq-v2"),
            ),
            (True, False),
            ({"granularity": "channel"}, {"group_size": 64}),
        )
    ),
    {"scheme": "mxfp4", "packing": "gguf"},
    *({"scheme": scheme, "packing": "fbgemm"} for scheme in ("int8", "int4", "int2")),
    *(
        {"scheme": scheme, "packing": "onnx", "symmetric": symmetric, "group_size": size}
        for (scheme, size), symmetric in itertools.product(
            (("int2", 16), ("int4", 128), ("int4", 16), ("int8", 64)), (True, False)
        )
    ),
    *(
        {"scheme": "mlx", "bit_width": bits, "group_size": size}
        for bits, size in ((2, 64), (3, 32), (4, 32), (4, 64), (4, 128), (5, 64), (6, 128), (8, 64))
    ),
    *(
        {"scheme": f"hqq{bits}", "group_size": size}
        for bits, size in ((8, 64), (4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (2, 64), (2, 128))
    ),
    *(
        {"scheme": "arrowquant", "bit_width": bits, **unit}
        for bits, unit in itertools.product(
            (2, 4, 8), ({"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 32}, {"group_size": 128})
        )
    ),
]
SPAN, TILE = 2048, 65536
ROWS_NEAR_TIES = 2000


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in options.items() if key != "symmetric") + (
        "-asym" if options.get("symmetric") is False else ""
    )


def shapes(command: Command) -> list[tuple[int, ...]]:
    """Sizes at which something changes: one, vectors, spans, tiles, several tiles, and one more or less."""
    spec = command.layer_spec()
    if spec.scheme.transposed:
        narrow = [(32, 64), (64, 192), (32, 0), (0, 64), (96, 128), (2, 64, 64), (160, 64), (32, SPAN + 64)]
        return [*narrow, (128, 576), (288, 256), (32, TILE + 64)]
    if spec.granularity == "tensor":
        rows = [(), (1,), (2,), (17,), (3, 7), (5, 31), (1, SPAN), (3, SPAN + 1), (2, 3, 4, 5), (1, 1), (0, 4), (4, 0)]
        return [*rows, (1, TILE), (1, TILE + 1), (3, 50_001), (TILE // 64, 64), (129, 513)]
    if spec.granularity == "channel":
        widths = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 1000)
        short = [(int(1 + 5 * (width % 3)), width) for width in widths]
        spans = [(2, width) for width in (SPAN - 32, SPAN - 1, SPAN, SPAN + 1, SPAN + 32, 2 * SPAN + 17)]
        return [(), (0,), (2, 0), *short, *spans, (1, TILE - 1), (1, TILE), (2, TILE + 33), (700, 100), (515, 128)]
    if spec.granularity == "block":
        small = [(), (0,), (2, 0), (1,), (3, 5), (129, 1), (127, 129), (128, 128), (130, 255), (2, 65, 200), (257, 64)]
        return [*small, (3, 511), (1, 512), (2, 513), (129, 1100), (1, 3 * SPAN + 1), (300, 300)]
    unit = spec.group_size
    if spec.scheme.fold > 1 and spec.scheme.bits != 3:
        narrow = [(4, unit), (4, 3 * unit), (0, unit), (2, 2, 3 * unit), (3, 3 * unit), (8 * unit,), (1, 2 * SPAN)]
        return [*narrow, (4, SPAN + unit), (1, TILE), (8, TILE // 2 + unit), (TILE // unit + 4, unit), (20, 11 * unit)]
    if spec.scheme.flat:
        short = [(), (1,), (2,), (3, 7), (5, 31), (0, 4), (unit - 1,), (unit,), (unit + 1,), (3, unit), (7, 99)]
        spans = [(1, SPAN + more) for more in (-33, -32, -1, 0, 1, 32, SPAN + unit // 2)]
        return [*short, *spans, (1, TILE - 1), (1, TILE), (1, TILE + 1), (129, 513), (2, 5 * unit + 3)]
    row = [(1, unit), (3, unit), (2, 5 * unit), (2, 2, 3 * unit), (unit,), (0, unit), (1, SPAN - unit), (1, SPAN)]
    large = [(1, TILE - unit), (1, TILE), (1, TILE + unit), (TILE // unit + 1, unit), (7, 11 * unit)]
    return [*row, (3, SPAN + unit), (1, 2 * SPAN + unit), *large]


def layers_for(command: Command, dtype: str, wanted: list[tuple[int, ...]]) -> dict[str, Any]:
    rng = np.random.default_rng(zlib.crc32(repr((command, dtype)).encode()))
    layers = {}
    for i, shape in enumerate(wanted):
        size = int(np.prod(shape, dtype=np.int64))
        kind = KINDS[i % len(KINDS)]
        layers[f"{i}:{kind}:{'x'.join(map(str, shape))}"] = weights_like(kind, size, dtype, rng).reshape(shape)
    unit = command.layer_spec().group_size or 96
    every = np.concatenate([weights_like(kind, 2 * unit, dtype, rng) for kind in KINDS])
    layers["every kind"] = every.reshape(-1, 2 * unit)
    if command.layer_spec().scheme.transposed:
        layers["every kind"] = np.resize(layers["every kind"], (32, 2 * unit // 32 * 32))
    return layers


def check_everywhere(batch: pa.RecordBatch, command: Command, expected: list[Any], engines: list[Engine]) -> None:
    first: bytes | None = None
    for engine in engines:
        what = f"{engine.isa} x{engine.n_threads}"
        # Those with two threads store packed bytes as large batches do, past the caches.
        with mock.patch.object(_quantize, "STREAM_FROM", 0 if engine.n_threads == 2 else _quantize.STREAM_FROM):
            answer = engine.session(batch.schema, command).quantize(batch)
        if first is None:
            answer.batch.validate(full=True)
            for i, layer in enumerate(expected):
                check_row(answer.batch, i, layer, what)
                sums_of_row = np.zeros(4) if isinstance(layer, LayerError) else layer.sums
                same_bits(answer.sums[i], sums_of_row, f"{what} sums of row {i}")
            first = answer_bytes(answer.batch)
            sums = answer.sums
        elif answer_bytes(answer.batch) != first:
            for i, layer in enumerate(expected):
                check_row(answer.batch, i, layer, what)
            raise AssertionError(f"{what}: an answer that differs from another instruction set's or thread count's")
        same_bits(answer.sums, sums, f"{what} sums")


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_on_every_engine(dtype: str, options: dict[str, Any], all_engines: list[Engine]) -> None:
    command = Command.build(**options)
    layers = layers_for(command, dtype, shapes(command))
    expected = [reference_layer(weights, dtype, command) for weights in layers.values()]
    check_everywhere(request(layers, dtype), command, expected, all_engines)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_dtype_on_every_engine(dtype: str, scale_dtype: str, all_engines: list[Engine]) -> None:
    units: list[dict[str, Any]] = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 64}]
    integers = itertools.product(("int8", "int4", "int2"), (True, False), units)
    floats = itertools.product(("fp8_e4m3", "fp8_e5m2"), (True,), [*units[:2], {"granularity": "block"}])
    for scheme, symmetric, unit in itertools.chain(integers, floats):
        command = Command.build(scheme=scheme, symmetric=symmetric, scale_dtype=scale_dtype, **unit)
        wanted = [(1, 64), (5, 192), (2, SPAN + 64), *((4, 64) for _ in KINDS)]
        layers = layers_for(command, dtype, wanted)
        expected = [reference_layer(weights, dtype, command) for weights in layers.values()]
        check_everywhere(request(layers, dtype), command, expected, all_engines)


def test_the_engine_is_the_libraries_bit_for_bit(all_engines: list[Engine]) -> None:
    by_request: dict[tuple[str, str], list[GoldenCase]] = {}
    for case in golden_cases():
        by_request.setdefault((case.dtype, repr(case.options)), []).append(case)
    for (dtype, _), cases in by_request.items():
        command = Command.build(**cases[0].options)
        importance = pa.array([case.importance for case in cases], pa.list_(pa.float32()))
        batch = request({case.name: case.weights for case in cases}, dtype, columns={"importance": importance})
        for engine in all_engines:
            answers = engine.session(batch.schema, command).quantize(batch).batch
            for i, case in enumerate(cases):
                what = f"{engine.isa} {case.name}"
                assert answers.column("status")[i].as_py() == "ok", what
                packed = np.frombuffer(answers.column("quantized_data")[i].as_buffer(), np.uint8)
                same_bits(packed, case.data, f"{what} data")
                for name in ("scales", "zero_points"):
                    wanted = getattr(case, name)
                    cell = answers.column(name)[i]
                    assert cell.is_valid == (wanted is not None), f"{what} {name}"
                    if wanted is not None:
                        same_bits(cell.values.to_numpy(), wanted, f"{what} {name}")


@pytest.mark.parametrize(("scheme", "fold"), [("hqq4", 2), ("hqq2", 4)])
def test_groups_that_do_not_fold_are_refused(scheme: str, fold: int, any_engine: Engine) -> None:
    layers = {f"{rows} rows": np.ones((rows, 64), np.float32) for rows in range(1, 9)}
    batch = request(layers)
    answer = any_engine.session(batch.schema, Command.build(scheme=scheme)).quantize(batch).batch
    for i, rows in enumerate(range(1, 9)):
        assert answer.column("status")[i].as_py() == ("unsupported" if rows % fold else "ok")
        if rows % fold:
            assert f"a multiple of {fold} groups of 64 weights" in answer.column("error")[i].as_py()


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_random_bit_patterns(options: dict[str, Any], all_engines: list[Engine]) -> None:
    """Any finite float at all, not only those that a distribution makes."""
    command = Command.build(**options)
    rng = np.random.default_rng(7)
    for dtype, width in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        bits = rng.integers(0, 256, (6, 256 * 64 * width), np.uint8)
        stored = bits.view({"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}[dtype])
        exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
        stored = np.where(stored & exponent == exponent, stored & ~stored.dtype.type(exponent), stored)
        weights = stored if dtype == "bfloat16" else stored.view(dtype)
        layers = {f"w{i}": row.reshape(-1, 256) for i, row in enumerate(weights)}
        expected = [reference_layer(layer, dtype, command) for layer in layers.values()]
        check_everywhere(request(layers, dtype), command, expected, all_engines)


def near_ties(command: Command, dtype: str, rows: int, seed: int) -> Any:
    """Rows of 128 weights, each a few units in the last place from the edge between two codes of its own scale."""
    rng = np.random.default_rng(seed)
    bits = command.layer_spec().scheme.bits
    low = np.ldexp(-rng.uniform(1, 2, (rows, 1)), rng.integers(-12, 12, (rows, 1)))
    high = -low * (1 if command.symmetric else rng.uniform(0.1, 4, (rows, 1)))
    ends = np.concatenate([low, high], axis=1).astype(np.float32)
    scale = (
        np.abs(ends).max(axis=1, keepdims=True) * 2 if command.symmetric else np.ptp(ends, axis=1, keepdims=True)
    ) / (2**bits - 1)
    first = 0 if command.symmetric else np.rint(ends[:, :1] / scale) + 2 ** (bits - 1)
    edges = (rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, 126)) + 0.5 + first) * scale
    weights = np.concatenate([ends, np.clip(edges, ends[:, :1], ends[:, 1:]).astype(np.float32)], axis=1)
    moved = weights.view(np.int32) + rng.integers(-2, 3, weights.shape, np.int32) * (1 if dtype == "float32" else 4096)
    moved[:, :2] = ends.view(np.int32)
    return stored_as(np.clip(moved.view(np.float32), ends[:, :1], ends[:, 1:]), dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_at_the_edge_between_two_codes(
    dtype: str, scheme: str, symmetric: bool, all_engines: list[Engine]
) -> None:
    command = Command.build(scheme=scheme, symmetric=symmetric, group_size=128, metrics=False)
    weights = near_ties(command, dtype, ROWS_NEAR_TIES, seed=3)
    expected = reference_layer(weights, dtype, command)
    batch = request({"w": weights}, dtype)
    for engine in all_engines[::3]:
        check_row(engine.session(batch.schema, command).quantize(batch).batch, 0, expected, engine.isa)


def near_moves(blocks: int, seed: int) -> Any:
    """q3_k's blocks, of every magnitude, in each of whose sub-blocks one weight divided by the scale that all others
    want lies a few units in the last place from the edge between two codes: its search moves it or it does not."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((blocks * 16, 16)).astype(np.float32)
    rows[:, :8] *= np.float32(0.4)
    every, extreme = np.arange(len(rows)), np.abs(rows).argmax(axis=1)
    rows[every, extreme] = -np.abs(rows[every, extreme])  # else nothing moves
    at = (extreme + rng.integers(1, 16, len(rows))) % 16
    others = rows.copy()
    others[every, at] = 0
    codes = np.clip(np.rint(others * (np.float32(-4) / rows[every, extreme])[:, None]), -4, 3)
    scale = (others**3 * codes).sum(axis=1) / (others**2 * codes**2).sum(axis=1)
    edges = ((rng.integers(-4, 3, len(rows)) + 0.5) * scale).astype(np.float32)
    rows[every, at] = (edges.view(np.int32) + rng.integers(-3, 4, len(rows), np.int32)).view(np.float32)
    return np.ldexp(rows.reshape(blocks, 256), rng.integers(-45, 41, (blocks, 1))).astype(np.float32)


def test_searched_codes_at_the_edge_of_a_move(all_engines: list[Engine]) -> None:
    command = Command.build(scheme="q3_k", metrics=False)
    weights = near_moves(400, seed=5)
    expected = reference_layer(weights, "float32", command)
    for engine in all_engines[::3]:
        answer = engine.session(request({"w": weights}).schema, command).quantize(request({"w": weights})).batch
        check_row(answer, 0, expected, engine.isa)


def around(points: Any, top: float) -> Any:
    """Rows of 256 float32 weights up to ``top``, which each group of 16 holds: points and what is next to them."""
    points = np.concatenate([points, 2.0 ** -np.arange(1, 150), [0]]).astype(np.float32)
    points = np.concatenate([points, -points])
    steps = np.concatenate([(points.view(np.int32) + step).view(np.float32) for step in (0, -1, 1, -2, 2)])
    steps = steps[np.abs(steps) <= top]
    groups = np.resize(steps, (-(-steps.size // 15 // 16) * 16, 15))
    return np.insert(groups, 7, top, axis=1).reshape(-1, 256)


def between(scheme: str) -> Any:
    """What lies halfway between two values of nf4 or fp4, and where the cells end in which it is looked up."""
    values = np.sort(nf4.VALUES[scheme])
    return np.concatenate([(values[1:] + values[:-1]) / np.float32(2), (np.arange(16) + 0.5) / 15])


# The same of floats with 1 bit of mantissa, and with 3.
STEPS_4 = np.concatenate([np.arange(25) / 4, (np.arange(16) + 0.5) / 2.2])
STEPS_8 = np.concatenate([np.ldexp(np.arange(33), e - 5) for e in range(-6, 9)])


@pytest.mark.parametrize(
    ("options", "points", "top"),
    [
        ({"scheme": "nf4"}, between("nf4"), 1),
        ({"scheme": "fp4"}, between("fp4"), 1),
        ({"scheme": "iq4_nl"}, np.concatenate([np.arange(32) * 8 + 4, np.arange(255) / 2]), 127),
        ({"scheme": "mxfp4"}, STEPS_4, 6),
        ({"scheme": "mxfp4", "packing": "gguf"}, STEPS_4, 6),
        ({"scheme": "nvfp4"}, STEPS_4, 6),
        ({"scheme": "mxfp8"}, STEPS_8, 448),
        ({"scheme": "fp8_e4m3"}, STEPS_8, 448),
        ({"scheme": "fp8_e5m2"}, STEPS_8 * 128, 57344),
    ],
    ids=lambda value: label(value) if isinstance(value, dict) else "",
)
def test_weights_next_to_the_bounds_of_small_floats(
    options: dict[str, Any], points: Any, top: float, all_engines: list[Engine]
) -> None:
    command = Command.build(**options)
    weights = around(points, top)
    check_everywhere(
        request({"w": weights}, "float32"), command, [reference_layer(weights, "float32", command)], all_engines
    )
