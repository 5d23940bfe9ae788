"""Rows that the engine is asked for: good ones, bad ones between them, and what is said of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from fq_testing import check_row, reference_layer, stored_as

from flightquant.cython_core.engine import Engine, Limits
from flightquant.spec import Command

INT4 = Command.build(scheme="int4", group_size=32)
INT8 = Command.build(scheme="int8")
GOOD = stored_as(np.random.default_rng(11).standard_normal((3, 128)), "float32")
WIDE = stored_as(np.random.default_rng(12).standard_normal((32, 128)), "float32")
ANSWERS_OF_OK = ("quantized_data", "scales", "sqnr_db", "cosine", "max_abs_error", "zero_points")
OVERRIDE_TYPES = {
    "scheme": pa.utf8(),
    "bit_width": pa.uint8(),
    "packing": pa.utf8(),
    "granularity": pa.large_utf8(),
    "group_size": pa.int64(),
    "symmetric": pa.bool_(),
    "scale_dtype": pa.utf8(),
}


def quantize(engine: Engine, batch: pa.RecordBatch, command: Command = INT4, **limits: Any) -> pa.RecordBatch:
    return engine.session(batch.schema, command, Limits(**limits)).quantize(batch).batch


def check_failed(answers: pa.RecordBatch, i: int, status: str, *words: str) -> None:
    row = {name: answers.column(name)[i].as_py() for name in answers.schema.names}
    assert row["status"] == status, row
    for word in words:
        assert word in row["error"], row
    assert all(row[name] is None for name in ANSWERS_OF_OK), row
    assert row["bytes_out"] == 0
    assert len(row["error"].encode()) < 1024


def check_neighbours(answers: pa.RecordBatch, bad: int, command: Command = INT4) -> None:
    for i in range(answers.num_rows):
        if i != bad:
            check_row(answers, i, reference_layer(GOOD, "float32", command))


def around(weights: Any, dtype: str = "float32") -> dict[str, Any]:
    """A layer between two good ones."""
    good = GOOD if dtype == "float32" else stored_as(GOOD, dtype)
    return {"before": good, "bad": weights, "after": good}


def override_columns(rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
    return {name: pa.array([row.get(name) for row in rows], kind) for name, kind in OVERRIDE_TYPES.items()}
