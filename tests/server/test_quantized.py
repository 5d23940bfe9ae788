"""Quantized rows sent back to the service: weights again, or their quality, by a stock client."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_flight import exchange, fails, sample
from fq_testing import request, same_bits
from pyarrow import flight

from flightquant import reference
from flightquant.cython_core.engine import Limits
from flightquant.server.app import Server, running_server
from flightquant.server.config import ServerConfig
from flightquant.wire import SUMS_HEADER

LAYERS = {
    f"model.layers.{i}.w": np.random.default_rng(i).standard_normal((3, 256)).astype(np.float32) for i in range(4)
}
COLUMNS = ["layer_name", "shape", "scheme", "packing", "group_size", "quantized_data", "scales", "zero_points"]


def quantized(client: flight.FlightClient, **options: Any) -> pa.RecordBatch:
    (batch,) = exchange(client, {"scheme": "int4", **options}, [request(LAYERS)]).batches
    return batch


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scheme", ["int4", "fp8_e4m3", "q5_1", "nf4"])
def test_answers_as_they_came_give_the_weights_back(client: flight.FlightClient, scheme: str, dtype: str) -> None:
    batch = quantized(client, scheme=scheme)
    for sent in (batch, batch.select(COLUMNS)):
        reply = exchange(client, {"op": "dequantize", "dtype": dtype}, [sent, sent.slice(1)])
        assert [answer.num_rows for answer in reply.batches] == [4, 3]
        for name, row in zip(LAYERS, reply.rows(), strict=False):
            weights = reference.dequantize(batch, dtype=dtype)[name]
            assert (row["layer_name"], row["status"], row["shape"]) == (name, "ok", [3, 256])
            same_bits(np.array(row["weights"], dtype), weights.reshape(-1), name)
        assert reply.schema.names == ["layer_name", "shape", "weights", "status", "error"]
        assert (reply.end["rows"], reply.end["batches"], reply.end["failed_rows"]) == (7, 2, 0)
        assert reply.end["bytes_out"] == 7 * 768 * np.dtype(dtype).itemsize
        assert 0 < reply.end["bytes_in"] < 7 * 768 * 4
        assert reply.end["bytes_copied"] == 0


def test_quality_is_told_again_with_its_sums(client: flight.FlightClient) -> None:
    batch = quantized(client)
    sent = batch.append_column("weights", request(LAYERS).column("weights"))
    reply = exchange(client, {"op": "verify"}, [sent], headers={SUMS_HEADER: "1"})
    told = ["layer_name", "shape", "status", "error", "sqnr_db", "cosine", "max_abs_error"]
    assert reply.schema.names == told
    assert reply.batches[0].equals(batch.select(told))
    first = exchange(client, {"scheme": "int4"}, [request(LAYERS)], headers={SUMS_HEADER: "1"})
    assert reply.metadata == first.metadata
    assert reply.end["bytes_in"] > 4 * 768 * 4


def test_a_bad_row_is_one_row(client: flight.FlightClient) -> None:
    batch = quantized(client)
    packings = pa.array(["ct-int32", "gguf", None, "ct-int32"])
    sent = batch.set_column(batch.schema.names.index("packing"), "packing", packings)
    reply = exchange(client, {"op": "dequantize"}, [sent])
    assert [row["status"] for row in reply.rows()] == ["ok", "unsupported", "ok", "ok"]
    assert reply.end["failed_rows"] == 1
    failure = fails(client, {"op": "dequantize", "on_error": "abort"}, [sent])
    assert failure.extra["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ({"op": "dequantize", "dtype": "bfloat16"}, "dtype"),
        ({"op": "dequantize", "metrics": True}, "metrics"),
        ({"op": "dequantize", "symmetric": False}, "symmetric"),
        ({"op": "dequantize", "scheme": ""}, "scheme"),
        ({"op": "dequantize", "scheme": "int99"}, "scheme"),
        ({"op": "verify", "dtype": "float16"}, "dtype"),
        ({"op": "quantize", "scheme": "int4", "dtype": "float16"}, "dtype"),
        ({"op": "dequantise"}, "op"),
    ],
    ids=str,
)
def test_a_command_that_cannot_be_is_refused(client: flight.FlightClient, command: Any, field: str) -> None:
    failure = fails(client, command)
    assert (failure.extra["code"], failure.extra["field"]) == ("invalid_request", field)


def test_the_other_operations_columns_are_refused(client: flight.FlightClient) -> None:
    assert fails(client, {"op": "dequantize"}, [request(LAYERS)]).extra["field"] == "quantized_data"
    assert fails(client, {"op": "verify"}, [quantized(client)]).extra["field"] == "weights"
    assert fails(client, {"scheme": "int4"}, [quantized(client)]).extra["field"] == "weights"


def test_limits_count_what_the_rows_stand_for() -> None:
    config = ServerConfig(
        location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, limits=Limits(max_layer_bytes=3071)
    )
    with running_server() as plenty, running_server(config) as server:
        with flight.connect(plenty.location) as client:
            batch = quantized(client)
        with flight.connect(server.location) as client:
            reply = exchange(client, {"op": "dequantize"}, [batch])
            assert [row["status"] for row in reply.rows()] == ["too_large"] * 4
            half = exchange(client, {"op": "dequantize", "dtype": "float16"}, [batch])
            assert [row["status"] for row in half.rows()] == ["ok"] * 4


def test_metrics_know_the_operation(server: Server) -> None:
    with flight.connect(server.location) as client:
        batch = quantized(client)
        before = sample(server, "exchanges_total", op="dequantize", scheme="none", outcome="ok")
        layers = {"layer_class": "model.layers.*.w", "scheme": "int4"}
        weights = sample(server, "layer_weights_total", **layers)
        schemes = pa.array(["int4", "int4", "int4", "what"])
        exchange(client, {"op": "dequantize"}, [batch.set_column(5, "scheme", schemes)])
    assert sample(server, "exchanges_total", op="dequantize", scheme="none", outcome="ok") == before + 1
    assert sample(server, "layer_weights_total", **layers) >= weights + 3 * 768
