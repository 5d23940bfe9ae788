"""deploy/compose.yaml fits what it mounts: each path, name, port and data source that a file names is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def mounted(service: str, path: str) -> Path:
    """The file of ours that a service finds there."""
    for volume in SERVICES[service]["volumes"]:
        source, target = volume.split(":")[:2]
        if source.startswith("./") and (path == target or path.startswith(f"{target}/")):
            return DEPLOY / source / path[len(target) :].lstrip("/")
    raise AssertionError(f"{service} has nothing at {path}")


def test_prometheus_finds_its_rules_and_every_replica() -> None:
    options = dict(word.removeprefix("--").split("=", 1) for word in SERVICES["prometheus"]["command"])
    config_path = options["config.file"]
    config = yaml.safe_load(mounted("prometheus", config_path).read_text())
    for name in config["rule_files"]:
        assert mounted("prometheus", str(Path(config_path).parent / name)).is_file()
    assert f"prometheus:{options['storage.tsdb.path']}" in SERVICES["prometheus"]["volumes"]
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert found["names"] == ["flightquant"]
    assert "flightquant" in SERVICES
    assert any(port.endswith(f":{found['port']}") for port in SERVICES["flightquant"]["ports"])


def test_grafana_finds_its_data_source_and_its_dashboard() -> None:
    provisioning = "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(mounted("grafana", f"{provisioning}/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    address = urlsplit(source["url"])
    assert any(port.endswith(f":{address.port}") for port in SERVICES[address.hostname or ""]["ports"])
    (provider,) = yaml.safe_load(mounted("grafana", f"{provisioning}/dashboards/flightquant.yaml").read_text())[
        "providers"
    ]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    dashboard = json.loads(mounted("grafana", str(home)).read_text())

    def sources(node: Any) -> set[str]:
        """Every data source that a part of the dashboard names."""
        if isinstance(node, list):
            return set().union(*map(sources, node))
        if not isinstance(node, dict):
            return set()
        own = {node["datasource"]["uid"]} if isinstance(node.get("datasource"), dict) else set()
        return own.union(*map(sources, node.values()))

    chosen = [item for item in dashboard["templating"]["list"] if item["type"] == "datasource"]
    assert {item["query"] for item in chosen} == {source["type"]}
    assert sources(dashboard) == {f"${{{item['name']}}}" for item in chosen}


def test_every_port_is_this_machines_alone() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
