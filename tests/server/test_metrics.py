"""The metrics page: every name is documented, every label set exists from the start, the numbers are right."""

from __future__ import annotations

import re
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from fq_flight import eventually, exchange, fails, sample
from fq_testing import request
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from pyarrow import flight

import flightquant
from flightquant.cython_core import active_isa
from flightquant.cython_core.engine import Engine
from flightquant.errors import ERRORS
from flightquant.schemes import SCHEMES
from flightquant.server.actions import DESCRIPTIONS
from flightquant.server.admission import Admission
from flightquant.server.app import Server, running_server
from flightquant.server.collectors import Latency, Totals
from flightquant.server.metrics import FEW_NAMES, MAX_CLASS_LENGTH, MAX_LAYER_CLASSES, OTHER, Metrics, layer_keys
from flightquant.spec import Command

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
COMMAND = {"scheme": "int4", "group_size": 32}


def page(server: Server) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample of the page: name to labels to value."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for item in family.samples:
            found.setdefault(item.name, {})[tuple(sorted(item.labels.items()))] = item.value
    return found


def test_every_label_set_exists_from_the_start() -> None:
    with running_server() as server:
        samples = page(server)
    outcomes = {"ok", "cancelled", *ERRORS}
    for scheme in SCHEMES:
        for outcome in outcomes:
            assert (
                samples["flightquant_exchanges_total"][(("op", "quantize"), ("outcome", outcome), ("scheme", scheme))]
                == 0
            )
    actions = {dict(labels)["action"] for labels in samples["flightquant_actions_total"]}
    assert actions == {*DESCRIPTIONS, "other"}
    stages = {dict(labels)["stage"] for labels in samples["flightquant_stage_seconds_count"]}
    assert stages == {"receive", "validate", "queue", "kernel", "write"}
    assert {dict(labels)["direction"] for labels in samples["flightquant_payload_bytes_total"]} == {"in", "out"}
    assert {dict(labels)["site"] for labels in samples["flightquant_copied_bytes_total"]} == {"transport", "service"}
    (build,) = map(dict, samples["flightquant_build_info"])
    assert (build["flightquant"], build["isa"]) == (flightquant.__version__, active_isa())
    assert samples["process_resident_memory_bytes"][()] > 10 << 20
    assert samples["flightquant_arrow_pool_bytes"][()] >= 0


def test_the_numbers_are_those_of_the_answers() -> None:
    sent = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((2, 32), np.float32) for i in range(3)}
    sent["lm_head.weight"] = np.full((1, 32), np.nan, np.float32)
    with running_server() as server, flight.connect(server.location) as client:
        reply = exchange(client, COMMAND, [request(sent)] * 2)
        fails(client, {}, schema=request(sent).schema)
        eventually(lambda: sample(server, "exchanges_total", op="none", scheme="none", outcome="invalid_request") == 1)
        assert reply.end is not None
        assert sample(server, "exchanges_total", op="quantize", scheme="int4", outcome="ok") == 1
        assert sample(server, "exchange_seconds_count", op="quantize") == 1
        assert sample(server, "payload_bytes_total", direction="in") == reply.end["bytes_in"]
        assert sample(server, "payload_bytes_total", direction="out") == reply.end["bytes_out"]
        assert sample(server, "copied_bytes_total", site="service") == 0
        assert sample(server, "copied_bytes_total", site="transport") >= reply.end["bytes_in"]
        assert sample(server, "rows_total", status="ok") == 6
        assert sample(server, "rows_total", status="non_finite") == 2
        for stage in ("receive", "validate", "queue", "kernel", "write"):
            assert sample(server, "stage_seconds_count", stage=stage) == 2
        assert sample(server, "layers_total", layer_class="model.layers.*.mlp.up_proj.weight", scheme="int4") == 6
        assert sample(server, "layers_total", layer_class="lm_head.weight", scheme="int4") == 2
        assert (
            sample(server, "layer_input_bytes_total", layer_class="model.layers.*.mlp.up_proj.weight", scheme="int4")
            == 6 * 256
        )
        assert sample(server, "layer_weights_total", layer_class="lm_head.weight", scheme="int4") == 2 * 32
        seconds = sum(
            sample(server, "layer_kernel_seconds_total", layer_class=name, scheme="int4")
            for name in ("model.layers.*.mlp.up_proj.weight", "lm_head.weight")
        )
        assert seconds == pytest.approx(reply.end["kernel_ns"] / 1e9)
        eventually(lambda: sample(server, "calls_in_flight") == 0)
        assert sample(server, "calls_in_flight_peak") == 1
        assert sample(server, "calls_limit") == server.config.max_calls
        assert sample(server, "batch_bytes_in_flight") == 0
        assert sample(server, "engine_batches") == 0
        assert sample(server, "calls_waiting") == 0
        assert sample(server, "compute_threads") == server.engine.n_threads
        assert sample(server, "process_threads") >= threading.active_count()
        assert sample(server, "memory_limit_bytes") > psutil.Process().memory_info().rss
        list(client.do_action("version"))
        eventually(lambda: sample(server, "actions_total", action="version", outcome="ok") == 1)


@pytest.mark.parametrize(
    ("name", "layer_class"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        ("h7.w1", "h*.w*"),
        ("2024", "*"),
        ("", ""),
        ("\u0661\u00e9", "\u0661\u00e9"),
        ("x" * 500, "x" * MAX_CLASS_LENGTH),
    ],
)
@pytest.mark.parametrize("others", [1, FEW_NAMES + 1], ids=["few", "many"])
def test_layer_classes(name: str, layer_class: str, others: int) -> None:
    names = pa.array([*["a"] * others, name, "a1", name], pa.utf8())
    keys, which = layer_keys(names, pa.array([*["int8"] * (others + 2), "int4"]))
    expected = [*[("a", "int8")] * others, (layer_class, "int8"), ("a*", "int8"), (layer_class, "int4")]
    assert [keys[i] for i in which] == expected
    assert sorted(keys) == sorted(set(expected))


def test_the_number_of_classes_is_bounded() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, Admission(1, 1), {}, 1)
    words = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(2 * MAX_LAYER_CLASSES)]
    batch = request({word: np.ones((1, 32), np.float32) for word in words})
    engine = Engine(1)
    answer = engine.session(batch.schema, Command.build(scheme="int4", group_size=32)).quantize(batch)
    engine.close()
    metrics.observe_answer(answer, 0, 4)
    (family,) = [family for family in registry.collect() if family.name == "flightquant_layers"]
    classes = {
        item.labels["layer_class"]: item.value
        for item in family.samples
        if item.name.endswith("_total") and item.labels["scheme"] == "int4"
    }
    assert len(classes) == MAX_LAYER_CLASSES + 1
    assert classes[OTHER] == len(words) - MAX_LAYER_CLASSES
    assert sum(classes.values()) == len(words)


@pytest.mark.parametrize("rows", [1, 5])
def test_layers_of_a_usual_batch_cost_what_its_answer_says(rows: int) -> None:
    names = ["model.layers.0.w", "model.layers.1.w", "h\u00e9ad", "model.layers.2.w", "x" * 500][-rows:]
    batch = request({name: np.ones((i + 1, 32), np.float32) for i, name in enumerate(names)})
    engine = Engine(1)
    answer = engine.session(batch.schema, Command.build(scheme="int4", group_size=32)).quantize(batch)
    engine.close()
    assert answer.layers is not None
    found = []
    for given in (answer, replace(answer, layers=None)):
        registry = CollectorRegistry()
        Metrics(registry, Admission(1, 1), {}, 1).observe_answer(given, 7, 4)
        found.append({key: value for key, value in samples(registry).items() if "process" not in key[0]})
    assert found[0] == pytest.approx(found[1])
    assert sum(value for (name, _), value in found[0].items() if name == "flightquant_layers_total") == rows


def test_openmetrics_has_the_traces_of_calls_as_exemplars() -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    with running_server() as server:
        with flight.connect(server.location) as client:
            exchange(client, COMMAND, [request({"a": np.ones((1, 32), np.float32)})], headers=headers)

        def traced() -> set[str]:
            asked = urllib.request.Request(server.metrics_url, headers={"Accept": "application/openmetrics-text"})
            with urllib.request.urlopen(asked, timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
                families = list(openmetrics.text_string_to_metric_families(answer.read().decode()))
            items = [item for family in families for item in family.samples if item.exemplar is not None]
            assert {item.exemplar.labels["trace_id"] for item in items if item.exemplar is not None} <= {trace}
            return {item.labels.get("stage", "call") for item in items}

        eventually(lambda: traced() == {"receive", "validate", "queue", "kernel", "write", "call"})


def samples(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a registry, without the times at which the library made its counters."""
    return {
        (item.name, frozenset(item.labels.items())): item.value
        for family in registry.collect()
        for item in family.samples
        if not item.name.endswith("_created")
    }


def test_latency_counts_as_the_librarys_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    buckets = (0.001, 0.25, 1.0)
    mine = Latency("x_seconds", "Time", "stage", ("a", "b"), buckets, ours, threading.Lock())
    library = Histogram("x_seconds", "Time", ("stage",), buckets=buckets, registry=theirs)
    for stage in ("a", "b"):
        library.labels(stage)
    for seconds in (0.0005, 0.001, 0.2, 0.25, 0.3, 5.0):
        mine.note("a", seconds)
        library.labels("a").observe(seconds)
    assert samples(ours) == samples(theirs)


def test_totals_add_up_as_the_librarys_counter() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Totals("x_bytes", "Bytes", ("scheme", "to"), ours, threading.Lock())
    library = Counter("x_bytes_total", "Bytes", ("scheme", "to"), registry=theirs)
    for labels, amount in ((("int4", "a"), 0.0), (("int4", "b"), 2.5), (("int8", "a"), 1e12)):
        mine.values[labels] = amount
        library.labels(*labels).inc(amount)
    assert samples(ours) == samples(theirs)


def test_every_metric_is_documented_and_every_documented_metric_exists(server: Server) -> None:
    names = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for name in page(server)
        if name.startswith("flightquant_") and not name.endswith("_created")
    }
    documented = set(re.findall(r"^\| `(flightquant_\w+)`", DOCS.read_text(), re.MULTILINE))
    assert documented == names
