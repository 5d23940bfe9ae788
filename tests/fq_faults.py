"""Clients that misbehave, each in one bounded call: used by the tests one at a time and by the soak all together.

Every function takes the server's address and a seeded generator, does its harm, and returns what the client saw, as one
word or code. None of them waits for ever, whatever the server does.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
from fq_fuzz import mutate, valid_batch
from fq_ipc import serialized
from fq_rawflight import METHOD, RawReply, batch_data, flight_data, raw_exchange, schema_data
from pyarrow import flight

NEVER_SENT = (b"Traceback", b"site-packages", b".pyx", b"/work/", b"/home/")
COMMAND = json.dumps({"scheme": "int8"}).encode()
LAYER = pa.record_batch({"layer_name": ["w"], "weights": pa.array([np.ones(4096, np.float32)], pa.list_(pa.float32()))})
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Fault = Callable[[str, np.random.Generator], str]


def outcome(reply: RawReply) -> str:
    """The reply's code in a word; nothing that it sent may tell of the server's inside."""
    sent = [*reply.messages, reply.details.encode(), reply.trailers]
    for word in NEVER_SENT:
        assert not any(word in part for part in sent), f"{word!r} was sent"
    code = reply.details.partition(":")[0]
    return "ok" if reply.code is grpc.StatusCode.OK else code if code.replace("_", "").isalpha() else reply.code.name


def mutated(location: str, rng: np.random.Generator) -> str:
    """A valid stream with one to four bytes or integers changed (rows 3 and 5)."""
    batch = valid_batch("float32-list")
    stream = mutate(serialized(batch), rng)
    with pa.BufferReader(stream) as source:
        messages = []
        try:
            while (message := pa.ipc.read_message(source)) is not None and len(messages) < 10:
                body = b"" if message.body is None else message.body.to_pybytes()
                command = COMMAND if not messages else None
                messages.append(flight_data(message.metadata.to_pybytes(), body, command=command))
        except (pa.ArrowException, EOFError, OSError, ValueError, MemoryError):
            pass
    return outcome(raw_exchange(location, messages or [flight_data(stream, command=COMMAND)]))


def garbage_message(location: str, rng: np.random.Generator) -> str:
    """Good batches, then a message that is empty or does not parse (row 10): the end message tells what was counted."""
    bad = [b"", b"\xff" * 64, flight_data(rng.bytes(200)), rng.bytes(int(rng.integers(1, 2000)))]
    good = [schema_data(LAYER.schema, COMMAND), *[batch_data(LAYER)] * int(rng.integers(0, 5))]
    reply = raw_exchange(location, [*good, bad[int(rng.integers(0, len(bad)))], batch_data(LAYER)])
    if reply.code is grpc.StatusCode.OK:
        # What looks like a success says how many rows came: fewer than were sent.
        assert f'"rows": {len(good) - 1},'.encode() in reply.messages[-1]
        return "cut stream told"
    return outcome(reply)


def cancelled(location: str, rng: np.random.Generator) -> str:
    """A client that leaves after some messages (row 11)."""
    stop = threading.Event()

    def messages() -> Iterator[bytes]:
        yield schema_data(LAYER.schema, COMMAND)
        for _ in range(int(rng.integers(0, 8))):
            yield batch_data(LAYER)
        stop.wait(float(rng.uniform(0, 0.2)))
        call.cancel()

    with grpc.insecure_channel(location.removeprefix("grpc://")) as channel:
        call = channel.stream_stream(METHOD)(messages(), timeout=20)
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            return str(error.code().name)
        finally:
            stop.set()
    return "ok"


KILLED = """
import sys, time, pyarrow as pa, pyarrow.flight as flight
client = flight.connect(sys.argv[1])
writer, reader = client.do_exchange(flight.FlightDescriptor.for_command('{"scheme": "int8"}'))
batch = pa.record_batch({"layer_name": ["a"], "weights": pa.array([[1.0] * 4096], pa.list_(pa.float32()))})
steps = int(sys.argv[2])
if steps > 0:
    writer.begin(batch.schema)
for step in range(steps - 1):
    writer.write_batch(batch)
    if step % 2:
        reader.read_chunk()
print("here", flush=True)
time.sleep(600)
"""


def killed(location: str, rng: np.random.Generator) -> str:
    """A client process that is killed at some message boundary (row 11)."""
    steps = str(int(rng.integers(0, 9)))
    with subprocess.Popen([sys.executable, "-c", KILLED, location, steps], stdout=-1, stderr=-3, text=True) as client:
        assert client.stdout is not None
        line = client.stdout.readline()
        client.kill()
    return "killed" if line else "refused"


def slow_reader(location: str, rng: np.random.Generator) -> str:
    """A client that writes and never reads, for some seconds (rows 14 and 15)."""
    size = int(rng.choice([1 << 12, 1 << 18, 1 << 20]))
    batch = pa.record_batch({"layer_name": ["w"], "weights": pa.array([np.ones(size, np.float32)])})
    client = flight.connect(location)
    options = flight.FlightCallOptions(timeout=float(rng.uniform(1, 4)))
    try:
        writer, _ = client.do_exchange(flight.FlightDescriptor.for_command(COMMAND), options)
        writer.begin(batch.schema)
        for _ in range((64 << 20) // (4 * size)):
            writer.write_batch(batch)
        writer.done_writing()
        return "written"
    except (pa.ArrowException, OSError) as error:
        return type(error).__name__
    finally:
        client.close()


def idle_connections(location: str, rng: np.random.Generator) -> str:
    """Connections that say nothing, or only the preface (row 16)."""
    held = []
    try:
        for i in range(int(rng.integers(10, 100))):
            held.append(connect(location))
            if i % 2:
                held[-1].sendall(PREFACE + frame(4))
        time.sleep(1)
    finally:
        for one in held:
            one.close()
    return "closed"


def connect(location: str) -> socket.socket:
    """A TCP connection to the server."""
    host, _, port = location.removeprefix("grpc://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers_block(path: str = METHOD) -> bytes:
    """An HPACK block of literal headers, as a gRPC call opens with."""
    pairs = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in pairs.items()
    )


def flood(location: str, rng: np.random.Generator, count: int = 2000) -> str:
    """Resets, pings, settings or plain garbage, as fast as the socket takes them (row 17)."""
    kinds = {
        "resets": lambda i: frame(1, 4, 2 * i + 1, headers_block()) + frame(3, 0, 2 * i + 1, struct.pack(">I", 8)),
        "pings": lambda i: frame(6, payload=struct.pack(">Q", i)),
        "settings": lambda i: frame(4, payload=struct.pack(">HI", 4, 65535 + i % 2)),
        "garbage": lambda i: rng.bytes(64),
    }
    name = list(kinds)[int(rng.integers(0, len(kinds)))]
    with connect(location) as sock:
        try:
            sock.sendall(PREFACE + frame(4))
            for start in range(0, count, 100):
                sock.sendall(b"".join(map(kinds[name], range(start, start + 100))))
            sock.settimeout(0.5)
            while sock.recv(1 << 16):
                pass
        except TimeoutError:
            return f"{name} borne"
        except OSError:
            pass
    return f"{name} refused"


def large_message(location: str, rng: np.random.Generator) -> str:
    """One message far above the server's limit for a batch (row 9)."""
    batch = pa.record_batch({"layer_name": ["w"], "weights": pa.array([np.zeros(24 << 20, np.float32)])})
    client = flight.connect(location)
    try:
        writer, reader = client.do_exchange(
            flight.FlightDescriptor.for_command(COMMAND), flight.FlightCallOptions(timeout=30)
        )
        writer.begin(batch.schema)
        writer.write_batch(batch)
        reader.read_chunk()
    except (pa.ArrowException, OSError) as error:
        return str(error).partition(":")[0][:40]
    finally:
        client.close()
    return "ok"


def bomb(location: str, rng: np.random.Generator) -> str:
    """A batch of zeros compressed a thousandfold (row 8), of a size that the server could also take uncompressed."""
    batch = pa.record_batch({"layer_name": ["w"], "weights": pa.array([np.zeros(8 << 20, np.float32)])})
    options = pa.ipc.IpcWriteOptions(compression=str(rng.choice(["zstd", "lz4"])))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    with pa.BufferReader(sink.getvalue()) as source:
        pa.ipc.read_message(source)
        message = pa.ipc.read_message(source)
    body = flight_data(message.metadata.to_pybytes(), message.body.to_pybytes())
    return outcome(raw_exchange(location, [schema_data(batch.schema, COMMAND), body]))


def endless_rows(location: str, rng: np.random.Generator) -> str:
    """2^62 rows of a column without width (row 7)."""
    batch = pa.record_batch({"x": pa.nulls(3)})
    data = batch_data(batch).replace(struct.pack("<q", 3), struct.pack("<q", 2**62))
    return outcome(raw_exchange(location, [schema_data(batch.schema, COMMAND), data]))


def corpus_file(files: list[Path]) -> Fault:
    """A fuzz file of the Arrow project as the stream's messages, one header, or a whole message (row 1)."""

    def fault(location: str, rng: np.random.Generator) -> str:
        raw = files[int(rng.integers(0, len(files)))].read_bytes()[: 4 << 20]
        good = [schema_data(LAYER.schema, COMMAND), batch_data(LAYER)]
        ways = [
            [flight_data(raw, command=COMMAND)],
            [raw],
            [flight_data(raw[:200], raw[200:], command=COMMAND)],
            [*good, flight_data(raw)],
            [*good, raw],
        ]
        return outcome(raw_exchange(location, ways[int(rng.integers(0, len(ways)))]))

    return fault


FAULTS: dict[str, Fault] = {
    "mutated": mutated,
    "garbage message": garbage_message,
    "cancelled": cancelled,
    "killed": killed,
    "slow reader": slow_reader,
    "idle connections": idle_connections,
    "flood": flood,
    "large message": large_message,
    "bomb": bomb,
    "endless rows": endless_rows,
}
