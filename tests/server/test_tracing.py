"""Spans, as a collector receives them over OTLP/HTTP."""

from __future__ import annotations

import dataclasses
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pyarrow import flight

from flightquant.client import QuantClient
from flightquant.layers import as_layer, layers_batch
from flightquant.server.app import running_server
from flightquant.server.calls import MAX_STAGES, Call, Stages
from flightquant.server.config import ConfigError, ServerConfig
from flightquant.server.metrics import STAGES

CONFIG = ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=5.0)
WEIGHTS = {f"layers.{i}.w": np.ones((4, 256), np.float32) for i in range(3)}
LAYER = layers_batch([as_layer("w", WEIGHTS["layers.0.w"])])
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                assert ("service.name", "flightquant") in {
                    (each.key, each.value.string_value) for each in resource.resource.attributes
                }
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


def quantize(location: str, headers: dict[str, str]) -> None:
    with QuantClient(location, headers=headers) as client:
        assert client.quantize(WEIGHTS, "int4").num_rows == 3


def ask_nonsense(location: str, headers: dict[str, str]) -> None:
    options = flight.FlightCallOptions(headers=[(key.encode(), value.encode()) for key, value in headers.items()])
    with flight.connect(location) as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b'{"scheme": "int9"}'), options)
        with pytest.raises(flight.FlightError), writer:
            writer.begin(LAYER.schema)
            writer.write_batch(LAYER)
            writer.done_writing()
            reader.read_chunk()


def spans_of(flags: str, ask: Callable[[str, dict[str, str]], None] = quantize) -> list[Any]:
    """What a collector has after one call and the server's end."""
    with collector() as (endpoint, spans):
        with running_server(dataclasses.replace(CONFIG, otlp_endpoint=endpoint)) as server:
            ask(server.location, {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"} if flags else {})
        return spans


def facts(span: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_call_and_its_stages_join_the_callers_trace() -> None:
    spans = spans_of("01")
    (call,) = (span for span in spans if span.name == "flightquant DoExchange")
    stages = [span for span in spans if span is not call]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert call.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in stages} == {call.span_id}
    assert {span.name for span in stages} == set(STAGES)
    assert all(call.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in stages)
    assert all(s.end_time_unix_nano <= call.end_time_unix_nano for s in stages)
    assert abs(call.end_time_unix_nano / 1e9 - time.time()) < 300
    told = facts(call)
    assert (told["flightquant.scheme"], told["flightquant.rows"], told["flightquant.outcome"]) == ("int4", 3, "ok")
    assert call.status.code == 0


def test_a_call_without_a_trace_begins_one() -> None:
    spans = spans_of("")
    (call,) = (span for span in spans if span.name == "flightquant DoExchange")
    assert call.parent_span_id == b""
    assert call.trace_id.hex() != TRACE


def test_a_trace_that_is_not_recorded_stays_so() -> None:
    assert spans_of("00") == []


def test_a_refused_call_is_an_error_in_its_trace() -> None:
    (call,) = spans_of("01", ask_nonsense)
    assert call.status.code == 2
    assert "int9" in call.status.message
    assert facts(call)["flightquant.outcome"] == "invalid_request"


def test_a_collector_that_hangs_keeps_neither_calls_nor_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with running_server(dataclasses.replace(CONFIG, otlp_endpoint=endpoint)) as server:
            quantize(server.location, {})


def test_stages_are_noted_up_to_a_limit() -> None:
    call = Call("r", "DoExchange", stages=Stages())
    assert call.stages is not None
    for _ in range(MAX_STAGES + 7):
        call.stages.note("kernel", 0.0, 0.1)
    assert (len(call.stages.noted), call.stages.dropped) == (MAX_STAGES, 7)


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://"])
def test_an_endpoint_that_cannot_be_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        dataclasses.replace(CONFIG, otlp_endpoint=endpoint)
