"""What Prometheus is told. Every name, label and unit stands in docs/metrics.md.

All label sets exist from the start, so that ``rate()`` sees the first increment; raw layer names never become labels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import add
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
from flightquant.server.auth import ACTION_ROLES
from flightquant.server.calls import UNKNOWN, Call
from flightquant.server.collectors import Latency, Totals
from flightquant.server.crowd import threads
from flightquant.server.memory import memory_limit
from flightquant.spec import OPERATIONS

STAGES = ("receive", "validate", "queue", "kernel", "write")
COPY_SITES = ("transport", "service")
ACTIONS = tuple(ACTION_ROLES)
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
        # Of all that a batch adds to, and of the classes that are known.
        self._lock = threading.Lock()
        self._make_counters(registry)
        self._make_gauges(registry, admission, compute_threads)
        Info("flightquant_build", "Versions, instruction set in use, threads", registry=registry).info(dict(build))
        ProcessCollector(registry=registry)
        self._classes: set[str] = set()
        for scheme in (*SCHEMES, UNKNOWN):
            self._add_costs((OTHER, scheme), (0, 0, 0, 0))

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

        def totals(name: str, text: str, *labels: str) -> Totals:
            return Totals(f"flightquant_{name}", text, labels, registry, self._lock)

        self._rows = totals("rows", "Layers answered, by the status of their row", "status")
        self._rows.values.update({(status,): 0 for status in ROW_STATUSES})
        self._payload = totals("payload_bytes", "Bytes of weights received and of answers made", "direction")
        self._payload.values.update({("in",): 0, ("out",): 0})
        self._copied = totals("copied_bytes", "Bytes of payload copied, by where", "site")
        self._copied.values.update({(site,): 0 for site in COPY_SITES})
        self._stages = Latency(
            "flightquant_stage_seconds",
            "Time of one batch in each stage; receive includes the wait for the client",
            "stage",
            STAGES,
            _STAGE_BUCKETS,
            registry,
            self._lock,
        )
        self._durations = Latency(
            "flightquant_exchange_seconds",
            "Time of one exchange, from its headers to its end",
            "op",
            (UNKNOWN, *OPERATIONS),
            _CALL_BUCKETS,
            registry,
            self._lock,
        )
        self._layer_costs = tuple(
            totals(name, text, "layer_class", "scheme")
            for name, text in (
                ("layers", "Layers answered, by class and scheme"),
                ("layer_kernel_seconds", "Kernel time of layers, by class and scheme"),
                ("layer_input_bytes", "Bytes of the weights of layers, by class and scheme"),
                ("layer_weights", "Weights of layers, by class and scheme"),
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
        gauge("process_threads", "Threads of the process", threads)
        gauge("engine_batches", "Batches in the engine, computing or waiting for it", lambda: admission.computing)

    def observe_stages(self, stages: Mapping[str, float], trace_id: str | None) -> None:
        """Seconds that a batch spent in each stage before it failed; see :meth:`observe_answer`."""
        with self._lock:
            self._note_stages(stages, trace_id)

    def _note_stages(self, stages: Mapping[str, float], trace_id: str | None) -> None:
        for stage, seconds in stages.items():
            self._stages.note(stage, seconds, trace_id)

    def observe_answer(
        self,
        answer: Answer,
        message_bytes: int,
        value_bytes: int,
        stages: Mapping[str, float] | None = None,
        trace_id: str | None = None,
    ) -> None:
        """Bytes, row outcomes, layer cost and stages of one answered batch.

        Parameters
        ----------
        answer : Answer
            Of the engine.
        message_bytes : int
            Bytes of the received message, which gRPC's slices were joined into.
        value_bytes : int
            Bytes of one weight as sent.
        stages : mapping of str to float, optional
            Seconds that it spent in each stage.
        trace_id : str, optional
            The caller's trace, which becomes the exemplar of the stages' buckets.
        """
        totals = answer.totals
        statuses = {"ok": totals.rows - totals.failed_rows}
        if totals.failed_rows:
            counts = pc.value_counts(answer.costs.column("status")).to_pylist()
            statuses |= {count["values"]: count["counts"] for count in counts}
        costs = _costs(answer, value_bytes)
        with self._lock:
            self._note_stages(stages or {}, trace_id)
            self._payload.values["in",] += totals.bytes_in
            self._payload.values["out",] += totals.bytes_out
            self._copied.values["transport",] += message_bytes
            self._copied.values["service",] += totals.bytes_copied
            for status, count in statuses.items():
                self._rows.values[status,] += count
            for key, amounts in costs:
                self._add_costs(key, amounts)

    def _add_costs(self, key: tuple[str, str], amounts: Sequence[float]) -> None:
        """Layers, seconds, bytes and weights of a layer class and scheme; of :data:`OTHER` once there are too many."""
        if key[0] not in self._classes:
            if len(self._classes) > MAX_LAYER_CLASSES:
                key = OTHER, key[1]
            self._classes.add(key[0])
        for total, amount in zip(self._layer_costs, amounts, strict=True):
            total.values[key] = total.values.get(key, 0) + amount

    def observe_end(self, call: Call) -> None:
        """A call is over."""
        if call.outcome in REFUSALS and not call.admitted:
            self._refusals.labels(call.outcome).inc()
        if call.method == "DoExchange":
            self._exchanges.labels(call.op, call.scheme, call.outcome).inc()
            with self._lock:
                self._durations.note(call.op, call.seconds, call.trace_id)
        elif call.method == "DoAction":
            action = call.op if call.op in ACTIONS else OTHER
            self._actions.labels(action, call.outcome).inc()


def _costs(answer: Answer, value_bytes: int) -> list[tuple[tuple[str, str], tuple[float, ...]]]:
    """Of each layer class and scheme of an answer: layers, seconds, bytes, weights."""
    if answer.layers is not None:
        found: dict[tuple[str, str], tuple[float, ...]] = {}
        for name, scheme, nanoseconds, nbytes in answer.layers:
            layer = (1, nanoseconds / 1e9, nbytes, nbytes / value_bytes)
            key = _class_of(name), scheme
            found[key] = tuple(map(add, found[key], layer)) if key in found else layer
        return list(found.items())
    batch = answer.costs
    keys, which = layer_keys(batch.column("layer_name"), batch.column("scheme"))
    weighed = (None, batch.column("kernel_ns").to_numpy() / 1e9, batch.column("bytes_in").to_numpy())
    sums = [np.bincount(which, weights, len(keys)).tolist() for weights in weighed]
    return [
        (key, (layers, seconds, nbytes, nbytes / value_bytes))
        for key, layers, seconds, nbytes in zip(keys, *sums, strict=True)
    ]


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
