"""What errors count, over the wire: the same table as the local call, whole layers and layers in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flightquant
from flightquant.client import AsyncQuantClient, QuantClient, batching
from flightquant.errors import InvalidRequestError
from flightquant.layers import as_layer, layers_batch
from flightquant.server.app import running_server

SHAPES = {"small": (8, 256), "none": (2, 512), "cut": (64, 512), "row": (8192,), "deep": (3, 20, 256)}


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with running_server() as server:
        yield server.location


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so low that layers of a few KiB are cut."""
    for name, value in (("MIN_BYTES", 4 << 10), ("TARGET_BYTES", 8 << 10), ("MAX_BYTES", 16 << 10)):
        monkeypatch.setattr(batching, name, value)


def model() -> tuple[dict[str, Any], dict[str, Any]]:
    """Layers, float16 among them, and the importance of all but one."""
    rng = np.random.default_rng(8)
    layers = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    layers["half"] = layers["deep"].astype(np.float16)
    return layers, {name: rng.random(layer.shape[-1]) for name, layer in layers.items() if name != "none"}


def check_same(got: pa.Table, local: pa.Table) -> None:
    # Row by row: how many weights a float32 sum covers depends on where a layer is cut.
    for name in ("layer_name", "shape", "status", "scheme", "quantized_data"):
        assert got.column(name).combine_chunks().equals(local.column(name).combine_chunks()), name
    assert set(local.column("status").to_pylist()) == {"ok"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scheme", ["q4_k", "iq4_nl"])
def test_a_mapping(uri: str, scheme: str) -> None:
    layers, importance = model()
    local = flightquant.quantize(layers, scheme, importance=importance)
    with QuantClient(uri, timeout_s=60) as client:
        check_same(client.quantize(layers, scheme, importance=importance), local)
        batches = list(client.stream({"deep": layers["deep"]}, scheme, importance=importance))
    assert batches[0].column("quantized_data")[0] == local.column("quantized_data")[4]
    with QuantClient("local") as client:
        check_same(client.quantize(layers, scheme, importance=importance), local)


@pytest.mark.usefixtures("small")
def test_a_column(uri: str) -> None:
    layers, importance = model()
    del layers["half"]
    batch = layers_batch([as_layer(name, layer) for name, layer in layers.items()])
    column = pa.array([importance.get(name) for name in layers], pa.list_(pa.float32()))
    table = pa.Table.from_batches([batch.append_column("importance", column)])
    with QuantClient(uri, timeout_s=60) as client:
        check_same(client.quantize(table, "q5_k"), flightquant.quantize(layers, "q5_k", importance=importance))
        with pytest.raises(InvalidRequestError, match="column"):
            client.quantize(table, "q5_k", importance=importance)


@pytest.mark.usefixtures("small")
def test_a_wrong_length_is_the_layers_own_error(uri: str) -> None:
    layers, importance = model()
    importance["cut"], importance["row"] = [1.0], [1.0] * 8191
    with QuantClient(uri, timeout_s=60) as client:
        table = client.quantize(layers, "q4_k", importance=importance)
    assert table.column("status").to_pylist() == ["ok", "ok", "shape_mismatch", "shape_mismatch", "ok", "ok"]


def test_asyncio(uri: str) -> None:
    layers, importance = model()

    async def call() -> tuple[pa.Table, list[pa.RecordBatch]]:
        async with AsyncQuantClient(uri, timeout_s=60) as client:
            table = await client.quantize(layers, "q2_k", importance=importance)
            return table, [batch async for batch in client.stream(layers, "q2_k", importance=importance)]

    table, batches = asyncio.run(call())
    local = flightquant.quantize(layers, "q2_k", importance=importance)
    check_same(table, local)
    check_same(pa.Table.from_batches(batches), local)
