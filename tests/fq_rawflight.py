"""Flight spoken byte by byte through grpcio: what no Flight library would send."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import grpc
import pyarrow as pa

METHOD = "/arrow.flight.protocol.FlightService/DoExchange"


def _field(number: int, payload: bytes) -> bytes:
    """One length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def flight_data(header: bytes = b"", body: bytes = b"", command: bytes | None = None, metadata: bytes = b"") -> bytes:
    """One FlightData message; fields that are empty are left out."""
    parts = []
    if command is not None:
        parts.append(_field(1, b"\x08\x02" + _field(2, command)))
    for number, payload in ((2, header), (3, metadata), (1000, body)):
        if payload:
            parts.append(_field(number, payload))
    return b"".join(parts)


def schema_data(schema: pa.Schema, command: bytes | None = None) -> bytes:
    """The message that begins a stream."""
    message = pa.ipc.read_message(schema.serialize())
    return flight_data(message.metadata.to_pybytes(), command=command)


def batch_data(batch: pa.RecordBatch) -> bytes:
    """The message of one batch without dictionaries."""
    message = pa.ipc.read_message(batch.serialize())
    return flight_data(message.metadata.to_pybytes(), message.body.to_pybytes())


@dataclass
class RawReply:
    """What came back: messages, the status, and every byte of the trailers."""

    messages: list[bytes]
    code: grpc.StatusCode
    details: str
    trailers: bytes


def raw_exchange(location: str, messages: Iterable[bytes], timeout: float = 30.0) -> RawReply:
    """Send these messages as a DoExchange and half-close."""
    received: list[bytes] = []
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(location.removeprefix("grpc://"), options) as channel:
        call = channel.stream_stream(METHOD)(iter(messages), timeout=timeout)
        try:
            received.extend(call)
        except grpc.RpcError as error:
            assert error is call or error.code() == call.code()
        trailers = b"\n".join(
            value if isinstance(value, bytes) else value.encode() for _, value in call.trailing_metadata() or ()
        )
        return RawReply(received, call.code(), call.details() or "", trailers)
