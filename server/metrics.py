"""What Prometheus is told. Every name, label and unit stands in docs/metrics.md.

All label sets exist from the start, so that ``rate()`` sees the first increment; raw layer names never become labels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, ProcessCollector

from flightquant.cython_core._memory import bytes_kept
from flightquant.cython_core.engine import Answer
from flightquant.errors import ERRORS, ROW_STATUSES
from flightquant.layers import NUMBERS, layer_class
from flightquant.schemes import SCHEMES
from flightquant.server.admission import Admission
from flightquant.server.calls import UNKNOWN, Call
from flightquant.server.latency import Latency
from flightquant.server.memory import memory_limit
from flightquant.spec import OPERATIONS

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

_STAGE_BUCKETS = (5e-5, 2e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0, 120.0)
_CALL_BUCKETS = (
    *(2e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)


_Costs = tuple[Counter, ...]
"""Of one layer class and scheme: layers, seconds, bytes, weights."""


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
    compute_threads : int
        Threads that compute.
    """

    def __init__(
        self, registry: CollectorRegistry, admission: Admission, build: Mapping[str, str], compute_threads: int
    ) -> None:
        self.registry = registry
        self._make_counters(registry)
        self._make_gauges(registry, admission, compute_threads)
        Info("flightquant_build", "Versions, instruction set in use, threads", registry=registry).info(dict(build))
        ProcessCollector(registry=registry)
        self._classes: dict[str, dict[str, _Costs]] = {}
        self._classes_lock = threading.Lock()
        for scheme in (*SCHEMES, UNKNOWN):
            self._costs(OTHER, scheme)

    def _make_counters(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flightquant_{name}", text, labels, registry=registry)

        self._exchanges = counter("exchanges_total", "Exchanges that ended", "op", "scheme", "outcome")
        # What comes back quantized names a scheme row by row, not in the command.
        for op in (UNKNOWN, *OPERATIONS):
            for scheme in SCHEMES if op == "quantize" else (UNKNOWN,):
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
        self._stages = Latency(
            "flightquant_stage_seconds",
            "Time of one batch in each stage; receive includes the wait for the client",
            "stage",
            STAGES,
            _STAGE_BUCKETS,
            registry,
        )
        self._durations = Latency(
            "flightquant_exchange_seconds",
            "Time of one exchange, from its headers to its end",
            "op",
            (UNKNOWN, *OPERATIONS),
            _CALL_BUCKETS,
            registry,
        )
        self._layer_costs = tuple(
            counter(name, text, "layer_class", "scheme")
            for name, text in (
                ("layers_total", "Layers answered, by class and scheme"),
                ("layer_kernel_seconds_total", "Kernel time of layers, by class and scheme"),
                ("layer_input_bytes_total", "Bytes of the weights of layers, by class and scheme"),
                ("layer_weights_total", "Weights of layers, by class and scheme"),
            )
        )

    def _make_gauges(self, registry: CollectorRegistry, admission: Admission, compute_threads: int) -> None:
        def gauge(name: str, text: str, read: Any) -> None:
            Gauge(f"flightquant_{name}", text, registry=registry).set_function(read)

        gauge("calls_in_flight", "Calls running now", lambda: admission.calls)
        gauge("calls_in_flight_peak", "Most calls running at once since the start", lambda: admission.peak_calls)
        gauge("calls_limit", "Calls that may run at once", lambda: admission.max_calls)
        gauge("batch_bytes_in_flight", "Bytes of batches held now", lambda: admission.bytes_held)
        gauge("batch_bytes_limit", "Bytes of batches over which calls wait or are refused", lambda: admission.max_bytes)
        gauge("calls_queued", "Calls that wait to be let in", lambda: admission.queued)
        gauge("calls_silent", "Idle calls that gave their place away", lambda: admission.silent)
        gauge("calls_waiting", "Calls that wait for bytes before they read on", lambda: admission.waiting)
        gauge("arrow_pool_bytes", "Bytes held by Arrow's memory pool", pa.total_allocated_bytes)
        gauge("output_store_bytes", "Bytes kept for later answers", bytes_kept)
        gauge("memory_limit_bytes", "Memory that the process may use", memory_limit)
        gauge("compute_threads", "Threads that compute", lambda: compute_threads)
        gauge("process_threads", "Threads of the process", lambda: len(os.listdir("/proc/self/task")))
        self.batches_in_engine = Gauge(
            "flightquant_engine_batches", "Batches in the engine, computing or waiting for it", registry=registry
        )

    def observe_stage(self, stage: str, seconds: float, trace_id: str | None = None) -> None:
        """Time that one batch spent in one stage; the caller's trace becomes the bucket's exemplar."""
        self._stages.observe(stage, seconds, trace_id)

    def observe_answer(self, answer: Answer, message_bytes: int, value_bytes: int) -> None:
        """Bytes, row outcomes and layer cost of one answered batch.

        Parameters
        ----------
        answer : Answer
            Of the engine.
        message_bytes : int
            Bytes of the received message, which gRPC's slices were joined into.
        value_bytes : int
            Bytes of one weight as sent.
        """
        batch, totals = answer.costs, answer.totals
        self._bytes_in.inc(totals.bytes_in)
        self._bytes_out.inc(totals.bytes_out)
        self._copied["transport"].inc(message_bytes)
        self._copied["service"].inc(totals.bytes_copied)
        self._rows["ok"].inc(totals.rows - totals.failed_rows)
        if totals.failed_rows:
            for count in pc.value_counts(batch.column("status")):
                if count["values"].as_py() != "ok":
                    self._rows[count["values"].as_py()].inc(count["counts"].as_py())
        names, schemes = batch.column("layer_name"), batch.column("scheme")
        if totals.rows == 1:  # most batches hold one layer, and NumPy costs 40 us for it
            key = _class_of(names[0].as_py()), schemes[0].as_py()
            self._add_costs(key, 1, totals.kernel_ns / 1e9, totals.bytes_in, value_bytes)
            return
        keys, which = layer_keys(names, schemes)
        weighed = (None, batch.column("kernel_ns").to_numpy() / 1e9, batch.column("bytes_in").to_numpy())
        sums = [np.bincount(which, weights, len(keys)).tolist() for weights in weighed]
        for key, layers, seconds, nbytes in zip(keys, *sums, strict=True):
            self._add_costs(key, layers, seconds, nbytes, value_bytes)

    def _add_costs(self, key: tuple[str, str], layers: int, seconds: float, nbytes: float, value_bytes: int) -> None:
        for counter, amount in zip(self._costs(*key), (layers, seconds, nbytes, nbytes / value_bytes), strict=True):
            counter.inc(amount)

    def _costs(self, layer_class: str, scheme: str) -> _Costs:
        """The counters of a layer class and scheme; those of :data:`OTHER` once there are too many classes."""
        found = self._classes.get(layer_class, {}).get(scheme)
        if found is not None:
            return found
        with self._classes_lock:
            if layer_class not in self._classes and len(self._classes) > MAX_LAYER_CLASSES:
                return self._classes[OTHER][scheme]
            counters = tuple(counter.labels(layer_class, scheme) for counter in self._layer_costs)
            return self._classes.setdefault(layer_class, {}).setdefault(scheme, counters)

    def observe_end(self, call: Call) -> None:
        """A call is over."""
        if call.outcome in REFUSALS and not call.admitted:
            self._refusals.labels(call.outcome).inc()
        if call.method == "DoExchange":
            self._exchanges.labels(call.op, call.scheme, call.outcome).inc()
            self._durations.observe(call.op, call.seconds, call.trace_id)
        elif call.method == "DoAction":
            action = call.op if call.op in ACTIONS else OTHER
            self._actions.labels(action, call.outcome).inc()


@lru_cache(maxsize=4096)
def _class_of(name: str) -> str:
    return layer_class(name)[:MAX_CLASS_LENGTH]


def layer_keys(names: pa.Array, schemes: pa.Array) -> tuple[list[tuple[str, str]], npt.NDArray[np.int64]]:
    """Layer names with every number replaced by ``*`` (``model.layers.*.mlp.up_proj.weight``), each with its scheme.

    Parameters
    ----------
    names, schemes : utf8 arrays
        Without nulls.

    Returns
    -------
    keys : list of (str, str)
        The distinct ones, each class at most :data:`MAX_CLASS_LENGTH` characters long.
    which : int64 array
        For every name the index of its key.
    """
    if len(names) <= FEW_NAMES:
        pairs = zip(names.to_pylist(), schemes.to_pylist(), strict=True)
        keys = [(_class_of(name), scheme) for name, scheme in pairs]
        distinct = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return list(distinct), np.array([distinct[key] for key in keys], np.int64)
    starred = pc.utf8_slice_codeunits(pc.replace_substring_regex(names, NUMBERS.pattern, "*"), 0, MAX_CLASS_LENGTH)
    first, second = starred.dictionary_encode(), schemes.dictionary_encode()
    codes = first.indices.to_numpy().astype(np.int64) * len(second.dictionary) + second.indices.to_numpy()
    found, which = np.unique(codes, return_inverse=True)
    classes, used = first.dictionary.to_pylist(), second.dictionary.to_pylist()
    return [(classes[code // len(used)], used[code % len(used)]) for code in found.tolist()], which
