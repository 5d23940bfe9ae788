"""The client and the real service: the same table as the local call, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_testing import STORAGE

import flightquant
from flightquant.client import QuantClient
from flightquant.errors import InvalidRequestError
from flightquant.layers import as_layer, layers_batch
from flightquant.server.app import running_server

COSTS = ["kernel_ns"]


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with running_server() as server:
        yield server.location


def check_same(over_the_wire: pa.Table, local: pa.Table) -> None:
    assert over_the_wire.schema.names == local.schema.names
    for name in local.schema.names:
        if name not in COSTS:
            assert over_the_wire.column(name).combine_chunks().equals(local.column(name).combine_chunks()), name
    assert all(ns > 0 for ns in over_the_wire.column("kernel_ns").to_pylist())


@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "int4", "group_size": 128},
        {"scheme": "int4", "symmetric": False},
        {"scheme": "int8"},
        {"scheme": "int8", "granularity": "tensor"},
        {"scheme": "int8", "granularity": "tensor", "symmetric": False},
        {"scheme": "int2"},
        {"scheme": "fp8_e4m3", "granularity": "tensor"},
        {"scheme": "q8_0"},
        {"scheme": "q4_0"},
        {"scheme": "nf4"},
    ],
    ids=str,
)
def test_same_table_as_the_local_call(uri: str, dtype: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(11)
    shapes = {"small": (8, 256), "cut": (2300, 4096), "flat": (128,), "deep": (3, 4, 128)}
    weights = {name: rng.normal(size=shape).astype(STORAGE[dtype]) for name, shape in shapes.items()}
    with QuantClient(uri, timeout_s=120) as client:
        check_same(client.quantize(weights, **options), flightquant.quantize(weights, **options))


def test_mixed_dtypes_strides_and_bad_layers(uri: str) -> None:
    rng = np.random.default_rng(12)
    bad = rng.normal(size=(2300, 2048)).astype(np.float32)
    bad[2000, 7] = np.inf
    weights = {
        "a": rng.normal(size=(64, 128)).astype(np.float32),
        "bad": bad,
        "half": rng.normal(size=(64, 128)).astype(np.float16),
        "uneven": rng.normal(size=(4, 100)).astype(np.float32),
        "brain": rng.normal(size=(64, 128)).astype(STORAGE["bfloat16"]),
    }
    with QuantClient(uri, timeout_s=60) as client:
        over_the_wire = client.quantize(weights, "int4", group_size=128)
    local = flightquant.quantize(weights, "int4", group_size=128)
    assert local.column("status").to_pylist() == ["ok", "non_finite", "ok", "unsupported", "ok"]
    for name in local.schema.names:
        if name != "kernel_ns":
            assert over_the_wire.column(name).to_pylist() == local.column(name).to_pylist(), name


def test_arrow_input_with_overrides_and_echoed_columns(uri: str) -> None:
    rng = np.random.default_rng(13)
    batch = layers_batch(
        [as_layer(f"w{i}", rng.normal(size=(1500 * i + 1, 4096)).astype(np.float32)) for i in range(3)]
    )
    batch = batch.append_column("scheme", pa.array([None, "int8", "q4_0"]))
    batch = batch.append_column("x_id", pa.array([5, 6, 7]))
    table = pa.Table.from_batches([batch.slice(0, 1), batch.slice(1)])
    with QuantClient(uri, timeout_s=60) as client:
        check_same(client.quantize(table, "int4"), flightquant.quantize(table, "int4"))


def test_on_error_abort(uri: str) -> None:
    bad = np.full((1, 128), np.nan, np.float32)
    with QuantClient(uri, timeout_s=60) as client, pytest.raises(InvalidRequestError, match='layer "w"') as caught:
        client.quantize({"w": bad}, "int4", on_error="abort")
    assert caught.value.request_id


@pytest.mark.slow
def test_256_mib_through_a_small_window(uri: str) -> None:
    rng = np.random.default_rng(14)
    big = rng.standard_normal((4096, 8192), dtype=np.float32)
    weights = {"a": big, "b": big[::-1]}
    with QuantClient(uri, timeout_s=300, window_bytes=1, window_batches=1) as client:
        table = client.quantize(weights, "int8")
    local = flightquant.quantize({"a": big}, "int8")
    assert table.column("quantized_data")[0] == local.column("quantized_data")[0]
    assert table.column("sqnr_db")[0] == local.column("sqnr_db")[0]
