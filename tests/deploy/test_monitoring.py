"""Dashboard, rules, runbook: generated, parsed, tested by promtool, and run against a real Prometheus with data."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from fq_flight import exchange
from fq_process import server_process
from fq_testing import request
from pyarrow import flight

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yaml"
DOCUMENTED = set(re.findall(r"`((?:flightquant|process)_\w+)`", (ROOT / "docs/metrics.md").read_text()))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def queries() -> list[str]:
    return [rule["expr"] for rule in rules()]


def scaling_queries() -> list[str]:
    """What KEDA and the Prometheus adapter ask for, without the labels that only a cluster gives."""
    keda = yaml.safe_load((ROOT / "deploy/components/keda/scaledobject.yaml").read_text())
    asked = [trigger["metadata"]["query"] for trigger in keda["spec"]["triggers"] if trigger["type"] == "prometheus"]
    adapter = yaml.safe_load((ROOT / "deploy/components/autoscaling/adapter-rules.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        name = re.match(r"\w+", rule["seriesQuery"])
        assert name is not None
        asked.append(rule["metricsQuery"].replace("<<.Series>>", name[0]).replace("<<.LabelMatchers>>", ""))
    return [re.sub(r'{namespace="[^"]*"}', "", query) for query in asked]


def test_the_dashboard_is_what_the_generator_makes(generator: ModuleType) -> None:
    assert (ROOT / "deploy/grafana/flightquant.json").read_text() == generator.build()


def test_every_expression_parses_and_asks_for_metrics_that_exist(generator: ModuleType) -> None:
    promql = pytest.importorskip("promql_parser")
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for query in [*generator.expressions(), *queries(), *scaling_queries()]:
        promql.parse(query)
        names = re.findall(r"\b((?:flightquant|process)_\w+)", re.sub(r'"[^"]*"', "", query))
        for name in names:
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            known = base in DOCUMENTED or any(base in record for record in recorded)
            assert known, f"{name} of {query}"


def test_every_alert_has_a_runbook_entry_and_tests_of_both_sides() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    tests = yaml.safe_load((ROOT / "deploy/prometheus/rules.test.yaml").read_text())["tests"]
    checked = [check for test in tests for check in test["alert_rule_test"]]
    for alert in alerts():
        name = alert["alert"]
        assert f"\n## {name}\n" in runbook
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        mine = [check for check in checked if check["alertname"] == name]
        assert any("exp_alerts" in check for check in mine), name
        assert any("exp_alerts" not in check for check in mine), name
    assert set(re.findall(r"^## (\w+)$", runbook, re.MULTILINE)) == {alert["alert"] for alert in alerts()}


def test_promtool_passes_the_rules(promtool: str) -> None:
    subprocess.run([promtool, "check", "rules", RULES], check=True, capture_output=True)
    done = subprocess.run(
        [promtool, "test", "rules", "rules.test.yaml"], check=False, capture_output=True, text=True, cwd=RULES.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(
        [promtool, "check", "config", ROOT / "deploy/prometheus/prometheus.yaml"], check=True, capture_output=True
    )


def test_promtool_finds_nothing_wrong_with_the_page(promtool: str) -> None:
    with server_process() as server:
        page = urllib.request.urlopen(server.ready["metrics"], timeout=10).read()
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def ask(address: str, query: str) -> list[Any]:
    """Prometheus' answer to one instant query."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[Any] = json.load(answer)["data"]["result"]
        return found


@contextmanager
def scraping(prometheus: str, target: str, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes ``target`` and evaluates our rules once a second: its address."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "flightquant", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "config.file": folder / "prometheus.yaml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}",
        "enable-feature": "exemplar-storage",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([prometheus, *(f"--{key}={value}" for key, value in options.items())], stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def test_every_expression_has_data_in_a_real_prometheus(generator: ModuleType, prometheus: str, tmp_path: Path) -> None:
    """Exchanges run while Prometheus scrapes; then no panel and no recording rule may be empty."""
    batch = request({f"layers.{i}.weight": np.ones((8, 64), np.float32) for i in range(4)})
    command = {"scheme": "int4", "group_size": 32}
    wanted = [*generator.expressions(), *scaling_queries(), *(rule["record"] for rule in rules() if "record" in rule)]
    header = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    with server_process() as server, flight.connect(server.location) as client:
        target = urllib.parse.urlsplit(server.ready["metrics"]).netloc
        with scraping(prometheus, target, tmp_path) as address:
            until = time.monotonic() + 120
            empty = wanted
            while empty and time.monotonic() < until:
                for _ in range(20):
                    exchange(client, command, [batch], headers=header)
                list(client.do_action("version"))
                time.sleep(0.5)
                try:
                    empty = [query for query in wanted if not ask(address, query)]
                except urllib.error.URLError:  # it is starting
                    continue
            assert not empty
            firing = ask(address, 'ALERTS{alertstate="firing"}')
            assert not firing
            exemplars = f"{address}/api/v1/query_exemplars?query=flightquant_stage_seconds_bucket&start=0&end=9e9"
            assert header["traceparent"].split("-")[1] in urllib.request.urlopen(exemplars, timeout=10).read().decode()
