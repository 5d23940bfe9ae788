"""OpenTelemetry spans, sent over OTLP/HTTP: one for a call, and below it one for each stage of its batches.

A call that comes with a ``traceparent`` joins the caller's trace, and is left out where the caller's trace is not
recorded. Spans are made when the call is over, so that a batch pays for one entry in a list and no more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flightquant.server.calls import TRACE_HEADER, Call, Stages

SEND_TIMEOUT_S = 5.0
CLOSE_S = 2.0
"""What has not been sent so long after the last call is dropped: a collector that hangs must not keep the server."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Sends spans to one collector.

    Attributes
    ----------
    provider : TracerProvider
        Holds the queue of spans and the thread that sends them. Spans that a collector does not take in time are
        dropped, and the log says so.
    """

    provider: TracerProvider

    @classmethod
    def to(cls, endpoint: str, version: str) -> Tracing:
        """Send to ``endpoint``, such as ``http://collector:4318/v1/traces``."""
        resource = Resource.create({"service.name": "flightquant", "service.version": version})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)))
        return cls(provider)

    def begin(self, call: Call) -> None:
        """Let the call's stages be noted, unless its caller does not record the trace."""
        if call.traceparent is None or int(call.traceparent[-2:], 16) & 1:
            call.stages = Stages()

    def end(self, call: Call) -> None:
        """Queue the spans of a call that is over."""
        if call.stages is None:
            return
        carrier = {} if call.traceparent is None else {TRACE_HEADER: call.traceparent}
        tracer = self.provider.get_tracer("flightquant")
        started = call.stages.started_ns
        span = tracer.start_span(
            f"flightquant {call.method}",
            TraceContextTextMapPropagator().extract(carrier),
            SpanKind.SERVER,
            _attributes(call),
            start_time=started,
        )
        inside = set_span_in_context(span)
        for name, begin, seconds in call.stages.noted:
            stage = tracer.start_span(name, inside, start_time=started + round(begin * 1e9))
            stage.end(started + round((begin + seconds) * 1e9))
        if call.outcome != "ok":
            span.set_status(Status(StatusCode.ERROR, call.error or call.outcome))
        span.end(started + round(call.seconds * 1e9))

    def close(self) -> None:
        """Send what is queued, for a moment."""
        closing = threading.Thread(target=self.provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _attributes(call: Call) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "rpc.system": "grpc",
        "rpc.service": "arrow.flight.protocol.FlightService",
        "rpc.method": call.method,
        "flightquant.request_id": call.request_id,
        "flightquant.op": call.op,
        "flightquant.scheme": call.scheme,
        "flightquant.outcome": call.outcome,
    }
    if call.totals is not None:
        for name in ("rows", "failed_rows", "batches", "bytes_in", "bytes_out", "kernel_ns"):
            facts[f"flightquant.{name}"] = getattr(call.totals, name)
    if call.stages is not None and call.stages.dropped:
        facts["flightquant.stages_dropped"] = call.stages.dropped
    return facts
