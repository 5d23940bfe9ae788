"""The main path over a real connection, with a stock client: every answer is the reference's, bit for bit."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_flight import Reply, exchange, fails, open_exchange
from fq_testing import Array, check_row, reference_layer, request, stored_as
from pyarrow import flight

from flightquant.reference import quality
from flightquant.server.admission import Admission
from flightquant.server.app import running_server
from flightquant.server.calls import Call, CallCancelledError
from flightquant.server.config import ServerConfig
from flightquant.server.exchange import ASK_S, _Step
from flightquant.spec import Command
from flightquant.wire import ANSWER_FIELDS, SUMS_HEADER

RNG = np.random.default_rng(7)
COMMANDS: list[dict[str, Any]] = [
    {"scheme": "int8"},
    {"scheme": "int4", "group_size": 32},
    {"bit_width": 4, "granularity": "channel", "symmetric": False},
    {"scheme": "q8_0"},
    {"op": "quantize", "scheme": "q4_0"},
    {"scheme": "nf4"},
]


def layers(dtype: str, count: int = 3, shape: tuple[int, ...] = (3, 64)) -> dict[str, Array]:
    """Named layers of one shape, in the dtype's own storage."""
    return {f"model.layers.{i}.weight": stored_as(RNG.standard_normal(shape), dtype) for i in range(count)}


def check_reply(reply: Reply, sent: list[dict[str, Array]], dtype: str, command: dict[str, Any]) -> None:
    """One batch of answers for each of layers, in order, and an end message that adds them up."""
    assert [batch.num_rows for batch in reply.batches] == [len(batch) for batch in sent]
    wanted = Command.parse(command)
    for batch, named in zip(reply.batches, sent, strict=True):
        assert batch.column("layer_name").to_pylist() == list(named)
        for i, weights in enumerate(named.values()):
            check_row(batch, i, reference_layer(weights, dtype, wanted))
    rows = reply.rows()
    sums = {key: sum(row[key] or 0 for row in rows) for key in ("bytes_in", "bytes_out", "bytes_copied", "kernel_ns")}
    failed = sum(row["status"] != "ok" for row in rows)
    assert reply.end == {
        "complete": True, "rows": len(rows), "batches": len(sent), "failed_rows": failed, **sums
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_dtype_and_scheme(client: flight.FlightClient, dtype: str, command: dict[str, Any]) -> None:
    sent = [layers(dtype), layers(dtype, 1)]
    reply = exchange(client, command, [request(batch, dtype) for batch in sent])
    check_reply(reply, sent, dtype, command)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [("float32", None), ("float16", None), ("float64", None), ("bfloat16", pa.uint16()), ("bfloat16", pa.binary(2))],
    ids=str,
)
def test_every_kind_of_list(client: flight.FlightClient, dtype: str, storage: Any, kind: str) -> None:
    sent = layers(dtype)
    command = {"scheme": "int4", "group_size": 64}
    reply = exchange(client, command, [request(sent, dtype, kind=kind, storage=storage)])
    check_reply(reply, [sent], dtype, command)


@pytest.mark.parametrize("names", [pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int32(), pa.utf8())], ids=str)
def test_every_type_of_name_and_no_shape(client: flight.FlightClient, names: pa.DataType) -> None:
    sent = {"a": RNG.standard_normal(64).astype(np.float32), "b": RNG.standard_normal(64).astype(np.float32)}
    batch = request(sent, columns={"layer_name": pa.array(list(sent), names)}).drop_columns(["shape"])
    command = {"scheme": "q8_0"}
    reply = exchange(client, command, [batch])
    check_reply(reply, [sent], "float32", command)
    assert reply.batches[0].column("shape").to_pylist() == [[64], [64]]


def test_the_answer_schema_is_the_contracts(client: flight.FlightClient) -> None:
    columns = {"x_tag": pa.array(["p", None, "q"]), "x_deep": pa.array([[{"n": 1}], [], None])}
    batch = request(layers("float32"), columns={**columns, "row_offset": pa.array([0, None, 5], pa.int64())})
    reply = exchange(client, {"scheme": "int8"}, [batch])
    echoed = [pa.field(name, array.type) for name, array in columns.items()]
    assert reply.schema.remove_metadata() == pa.schema([*ANSWER_FIELDS, *echoed])
    assert reply.schema.metadata[b"flightquant.contract"] == b"1"
    assert reply.schema.metadata[b"flightquant.version"]
    answer = reply.batches[0]
    for name in (*columns, "row_offset"):
        assert answer.column(name).to_pylist() == batch.column(name).to_pylist()


def test_rows_may_override_the_command(client: flight.FlightClient) -> None:
    sent = layers("float32", 4)
    overrides = [{"scheme": "int8"}, {}, {"scheme": "q4_0"}, {"symmetric": False}]
    columns = {
        "scheme": pa.array([row.get("scheme") for row in overrides], pa.utf8()),
        "symmetric": pa.array([row.get("symmetric") for row in overrides], pa.bool_()),
    }
    command = Command.parse({"scheme": "int4", "group_size": 32})
    answer = exchange(client, command.to_json(), [request(sent, columns=columns)]).batches[0]
    for i, (weights, row) in enumerate(zip(sent.values(), overrides, strict=True)):
        check_row(answer, i, reference_layer(weights, "float32", command.override(row)))


def test_an_empty_stream_is_begun_and_ended(client: flight.FlightClient) -> None:
    reply = exchange(client, {"scheme": "int8"}, [], schema=request(layers("float32")).schema)
    assert reply.schema.names[0] == "layer_name"
    assert reply.batches == []
    assert reply.end["complete"] is True
    assert reply.end["rows"] == reply.end["batches"] == 0


def test_the_first_answer_comes_before_the_last_request(client: flight.FlightClient) -> None:
    batch = request(layers("float32"))
    with open_exchange(client, {"scheme": "int8"}, batch.schema) as (writer, reader):
        writer.write_batch(batch)
        assert reader.read_chunk().data.num_rows == 3
        writer.write_batch(batch)
        assert reader.read_chunk().data.num_rows == 3
        writer.done_writing()
        assert reader.read_chunk().app_metadata.to_pybytes().startswith(b'{"complete": true, "rows": 6')


def test_a_reader_beside_the_writer_may_be_far_behind(client: flight.FlightClient) -> None:
    sent = [layers("float32", 1, (1024, 1024)) for _ in range(8)]
    command = {"scheme": "int8", "metrics": False}
    reply = Reply()
    with open_exchange(client, command, request(sent[0]).schema) as (writer, reader):

        def write() -> None:
            for batch in sent:
                writer.write_batch(request(batch))
            writer.done_writing()

        thread = threading.Thread(target=write)
        thread.start()
        while reply.end is None:
            reply.take(reader.read_chunk())
        thread.join()
    assert reply.end["rows"] == 8
    for batch, named in zip(reply.batches, sent, strict=True):
        (weights,) = named.values()
        check_row(batch, 0, reference_layer(weights, "float32", Command.parse(command)))


def test_one_thread_with_a_window_of_one_never_hangs(client: flight.FlightClient) -> None:
    weights = {"big": RNG.standard_normal((2048, 2048), np.float32)}
    batch = request(weights)
    reply = exchange(client, {"scheme": "int8", "metrics": False}, itertools.repeat(batch, 4))
    assert reply.end["rows"] == 4
    assert reply.end["bytes_copied"] == 0


def test_metadata_of_the_client_is_let_pass(client: flight.FlightClient) -> None:
    batch = request(layers("float32"))
    with open_exchange(client, {"scheme": "int8"}, batch.schema) as (writer, reader):
        writer.write_metadata(b"hello")
        writer.write_with_metadata(batch, b"again")
        chunk = reader.read_chunk()
        assert chunk.data.num_rows == 3
        assert chunk.app_metadata is None
        writer.done_writing()
        assert reader.read_chunk().data is None


def test_the_sums_come_if_and_only_if_asked_for(client: flight.FlightClient) -> None:
    sent = layers("float32")
    batch, command = request(sent), {"scheme": "int4", "group_size": 32}
    assert exchange(client, command, [batch], headers={SUMS_HEADER: "0"}).metadata == []
    (raw,) = exchange(client, command, [batch], headers={SUMS_HEADER: "1"}).metadata
    sums = np.frombuffer(raw, np.float64).reshape(3, 4)
    for row, weights in zip(sums, sent.values(), strict=True):
        expected = reference_layer(weights, "float32", Command.parse(command))
        np.testing.assert_array_equal(quality.columns(row), quality.columns(expected.sums))


def test_streams_at_once_give_each_their_own(client: flight.FlightClient) -> None:
    """One stream fails in the middle of another: the other never notices."""
    command = {"scheme": "int4", "group_size": 32}
    sent = [layers("float32") for _ in range(4)]
    reply = Reply()
    with open_exchange(client, command, request(sent[0]).schema) as (writer, reader):
        for batch in sent:
            writer.write_batch(request(batch))
            reply.take(reader.read_chunk())
            bad = {"bad": np.full((1, 64), np.nan, np.float32)}
            fails(client, {**command, "on_error": "abort"}, [request(bad)])
        writer.done_writing()
        reply.take(reader.read_chunk())
    check_reply(reply, sent, "float32", command)


def test_many_clients_at_once() -> None:
    config = ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=5)
    command = {"scheme": "int8"}
    errors: list[BaseException] = []

    def work(location: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sent = [{f"{seed}.{i}": rng.standard_normal((8, 96), np.float32)} for i in range(10)]
        try:
            with flight.connect(location) as own:
                check_reply(exchange(own, command, [request(batch) for batch in sent]), sent, "float32", command)
        except BaseException as error:
            errors.append(error)

    with running_server(config) as server:
        threads = [threading.Thread(target=work, args=(server.location, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert 1 <= server.admission.peak_calls <= 8


def test_grpc_is_asked_seldom_whether_a_call_was_cancelled_and_at_the_end_of_its_stream() -> None:
    class Context:
        asked, cancelled = 0, False

        def is_cancelled(self) -> bool:
            self.asked += 1
            return self.cancelled

    context = Context()
    step = _Step(Call("id", "DoExchange"), context, Admission(1, 1), 60.0)
    before = time.monotonic()
    for _ in range(100):
        step.check()
        assert not step.is_due()
    assert context.asked <= (time.monotonic() - before) / ASK_S
    context.cancelled = True
    with pytest.raises(CallCancelledError):
        step.check(at_end=True)
    # What gRPC said once holds.
    context.cancelled = False
    assert step.is_due()
    with pytest.raises(CallCancelledError):
        step.check()
