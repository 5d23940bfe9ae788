"""Usual batches take a short way, and come out as they do on the long one, which everything else takes."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import ARROW_VALUES, request, stored_as

from flightquant.cython_core._memory import MIN_BYTES, bytes_kept
from flightquant.cython_core.engine import Answer, Engine, Limits, Session
from flightquant.errors import TooLargeError
from flightquant.schemes import SCHEMES
from flightquant.spec import Command

WEIGHTS = np.random.default_rng(3).standard_normal((6, 32, 256)).astype(np.float32)
LAYERS = {f"layer {i}": WEIGHTS[i : i + 1 + i % 2] for i in range(5)}
ROW_OFFSET = pa.array([0, 1 << 40, 3, 4, 5])
NOTES = pa.array(["a", None, "", "long" * 99, "e"])


def both(engine: Engine, batch: pa.RecordBatch, command: Command, **limits: int) -> tuple[bool, Answer, Answer]:
    """Whether a batch is a usual one, and its answers on both ways."""
    short, long = (engine.session(batch.schema, command, Limits(**limits)) for _ in range(2))
    long._plain = None
    usual = short._plain is not None and short._plain.read(batch) is not None
    return usual, answer_of(short, batch), answer_of(long, batch)


def answer_of(session: Session, batch: pa.RecordBatch) -> Answer:
    """The answer, which is valid Arrow data, and counts for the call."""
    before = session.end.rows
    answer = session.quantize(batch)
    answer.batch.validate(full=True)
    assert session.end.rows == before + batch.num_rows
    return answer


def check_same(short: Answer, long: Answer) -> None:
    """Everything of both answers but their times."""
    assert short.batch.schema.equals(long.batch.schema, check_metadata=True)
    for name in set(short.batch.schema.names) - {"kernel_ns"}:
        assert short.batch.column(name).equals(long.batch.column(name)), name
    assert short.sums is not None
    assert long.sums is not None
    assert short.sums.tobytes() == long.sums.tobytes()
    for total in ("rows", "batches", "bytes_in", "bytes_out", "bytes_copied", "failed_rows"):
        assert getattr(short.totals, total) == getattr(long.totals, total), total
    assert short.totals.kernel_ns == sum(short.batch.column("kernel_ns").to_pylist())


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_ways_give_the_same_answer(any_engine: Engine, scheme: str, metrics: bool) -> None:
    batch = request(LAYERS, columns={"row_offset": ROW_OFFSET, "x_note": NOTES})
    usual, short, long = both(any_engine, batch, Command.build(scheme=scheme, metrics=metrics))
    assert usual or SCHEMES[scheme].fold > 1
    check_same(short, long)


@pytest.mark.parametrize("options", [{"symmetric": False}, {"granularity": "tensor"}, {"calibration": "mse"}], ids=str)
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize(("dtype", "storage"), [*ARROW_VALUES.items(), ("bfloat16", pa.binary(2))], ids=str)
def test_every_kind_of_column_is_read(
    any_engine: Engine, dtype: str, storage: pa.DataType, kind: str, options: dict[str, Any]
) -> None:
    layers = {name: stored_as(layer[:1], dtype) for name, layer in LAYERS.items()}
    batch = request(layers, dtype, kind=kind, storage=storage, alignment=3, columns={"x_note": NOTES})
    for first, length in ((0, 5), (1, 3), (4, 1)):
        usual, short, long = both(any_engine, batch.slice(first, length), Command.build(scheme="int4", **options))
        assert usual
        check_same(short, long)


def changed(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name).with_type(column.type), column)


def unusual() -> dict[str, pa.RecordBatch]:
    batch = request(LAYERS, columns={"row_offset": ROW_OFFSET})
    shapes = [list(layer.shape) for layer in LAYERS.values()]
    weights = batch.column("weights")
    null_row = pa.array([None, *(row.as_py() for row in weights)][:5], weights.type)
    null_weight = pa.array([[None, *row.as_py()[1:]] for row in weights], weights.type)
    nan = WEIGHTS.copy()
    nan[2, 0, 0] = np.nan
    return {
        "name-empty": changed(batch, "layer_name", pa.array(["a", "", "c", "d", "e"])),
        "name-null": changed(batch, "layer_name", pa.array(["a", None, "c", "d", "e"])),
        "name-large": changed(batch, "layer_name", pa.array(list("abcde"), pa.large_utf8())),
        "shape-null": changed(batch, "shape", pa.array([None, *shapes[1:]], pa.list_(pa.int64()))),
        "shape-hole": changed(batch, "shape", pa.array([[None, 8192], *shapes[1:]], pa.list_(pa.int64()))),
        "shape-wrong": changed(batch, "shape", pa.array([[1, 8160], *shapes[1:]])),
        "shape-negative": changed(batch, "shape", pa.array([[-1, -8192], *shapes[1:]])),
        "shape-zero": changed(batch, "shape", pa.array([[0, 8192], *shapes[1:]])),
        "shape-huge": changed(batch, "shape", pa.array([[1 << 62, 1 << 62], *shapes[1:]])),
        "shape-uneven": changed(batch, "shape", pa.array([[512, 16], *shapes[1:]])),
        "shape-long": changed(batch, "shape", pa.array([[1] * 8 + [8192], *shapes[1:]])),
        "shape-missing": batch.drop_columns(["shape"]),
        "offset-null": changed(batch, "row_offset", pa.array([None, 1, 2, 3, 4])),
        "weights-null": changed(batch, "weights", null_row),
        "weight-null": changed(batch, "weights", null_weight),
        "weights-empty": request({**LAYERS, "layer 0": np.zeros((0, 256), np.float32)}),
        "weights-nan": request({f"w{i}": layer for i, layer in enumerate(nan)}),
        "many": request({f"w{i}": WEIGHTS[0, :1] for i in range(65)}),
    }


@pytest.mark.parametrize("case", unusual())
def test_what_is_unusual_takes_the_long_way(any_engine: Engine, case: str) -> None:
    batch = unusual()[case]
    usual, short, long = both(any_engine, batch, Command.build(scheme="q4_0"))
    assert usual == (case == "weights-nan"), "only the kernels find these"
    check_same(short, long)


def test_limits_hold(any_engine: Engine) -> None:
    batch, command = request(LAYERS), Command.build(scheme="int4")
    weights = sum(layer.nbytes for layer in LAYERS.values())
    assert both(any_engine, batch, command, max_batch_bytes=weights, max_layer_bytes=weights)[0]
    for limits in ({"max_batch_bytes": weights - 1}, {"max_name_bytes": 6}, {"max_call_bytes": weights - 1}):
        with pytest.raises(TooLargeError):
            any_engine.session(batch.schema, command, Limits(**limits)).quantize(batch)
    usual, short, _ = both(any_engine, batch, command, max_layer_bytes=LAYERS["layer 0"].nbytes)
    assert not usual
    assert short.batch.column("status").to_pylist() == ["ok", "too_large"] * 2 + ["ok"]
    session = any_engine.session(batch.schema, command, Limits(max_call_bytes=2 * weights))
    session.quantize(batch)
    session.quantize(batch)
    with pytest.raises(TooLargeError, match="the call has sent"):
        session.quantize(batch)


def test_an_answer_holds_what_it_stands_on_and_nothing_longer(any_engine: Engine) -> None:
    """Names are the request's memory, outputs come from the store: both go when the last column is gone."""
    pool = pa.default_memory_pool()
    batch = session = columns = None
    for _ in range(2):  # columns that are always the same are made once
        batch = session = columns = None
        gc.collect()
        before = pool.bytes_allocated()
        batch = request({"w": np.ones((MIN_BYTES // 256, 512), np.float32)}, columns={"x_note": pa.array(["kept"])})
        session = any_engine.session(batch.schema, Command.build(scheme="int8"))
        columns = session.quantize(batch).batch.columns
    stored = bytes_kept()
    del batch, session
    gc.collect()
    assert [column[0].as_py() for column in columns if column.type == pa.utf8()][:1] == ["w"]
    assert bytes_kept() == stored, "a column still stands on it"
    thread = threading.Thread(target=columns.clear)
    thread.start()
    thread.join()
    assert bytes_kept() >= stored + 2 * MIN_BYTES
    assert pool.bytes_allocated() == before


def test_a_batch_that_is_not_answered_leaves_nothing(any_engine: Engine) -> None:
    batch = request({"w": np.ones((MIN_BYTES // 256, 512), np.float32)})
    session = any_engine.session(batch.schema, Command.build(scheme="int8"))
    assert session._plain is not None
    before = bytes_kept()
    work = session._plain.read(batch)
    assert work is not None
    held = pa.total_allocated_bytes()
    del work
    assert bytes_kept() >= before
    assert pa.total_allocated_bytes() <= held
    del batch
    assert pa.total_allocated_bytes() < held
