"""What Prometheus is told. Every name, label and unit stands in docs/metrics.md.

All label sets exist from the start, so that ``rate()`` sees the first increment; raw layer names never become labels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from flightquant.errors import ERRORS, ROW_STATUSES
from flightquant.layers import NUMBERS, layer_class
from flightquant.server.admission import Admission
from flightquant.server.calls import UNKNOWN, Call
from flightquant.spec import OPERATIONS, SCHEMES

STAGES = ("receive", "validate", "queue", "kernel", "write")
COPY_SITES = ("transport", "service")
ACTIONS = ("schemes", "estimate", "version")
OUTCOMES = ("ok", "cancelled", *ERRORS)
REFUSALS = ("unauthenticated", "permission_denied", "overloaded", "draining")
OTHER = "other"

MAX_LAYER_CLASSES = 200
MAX_CLASS_LENGTH = 120
FEW_NAMES = 16
"""Up to so many names Python is faster than the call of a vectorised function (45 us); most batches hold one layer."""

_STAGE_BUCKETS = (1e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0, 2.5, 10.0)
_CALL_BUCKETS = (1e-3, 1e-2, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Parameters
    ----------
    registry : CollectorRegistry
        Where the metrics are registered: a fresh one for each server.
    admission : Admission
        Read for what is in flight.
    build : mapping of str to str
        Labels of ``flightquant_build_info``.
    """

    def __init__(self, registry: CollectorRegistry, admission: Admission, build: Mapping[str, str]) -> None:
        self.registry = registry
        self._make_counters(registry)
        self._make_gauges(registry, admission)
        Info("flightquant_build", "Versions, instruction set in use, threads", registry=registry).info(dict(build))
        ProcessCollector(registry=registry)
        self._classes: dict[str, tuple[Counter, Counter, Counter]] = {}
        self._classes_lock = threading.Lock()
        self._class_counters(OTHER)

    def _make_counters(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flightquant_{name}", text, labels, registry=registry)

        self._exchanges = counter("exchanges_total", "Exchanges that ended", "op", "scheme", "outcome")
        for op, schemes in ((UNKNOWN, (UNKNOWN,)), *((op, SCHEMES) for op in OPERATIONS)):
            for scheme in schemes:
                for outcome in OUTCOMES:
                    self._exchanges.labels(op, scheme, outcome)
        self._actions = counter("actions_total", "Actions that ended", "action", "outcome")
        for action in (*ACTIONS, OTHER):
            for outcome in OUTCOMES:
                self._actions.labels(action, outcome)
        self._refusals = counter("refusals_total", "Calls refused before their body was read", "code")
        for code in REFUSALS:
            self._refusals.labels(code)
        rows = counter("rows_total", "Layers answered, by the status of their row", "status")
        self._rows = {status: rows.labels(status) for status in ROW_STATUSES}
        payload = counter("payload_bytes_total", "Bytes of weights received and of answers made", "direction")
        self._bytes_in, self._bytes_out = payload.labels("in"), payload.labels("out")
        copied = counter("copied_bytes_total", "Bytes of payload copied, by where", "site")
        self._copied = {site: copied.labels(site) for site in COPY_SITES}
        stages = Histogram(
            "flightquant_stage_seconds",
            "Time of one batch in each stage; receive includes the wait for the client",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        durations = Histogram(
            "flightquant_exchange_seconds",
            "Time of one exchange, from its headers to its end",
            ("op",),
            buckets=_CALL_BUCKETS,
            registry=registry,
        )
        self._durations = {op: durations.labels(op) for op in (UNKNOWN, *OPERATIONS)}
        self._class_layers = counter("layers_total", "Layers answered, by class", "layer_class")
        self._class_seconds = counter("layer_kernel_seconds_total", "Kernel time of layers, by class", "layer_class")
        self._class_bytes = counter("layer_input_bytes_total", "Weights of layers, by class", "layer_class")

    def _make_gauges(self, registry: CollectorRegistry, admission: Admission) -> None:
        def gauge(name: str, text: str, read: Any) -> None:
            Gauge(f"flightquant_{name}", text, registry=registry).set_function(read)

        gauge("calls_in_flight", "Calls running now", lambda: admission.calls)
        gauge("calls_in_flight_peak", "Most calls running at once since the start", lambda: admission.peak_calls)
        gauge("calls_limit", "Calls that may run at once", lambda: admission.max_calls)
        gauge("batch_bytes_in_flight", "Bytes of batches held now", lambda: admission.bytes_held)
        gauge("batch_bytes_limit", "Bytes of batches over which calls wait or are refused", lambda: admission.max_bytes)
        gauge("arrow_pool_bytes", "Bytes held by Arrow's memory pool", pa.total_allocated_bytes)
        self.batches_in_engine = Gauge(
            "flightquant_engine_batches", "Batches in the engine, computing or waiting for it", registry=registry
        )

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Time that one batch spent in one stage."""
        self._stages[stage].observe(seconds)

    def observe_answer(self, answer: pa.RecordBatch, message_bytes: int) -> None:
        """Bytes, row outcomes and layer cost of one answered batch.

        Parameters
        ----------
        answer : RecordBatch
            With the contract's answer columns.
        message_bytes : int
            Bytes of the received message, which gRPC's slices were joined into.
        """
        rows = answer.num_rows
        size_in, size_out, nanoseconds, copied = (
            answer.column(name).to_numpy() for name in ("bytes_in", "bytes_out", "kernel_ns", "bytes_copied")
        )
        self._bytes_in.inc(int(size_in.sum()))
        self._bytes_out.inc(int(size_out.sum()))
        self._copied["transport"].inc(message_bytes)
        self._copied["service"].inc(int(copied.sum()))
        if answer.column("error").null_count == rows:
            self._rows["ok"].inc(rows)
        else:
            for count in pc.value_counts(answer.column("status")):
                self._rows[count["values"].as_py()].inc(count["counts"].as_py())
        classes, which = layer_classes(answer.column("layer_name"))
        totals = (np.bincount(which, weights, len(classes)).tolist() for weights in (None, nanoseconds / 1e9, size_in))
        for name, *amounts in zip(classes, *totals, strict=True):
            for counter, amount in zip(self._class_counters(name), amounts, strict=True):
                counter.inc(amount)

    def _class_counters(self, layer_class: str) -> tuple[Counter, Counter, Counter]:
        found = self._classes.get(layer_class)
        if found is not None:
            return found
        with self._classes_lock:
            if len(self._classes) > MAX_LAYER_CLASSES:
                return self._classes[OTHER]
            counters = (
                self._class_layers.labels(layer_class),
                self._class_seconds.labels(layer_class),
                self._class_bytes.labels(layer_class),
            )
            return self._classes.setdefault(layer_class, counters)

    def observe_end(self, call: Call) -> None:
        """A call is over."""
        if call.outcome in REFUSALS and not call.admitted:
            self._refusals.labels(call.outcome).inc()
        if call.method == "DoExchange":
            self._exchanges.labels(call.op, call.scheme, call.outcome).inc()
            self._durations[call.op].observe(call.seconds)
        elif call.method == "DoAction":
            action = call.op if call.op in ACTIONS else OTHER
            self._actions.labels(action, call.outcome).inc()


def layer_classes(names: pa.Array) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Layer names with every number replaced by ``*``: ``model.layers.*.mlp.up_proj.weight``.

    Parameters
    ----------
    names : utf8 array
        Without nulls.

    Returns
    -------
    classes : list of str
        The distinct ones, each at most :data:`MAX_CLASS_LENGTH` characters long.
    which : int64 array
        For every name the index of its class.
    """
    if len(names) <= FEW_NAMES:
        starred = [layer_class(name.as_py()) for name in names]
        distinct = {name: index for index, name in enumerate(dict.fromkeys(starred))}
        which = np.array([distinct[name] for name in starred], np.int64)
    else:
        encoded = pc.replace_substring_regex(names, NUMBERS.pattern, "*").dictionary_encode()
        distinct, which = encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
    return [name[:MAX_CLASS_LENGTH] for name in distinct], which
