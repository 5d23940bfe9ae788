"""The metrics page: every name is documented, every label set exists from the start, the numbers are right."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fq_flight import eventually, exchange, fails, sample
from fq_testing import request
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from pyarrow import flight

import flightquant
from flightquant.cython_core import active_isa
from flightquant.errors import ERRORS
from flightquant.server.admission import Admission
from flightquant.server.app import Server, running_server
from flightquant.server.metrics import FEW_NAMES, MAX_CLASS_LENGTH, MAX_LAYER_CLASSES, OTHER, Metrics, layer_classes
from flightquant.spec import SCHEMES
from flightquant.wire import ANSWER_FIELDS

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
        assert sample(server, "layers_total", layer_class="model.layers.*.mlp.up_proj.weight") == 6
        assert sample(server, "layers_total", layer_class="lm_head.weight") == 2
        assert sample(server, "layer_input_bytes_total", layer_class="model.layers.*.mlp.up_proj.weight") == 6 * 256
        seconds = sum(
            sample(server, "layer_kernel_seconds_total", layer_class=name)
            for name in ("model.layers.*.mlp.up_proj.weight", "lm_head.weight")
        )
        assert seconds == pytest.approx(reply.end["kernel_ns"] / 1e9)
        eventually(lambda: sample(server, "calls_in_flight") == 0)
        assert sample(server, "calls_in_flight_peak") == 1
        assert sample(server, "calls_limit") == server.config.max_calls
        assert sample(server, "batch_bytes_in_flight") == 0
        assert sample(server, "engine_batches") == 0
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
    classes, which = layer_classes(pa.array([*["a"] * others, name, "a1"], pa.utf8()))
    assert [classes[i] for i in which] == [*["a"] * others, layer_class, "a*"]
    assert sorted(classes) == sorted({"a", layer_class, "a*"})


def test_the_number_of_classes_is_bounded() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, Admission(1, 1), {})
    words = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(2 * MAX_LAYER_CLASSES)]
    columns = {"layer_name": words, "status": ["ok"] * len(words)}
    columns |= {name: [4] * len(words) for name in ("bytes_in", "bytes_out", "bytes_copied", "kernel_ns")}
    nulls = {field.name: pa.nulls(len(words), field.type) for field in ANSWER_FIELDS}
    arrays = {**nulls, **{name: pa.array(values) for name, values in columns.items()}}
    batch = pa.RecordBatch.from_arrays([arrays[field.name].cast(field.type) for field in ANSWER_FIELDS], [*nulls])
    metrics.observe_answer(batch, 0)
    (family,) = [family for family in registry.collect() if family.name == "flightquant_layers"]
    classes = {item.labels["layer_class"]: item.value for item in family.samples if item.name.endswith("_total")}
    assert len(classes) == MAX_LAYER_CLASSES + 1
    assert classes[OTHER] == len(words) - MAX_LAYER_CLASSES
    assert sum(classes.values()) == len(words)


def test_every_metric_is_documented_and_every_documented_metric_exists(server: Server) -> None:
    names = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for name in page(server)
        if name.startswith("flightquant_") and not name.endswith("_created")
    }
    documented = set(re.findall(r"^\| `(flightquant_\w+)`", DOCS.read_text(), re.MULTILINE))
    assert documented == names
