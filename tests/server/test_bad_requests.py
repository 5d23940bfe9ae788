"""Every way to break the contract gives the error that it names, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from fq_flight import NEVER_SENT, Reply, check_error, exchange, fails, open_exchange, options
from fq_rawflight import RawReply, batch_data, flight_data, raw_exchange, schema_data
from fq_testing import Array, request
from pyarrow import flight

from flightquant.cython_core.engine import Limits
from flightquant.server.app import Server, running_server
from flightquant.server.config import ServerConfig
from flightquant.server.exchange import MAX_METADATA_MESSAGES

GOOD = {"scheme": "int4", "group_size": 32}
WEIGHTS: dict[str, Array] = {"a": np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)}
BATCH = request(WEIGHTS)
COMMAND = json.dumps(GOOD).encode()
BEGIN = schema_data(BATCH.schema, COMMAND)

BAD_COMMANDS: list[tuple[Any, str]] = [
    (b"", "command"),
    (b"int4", "command"),
    (b"\xff\xfe\x00", "command"),
    (b'{"scheme": "int4"', "command"),
    (b'["int4"]', "command"),
    (b"null", "command"),
    (b"[" * 60_000, "command"),
    (b'{"scheme": "int4", "scheme": "int8"}', "command"),
    (b" " * 70_000, "command"),
    ({}, "scheme"),
    ({"scheme": "int5x"}, "scheme"),
    ({"scheme": 4}, "scheme"),
    ({"scheme": None}, "scheme"),
    ({"schema": "int4"}, "schema"),
    ({"op": "explode", "scheme": "int4"}, "op"),
    ({"bit_width": 5}, "bit_width"),
    ({"bit_width": True}, "bit_width"),
    ({"bit_width": 4, "scheme": "int8"}, "bit_width"),
    ({"scheme": "int4", "granularity": "row"}, "granularity"),
    ({"scheme": "q4_0", "granularity": "channel"}, "granularity"),
    ({"scheme": "int4", "group_size": 7}, "group_size"),
    ({"scheme": "int4", "group_size": 128.0}, "group_size"),
    ({"scheme": "int4", "granularity": "tensor", "group_size": 32}, "group_size"),
    (b'{"scheme": "int4", "group_size": NaN}', "group_size"),
    (b'{"scheme": "int4", "group_size": ' + b"9" * 4000 + b"}", "group_size"),
    ({"scheme": "q8_0", "symmetric": False}, "symmetric"),
    ({"scheme": "int4", "symmetric": "no"}, "symmetric"),
    ({"scheme": "int4", "scale_dtype": "float8"}, "scale_dtype"),
    ({"scheme": "q8_0", "scale_dtype": "float16"}, "scale_dtype"),
    ({"scheme": "int4", "on_error": "ignore"}, "on_error"),
    ({"scheme": "int4", "metrics": 1}, "metrics"),
    ({"scheme": "int4", "x" * 20_000: 1}, None),
    ({"scheme": "\u00e9\n\x00" * 2000}, "scheme"),
]


@pytest.mark.parametrize(("command", "field"), BAD_COMMANDS, ids=lambda value: str(value)[:60])
def test_a_bad_command(client: flight.FlightClient, command: Any, field: str | None) -> None:
    failure = fails(client, command, schema=BATCH.schema)
    assert failure.extra["code"] == "invalid_request"
    assert field is None or failure.extra["field"] == field
    assert failure.reply.batches == []


def test_an_unknown_key_is_named_with_what_is_allowed(client: flight.FlightClient) -> None:
    failure = fails(client, {"scheme": "int5x"}, schema=BATCH.schema)
    assert str(failure.error).startswith('invalid_request: unknown scheme "int5x"; ')
    assert failure.extra["got"] == "int5x"
    assert {"int8", "int4", "q8_0", "q4_0"} <= set(failure.extra["expected"])


@pytest.mark.parametrize("path", [("a",), ("a", "b"), ()])
def test_a_path_descriptor(client: flight.FlightClient, path: tuple[str, ...]) -> None:
    failure = fails(client, flight.FlightDescriptor.for_path(*path), schema=BATCH.schema)
    assert failure.extra["code"] == "invalid_request"
    assert failure.extra["field"] == "descriptor"
    assert failure.extra["got"] == "a path descriptor"


def test_a_bad_command_is_refused_before_any_data_is_read(client: flight.FlightClient) -> None:
    """The error comes though the client has sent neither schema nor end."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"{}"), options())
    with pytest.raises(flight.FlightServerError) as caught:
        reader.read_chunk()
    assert check_error(caught.value)["code"] == "invalid_request"
    with pytest.raises(pa.ArrowException):
        writer.close()


def column(name: str, values: Any, kind: pa.DataType | None = None, metadata: Any = None) -> pa.RecordBatch:
    """The good batch with one column more, or in place of its own."""
    array = values if isinstance(values, pa.Array) else pa.array(values, kind)
    fields = {field.name: (field, BATCH.column(field.name)) for field in BATCH.schema}
    fields[name] = (pa.field(name, array.type, metadata=metadata), array)
    return pa.RecordBatch.from_arrays(
        [array for _, array in fields.values()], schema=pa.schema([field for field, _ in fields.values()])
    )


FLOATS = [[1.0] * 64]
BAD_SCHEMAS: list[tuple[str, pa.RecordBatch]] = [
    ("layer_name", BATCH.drop_columns(["layer_name"])),
    ("weights", BATCH.drop_columns(["weights"])),
    ("layer_name", column("layer_name", [1])),
    ("layer_name", column("layer_name", [b"a"], pa.binary())),
    ("layer_name", column("layer_name", pa.array(["a"], pa.string_view()))),
    ("layer_name", column("layer_name", pa.array([1]).dictionary_encode())),
    ("weights", column("weights", [1.0])),
    ("weights", column("weights", [[1] * 64], pa.list_(pa.int8()))),
    ("weights", column("weights", [[1] * 64], pa.list_(pa.uint16()))),
    ("weights", column("weights", [[1] * 64], pa.list_(pa.uint16()), {"dtype": "float16"})),
    ("weights", column("weights", [[b"ab"] * 64], pa.list_(pa.binary(2)))),
    ("weights", column("weights", pa.array(FLOATS, pa.list_view(pa.float32())))),
    ("weights", column("weights", [FLOATS], pa.list_(pa.list_(pa.float32())))),
    ("shape", column("shape", [[2, 32]], pa.list_(pa.int32()))),
    ("shape", column("shape", [64])),
    ("scheme", column("scheme", [4])),
    ("scheme", column("scheme", pa.array(["int4"]).dictionary_encode())),
    ("group_size", column("group_size", ["32"])),
    ("symmetric", column("symmetric", [1])),
    ("row_offset", column("row_offset", [0], pa.int32())),
    ("importance", column("importance", [[1.0]], pa.list_(pa.float64()))),
    ("global_amax", column("global_amax", [1.0], pa.float64())),
    ("bias", column("bias", [1])),
    ("x_tag", column("x_tag", pa.array(["p"]).dictionary_encode())),
    ("x_tag", column("x_tag", pa.array(["p"], pa.string_view()))),
    ("x_run", column("x_run", pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["p"])))),
    ("x_ext", column("x_ext", pa.array([b"x" * 16], pa.uuid()))),
]


@pytest.mark.parametrize(("field", "batch"), BAD_SCHEMAS, ids=lambda value: str(value)[:30])
def test_a_bad_schema(client: flight.FlightClient, field: str, batch: pa.RecordBatch) -> None:
    failure = fails(client, GOOD, schema=batch.schema)
    assert failure.extra["code"] == "invalid_request"
    assert failure.extra["field"] == field


def test_a_column_that_stands_twice(client: flight.FlightClient) -> None:
    failure = fails(client, GOOD, schema=pa.schema([*BATCH.schema, BATCH.schema.field(0)]))
    assert (failure.extra["code"], failure.extra["field"]) == ("invalid_request", "layer_name")


def test_no_schema_at_all(client: flight.FlightClient) -> None:
    failure = fails(client, GOOD)
    assert (failure.extra["code"], failure.extra["field"]) == ("invalid_request", "stream")


PATCHED = request({"eleven char": np.linspace(1, 2, 96, dtype=np.float32).reshape(2, 1, 3, 16)})


@pytest.mark.parametrize("last", [97, 10**6, 2**31 - 1])
@pytest.mark.parametrize("first", [0, -1, -(2**31)])
@pytest.mark.parametrize(("column", "length"), [("weights", 96), ("layer_name", 11), ("shape", 4)])
def test_offsets_that_point_outside(server: Server, column: str, length: int, first: int, last: int) -> None:
    """No library would send these: the offsets are changed in the message's bytes."""
    message = pa.ipc.read_message(PATCHED.serialize())
    header, body = message.metadata.to_pybytes(), message.body.to_pybytes()
    before, after = (np.array(values, np.int32).tobytes() for values in ((0, length), (first, last)))
    assert body.count(before) == 1
    bad = flight_data(header, body.replace(before, after))
    command = b'{"scheme": "int8"}'
    begin = schema_data(PATCHED.schema, command)
    reply = raw_exchange(server.location, [begin, batch_data(PATCHED), bad, batch_data(PATCHED)])
    check_raw(reply)
    assert reply.code is grpc.StatusCode.UNKNOWN
    assert len(reply.messages) == 2  # the schema, and the answer to the good batch before the bad one


def test_a_name_that_is_no_utf8(client: flight.FlightClient) -> None:
    name = pa.Array.from_buffers(
        pa.utf8(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    assert fails(client, GOOD, [column("layer_name", name)]).extra["code"] == "invalid_request"


BAD_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("non_finite", {"weights": [[1.0, float("nan")] * 32]}),
    ("non_finite", {"weights": [[1.0, float("-inf")] * 32]}),
    ("shape_mismatch", {"shape": [[2, 31]]}),
    ("shape_mismatch", {"shape": [[2**32, 2**32]]}),
    ("shape_mismatch", {"shape": [[-2, -32]]}),
    ("shape_mismatch", {"shape": [[1] * 9 + [64]]}),
    ("null_weights", {"weights": [None]}),
    ("null_weights", {"weights": [[1.0, None] * 32]}),
    ("unsupported", {"scheme": ["int5x"]}),
    ("unsupported", {"shape": [[64, 1]]}),
    ("empty_name", {"layer_name": [""]}),
    ("empty_name", {"layer_name": [None]}),
]
KINDS = {
    "weights": pa.list_(pa.float32()),
    "shape": pa.list_(pa.int64()),
    "scheme": pa.utf8(),
    "layer_name": pa.utf8(),
}


@pytest.mark.parametrize(("status", "columns"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_bad_layer_is_a_row_or_ends_the_call(
    client: flight.FlightClient, status: str, columns: dict[str, Any]
) -> None:
    ((name, values),) = columns.items()
    bad = column(name, values, KINDS[name])
    good = BATCH if name in BATCH.schema.names else column(name, [None], KINDS[name])
    good, bad = good.cast(bad.schema), bad
    reply = exchange(client, GOOD, [good, bad, good])
    assert [row["status"] for row in reply.rows()] == ["ok", status, "ok"]
    row = reply.rows()[1]
    assert row["error"]
    assert row["quantized_data"] is None
    assert row["sqnr_db"] is None
    assert reply.end["failed_rows"] == 1
    failure = fails(client, {**GOOD, "on_error": "abort"}, [good, bad])
    assert failure.extra["code"] == "invalid_request"
    assert failure.extra["got"] == status
    assert len(failure.reply.batches) == 1


@pytest.fixture(scope="module")
def small() -> Any:
    """A server whose limits are small."""
    from flightquant.cython_core.engine import Limits

    limits = Limits(max_rows=4, max_layer_bytes=1024, max_batch_bytes=2048, max_call_bytes=4096)
    config = ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=5, limits=limits)
    with running_server(config) as server, flight.connect(server.location) as client:
        yield client


def test_too_many_rows(small: flight.FlightClient) -> None:
    batch = request({str(i): np.ones((1, 32), np.float32) for i in range(5)})
    assert fails(small, GOOD, [batch]).extra["code"] == "too_large"


def test_a_batch_too_large(small: flight.FlightClient) -> None:
    batch = request({str(i): np.ones((6, 32), np.float32) for i in range(4)})
    failure = fails(small, GOOD, [batch])
    assert (failure.extra["code"], failure.extra["expected"]) == ("too_large", 2048)


def test_a_call_too_large(small: flight.FlightClient) -> None:
    batch = request({str(i): np.ones((4, 32), np.float32) for i in range(4)})
    failure = fails(small, GOOD, [batch] * 3)
    assert failure.extra["code"] == "too_large"
    assert len(failure.reply.batches) == 2


def test_a_layer_too_large_is_a_row(small: flight.FlightClient) -> None:
    reply = exchange(small, GOOD, [request({"big": np.ones((9, 32), np.float32), "ok": np.ones((1, 32), np.float32)})])
    assert [row["status"] for row in reply.rows()] == ["too_large", "ok"]


def test_metadata_of_a_schema_is_bounded(client: flight.FlightClient) -> None:
    for schema in (
        BATCH.schema.with_metadata({"k": b"x" * (64 << 20)}),
        BATCH.schema.set(0, BATCH.schema.field(0).with_metadata({"k": b"x" * (Limits().max_metadata_bytes + 1)})),
    ):
        failure = fails(client, GOOD, schema=schema)
        assert (failure.extra["code"], failure.extra["field"]) == ("too_large", "max_metadata_bytes")
    small = BATCH.replace_schema_metadata({"pandas": b"x" * 10_000})
    assert exchange(client, GOOD, [small]).end["rows"] == 1


def test_four_hundred_thousand_columns(client: flight.FlightClient) -> None:
    schema = pa.schema([(f"x_{i}", pa.null()) for i in range(400_000)])
    assert fails(client, GOOD, schema=schema).extra["code"] == "invalid_request"


def test_a_hundred_thousand_empty_batches(server: Server) -> None:
    reply = raw_exchange(server.location, [BEGIN, *[batch_data(BATCH.slice(0, 0))] * 100_000])
    assert reply.code is grpc.StatusCode.UNKNOWN
    assert reply.details.startswith("invalid_request: ")
    assert len(reply.messages) <= 1


def test_metadata_is_bounded(client: flight.FlightClient) -> None:
    with open_exchange(client, GOOD, BATCH.schema) as (writer, reader):
        writer.write_metadata(b"x" * (Limits().max_metadata_bytes + 1))
        with pytest.raises(flight.FlightServerError) as caught:
            reader.read_chunk()
    assert check_error(caught.value)["code"] == "too_large"
    reply = Reply()
    with open_exchange(client, GOOD, BATCH.schema) as (writer, reader):
        writer.write_with_metadata(BATCH, b"beside a batch: not counted")
        reply.take(reader.read_chunk())
        for _ in range(MAX_METADATA_MESSAGES):
            writer.write_metadata(b"x")
        writer.write_batch(BATCH)
        reply.take(reader.read_chunk())
        writer.write_metadata(b"x")
        with pytest.raises(flight.FlightServerError) as caught:
            reader.read_chunk()
    assert check_error(caught.value)["code"] == "too_large"


# Arrow reads the first message by itself: what is wrong with that one never reaches our code.
BEFORE_THE_HANDLER = (
    "Descriptor missing on first message",
    "Stream finished before first message sent",
    "Invalid flatbuffers message.",
)


def check_raw(reply: RawReply) -> None:
    """A typed error, or an end message that tells what the server received; nothing given away."""
    sent = reply.details.encode() + reply.trailers + b"".join(reply.messages)
    for word in NEVER_SENT:
        assert word.encode() not in sent
    if reply.code is grpc.StatusCode.OK:
        assert b'{"complete": true, "rows": 1,' in reply.messages[-1]
    else:
        assert reply.details.startswith(("invalid_request: ", *BEFORE_THE_HANDLER)), reply.details
        assert reply.code is grpc.StatusCode.UNKNOWN


OTHER = schema_data(pa.schema([("z", pa.utf8())]))
STREAMS: dict[str, list[bytes]] = {
    "no descriptor": [schema_data(BATCH.schema), batch_data(BATCH)],
    "no message": [],
    "an empty message first": [b"", BEGIN],
    "garbage for a schema": [flight_data(b"\xde\xad\xbe\xef" * 8, command=COMMAND)],
    "a batch for a schema": [flight_data(command=COMMAND), batch_data(BATCH)],
    "a short schema": [flight_data(schema_data(BATCH.schema)[8:40], command=COMMAND)],
    "a command alone": [flight_data(command=COMMAND)],
    "garbage after a batch": [BEGIN, batch_data(BATCH), flight_data(b"\x01" * 64, b"\x02" * 64)],
    "a batch without its body": [BEGIN, batch_data(BATCH), batch_data(BATCH)[:-200]],
    "a second schema": [BEGIN, batch_data(BATCH), OTHER],
    "an empty message in the middle": [BEGIN, batch_data(BATCH), b"", batch_data(BATCH)],
    "no protobuf in the middle": [BEGIN, batch_data(BATCH), b"\xff" * 30, batch_data(BATCH)],
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_broken_stream_is_an_error_or_tells_its_rows(server: Server, name: str) -> None:
    check_raw(raw_exchange(server.location, STREAMS[name]))


def test_the_server_goes_on_after_all_of_it(client: flight.FlightClient) -> None:
    assert exchange(client, GOOD, [BATCH]).end["rows"] == 1
