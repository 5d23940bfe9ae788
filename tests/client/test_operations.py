"""The other operations over the wire: magnitudes, weights back, quality; the same as the local calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from fq_testing import same_bits

import flightquant
from flightquant.client import AsyncQuantClient, QuantClient, batching, taken_back
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.layers import as_layer, layers_batch
from flightquant.server.app import running_server


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with running_server() as server:
        yield server.location


@pytest.fixture(params=["server", "local"])
def client(request: pytest.FixtureRequest, uri: str) -> Iterator[QuantClient]:
    with QuantClient(uri if request.param == "server" else "local", timeout_s=60) as client:
        yield client


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so low that layers of a few KiB are cut."""
    for name, value in (("MIN_BYTES", 4 << 10), ("TARGET_BYTES", 8 << 10), ("MAX_BYTES", 16 << 10)):
        monkeypatch.setattr(batching, name, value)
    monkeypatch.setattr(taken_back, "MAX_BYTES", 16 << 10)


def model() -> dict[str, Any]:
    rng = np.random.default_rng(8)
    shapes = {"small": (8, 256), "large": (64, 512), "row": (8192,), "deep": (3, 20, 256), "empty": (0, 256)}
    layers: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    layers["half"] = layers["deep"].astype(np.float16)
    layers["brain"] = layers["large"].astype(ml_dtypes.bfloat16)
    layers["large"][60, 3] = -77.5
    return layers


def test_amax(client: QuantClient) -> None:
    layers = model()
    table = client.amax(layers)
    assert table.column("layer_name").to_pylist() == list(layers)
    wanted = [float(np.abs(layer.astype(np.float32)).max(initial=0)) for layer in layers.values()]
    assert table.column("amax").to_pylist() == wanted
    assert table.column("shape").to_pylist() == [list(layer.shape) for layer in layers.values()]
    assert table.schema.equals(flightquant.amax(layers).schema)
    assert client.amax({}).num_rows == 0


def test_amax_of_a_bad_layer(client: QuantClient) -> None:
    layers = model()
    layers["large"][62, 5] = np.inf
    table = client.amax({name: layers[name] for name in ("small", "large")})
    assert table.column("status").to_pylist() == ["ok", "non_finite"]
    assert table.column("amax")[1].as_py() is None
    assert f"weight {62 * 512 + 5} " in table.column("error")[1].as_py()


def test_amax_of_a_table(client: QuantClient) -> None:
    layers = {name: layer for name, layer in model().items() if layer.dtype == np.float32}
    batch = layers_batch([as_layer(name, layer) for name, layer in layers.items()])
    echoed = batch.append_column("x_id", pa.array(range(len(layers))))
    table = client.amax(pa.Table.from_batches([echoed]))
    assert table.column("x_id").to_pylist() == list(range(len(layers)))
    assert table.column("amax").to_pylist() == client.amax(layers).column("amax").to_pylist()


def test_layers_that_run_as_one_get_one_scale(client: QuantClient) -> None:
    layers = {name: model()[name] for name in ("small", "large")}
    together = max(client.amax(layers).column("amax").to_pylist())
    batch = layers_batch([as_layer(name, layer) for name, layer in layers.items()])
    column = pa.array([together] * 2, pa.float32())
    table = client.quantize(pa.Table.from_batches([batch.append_column("global_amax", column)]), "nvfp4")
    first, second = (scales[-1] for scales in table.column("scales").to_pylist())
    assert first == second
    assert first == client.quantize({"large": layers["large"]}, "nvfp4").column("scales")[0].as_py()[-1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scheme", ["int4", "q5_k", "nvfp4"])
def test_dequantize(client: QuantClient, scheme: str, dtype: str) -> None:
    table = flightquant.quantize(model(), scheme)
    wanted = flightquant.dequantize(table, dtype=dtype)
    got = client.dequantize(table, dtype=dtype)
    assert list(got) == list(wanted)
    for name, weights in wanted.items():
        assert got[name].shape == weights.shape
        assert got[name].flags.writeable
        same_bits(got[name], weights, name)


def test_dequantize_joins_parts(client: QuantClient) -> None:
    weights = model()["large"]
    batches = [layers_batch([as_layer("w", weights[first : first + 16])], [first]) for first in range(0, 64, 16)]
    table = flightquant.quantize(pa.Table.from_batches(batches), "int8")
    same_bits(client.dequantize(table)["w"], flightquant.dequantize(table)["w"], "w")
    with pytest.raises(InvalidRequestError, match="row_offset"):
        client.dequantize(table.slice(1, 2))


def test_dequantize_refuses_a_bad_row(client: QuantClient) -> None:
    layers = {"good": np.ones((2, 128), np.float32), "bad": np.full((2, 128), np.nan, np.float32)}
    with pytest.raises(LayerError, match="bad") as caught:
        client.dequantize(flightquant.quantize(layers, "int4"))
    assert caught.value.status == "non_finite"
    with pytest.raises(InvalidRequestError, match="quantized_data"):
        client.dequantize(pa.table({"layer_name": ["w"], "shape": [[1]], "scheme": ["int4"]}))


@pytest.mark.parametrize("scheme", ["int8", "q4_k"])
def test_verify(client: QuantClient, scheme: str) -> None:
    layers = model()
    table = flightquant.quantize(layers, scheme)
    got, wanted = client.verify(layers, table), flightquant.verify(layers, table)
    assert got.combine_chunks().equals(wanted.combine_chunks())
    for name in ("sqnr_db", "cosine", "max_abs_error"):
        assert got.column(name).combine_chunks().equals(table.column(name).combine_chunks())
    with pytest.raises(InvalidRequestError, match="no weights"):
        client.verify({}, table)
    assert client.verify(layers, table.slice(0, 0)).num_rows == 0


def test_verify_finds_what_was_changed(client: QuantClient) -> None:
    layers = model()
    table = flightquant.quantize(layers, "int8")
    layers["small"] = -layers["small"]
    quality = client.verify(layers, table).column("sqnr_db").to_pylist()
    assert quality[0] < 0 < quality[1]


def test_parts_are_verified_with_their_own_rows(client: QuantClient) -> None:
    weights = model()["large"]
    batches = [layers_batch([as_layer("w", weights[first : first + 16])], [first]) for first in range(0, 64, 16)]
    table = flightquant.quantize(pa.Table.from_batches(batches), "int8")
    got = client.verify({"w": weights}, table)
    assert got.column("sqnr_db").to_pylist() == table.column("sqnr_db").to_pylist()


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_calibration_of_layers_in_parts(client: QuantClient, granularity: str) -> None:
    layers, options = model(), {"granularity": granularity, "calibration": "mse"}
    got, wanted = (call(layers, "int4", **options) for call in (client.quantize, flightquant.quantize))
    timeless = [name for name in got.schema.names if name not in ("kernel_ns", "sqnr_db", "cosine")]
    assert got.select(timeless).combine_chunks().equals(wanted.select(timeless).combine_chunks())


def test_fallback_of_layers_in_parts(client: QuantClient) -> None:
    rng = np.random.default_rng(9)
    layers = {f"w{shape}": rng.standard_normal(shape).astype(np.float32) for shape in ((64, 288), (64, 512), (8224,))}
    got = client.quantize(layers, "q5_k", fallback=True)
    assert got.column("scheme").to_pylist() == ["q5_1", "q5_k", "q5_1"]
    timeless = [name for name in got.schema.names if name != "kernel_ns"]
    assert (
        got.select(timeless)
        .combine_chunks()
        .equals(flightquant.quantize(layers, "q5_k", fallback=True).select(timeless).combine_chunks())
    )


def test_asyncio(uri: str) -> None:
    layers = model()
    table = flightquant.quantize(layers, "int8")

    async def calls() -> tuple[pa.Table, dict[str, Any], pa.Table]:
        async with AsyncQuantClient(uri, timeout_s=60) as client:
            return tuple(
                await asyncio.gather(client.amax(layers), client.dequantize(table), client.verify(layers, table))
            )

    amax, weights, verified = asyncio.run(calls())
    assert amax.column("amax").to_pylist() == flightquant.amax(layers).column("amax").to_pylist()
    assert list(weights) == list(layers)
    assert verified.combine_chunks().equals(flightquant.verify(layers, table).combine_chunks())
