"""What a call may bring as a whole, and what is counted of it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from fq_rows import GOOD, INT4, around, check_failed, check_neighbours, quantize
from fq_testing import request

from flightquant.cython_core.engine import Engine, Limits
from flightquant.errors import DeadlineError, InvalidRequestError, TooLargeError


def test_the_end_message_counts_the_whole_call(any_engine: Engine) -> None:
    batch = request({"a": GOOD, "b": GOOD})
    session = any_engine.session(batch.schema, INT4)
    answers = [session.quantize(batch).batch, session.quantize(batch.slice(1)).batch]
    table = pa.Table.from_batches(answers)
    end = session.end
    assert (end.rows, end.batches, end.failed_rows, end.bytes_copied) == (3, 2, 0, 0)
    assert end.bytes_in == sum(table.column("bytes_in").to_pylist()) == 3 * GOOD.nbytes
    assert end.bytes_out == sum(table.column("bytes_out").to_pylist())
    assert end.kernel_ns == sum(table.column("kernel_ns").to_pylist()) > 0
    assert table.column("bytes_copied").to_pylist() == [0, 0, 0]
    data, scales = table.column("quantized_data")[0].as_py(), table.column("scales")[0].as_py()
    assert table.column("bytes_out")[0].as_py() == len(data) + 4 * len(scales)


def test_limits_of_rows_and_bytes(any_engine: Engine) -> None:
    batch = request({f"w{i}": GOOD for i in range(4)})
    quantize(any_engine, batch, max_rows=4)
    with pytest.raises(TooLargeError, match="4"):
        quantize(any_engine, batch, max_rows=3)
    quantize(any_engine, batch, max_batch_bytes=4 * GOOD.nbytes + 4096)
    with pytest.raises(TooLargeError):
        quantize(any_engine, batch, max_batch_bytes=GOOD.nbytes)


def test_a_layer_over_its_limit_is_told(any_engine: Engine) -> None:
    layers = {"small": GOOD, "large": np.concatenate([GOOD, GOOD]), "again": GOOD}
    answers = quantize(any_engine, request(layers), max_layer_bytes=GOOD.nbytes)
    check_failed(answers, 1, "too_large", str(2 * GOOD.nbytes), str(GOOD.nbytes))
    check_neighbours(answers, 1)


def test_a_call_over_its_limit_ends(any_engine: Engine) -> None:
    batch = request({"a": GOOD})
    session = any_engine.session(batch.schema, INT4, Limits(max_call_bytes=3 * GOOD.nbytes))
    for _ in range(2):
        session.quantize(batch)
    large = request({"a": np.concatenate([GOOD, GOOD])})
    with pytest.raises(TooLargeError):
        session.quantize(large)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int8(), pa.utf8())], ids=str)
def test_a_name_over_its_limit_is_refused(any_engine: Engine, kind: pa.DataType) -> None:
    names = ["a" * 64, "b" * 65, "\N{SNOWMAN}" * 21]
    batch = request(around(GOOD), columns={"layer_name": pa.array(names).cast(kind)})
    with pytest.raises(TooLargeError, match="65 bytes long; expected at most 64"):
        quantize(any_engine, batch, max_name_bytes=64)
    assert quantize(any_engine, batch, max_name_bytes=65).column("layer_name").to_pylist() == names


def test_more_dimensions_than_the_limit_are_told(any_engine: Engine) -> None:
    batch = request({"a": GOOD, "b": GOOD.reshape(1, 3, 128)})
    check_failed(quantize(any_engine, batch, max_dims=2), 1, "shape_mismatch")


def test_a_batch_of_no_rows_is_refused(any_engine: Engine) -> None:
    batch = request({"a": GOOD})
    session = any_engine.session(batch.schema, INT4)
    with pytest.raises(InvalidRequestError, match="no rows"):
        session.quantize(batch.slice(0, 0))
    assert (session.end.rows, session.end.batches) == (0, 0)


def test_a_batch_of_another_schema_is_refused(any_engine: Engine) -> None:
    session = any_engine.session(request({"a": GOOD}).schema, INT4)
    for other in (
        request({"a": GOOD.astype(np.float64)}, "float64"),
        request({"a": GOOD}, kind="large_list"),
        request({"a": GOOD}, columns={"x_more": pa.array([1])}),
        request({"a": GOOD}).select(["layer_name", "weights"]),
    ):
        with pytest.raises(InvalidRequestError):
            session.quantize(other)
    assert session.quantize(request({"a": GOOD})).batch.num_rows == 1


def test_a_schema_that_breaks_the_contract_is_refused_before_any_batch(any_engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="status"):
        any_engine.session(request({"a": GOOD}, columns={"status": pa.array(["ok"])}).schema, INT4)


def test_a_large_call_can_be_stopped(any_engine: Engine) -> None:
    """Between slices of a few milliseconds: a batch of one slice may end first."""
    weights = np.ones((5 << 13, 1 << 10), np.float16)
    batch = request({"a": weights}, "float16")
    session = any_engine.session(batch.schema, INT4)
    with pytest.raises(DeadlineError):
        session.quantize(batch, should_stop=lambda: True)
    assert session.end.rows == 0
    asked: list[int] = []
    answers = session.quantize(batch, should_stop=lambda: bool(asked.append(1))).batch
    assert answers.column("status").to_pylist() == ["ok"]
    assert len(asked) >= 4
