"""The manifests as kustomize builds them: what is generated is fresh, selectors meet, settings are the server's own."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flightquant.server import heap
from flightquant.server.cli import serve

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent.name for path in (ROOT / "deploy/overlays").glob("*/kustomization.yaml"))
LISTENERS = {"flight": 8815, "health": 8816, "metrics": 9464}


@functools.cache
def built(overlay: str) -> tuple[dict[str, Any], ...]:
    """An overlay's objects."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", ROOT / "deploy/overlays" / overlay], check=True, capture_output=True, text=True
    )
    assert "Warning" not in done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [item for item in built(overlay) if item["kind"] == kind]


def pod(overlay: str) -> dict[str, Any]:
    (deployment,) = of_kind(overlay, "Deployment")
    template: dict[str, Any] = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    return template


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_meets_the_pods(overlay: str) -> None:
    labels = pod(overlay)["metadata"]["labels"]
    selectors = [item["spec"]["selector"] for item in of_kind(overlay, "Service")]
    selectors += [item["spec"]["selector"]["matchLabels"] for item in of_kind(overlay, "PodDisruptionBudget")]
    selectors += [item["spec"]["podSelector"]["matchLabels"] for item in of_kind(overlay, "NetworkPolicy")]
    assert len(selectors) == 4
    for selector in selectors:
        assert selector.items() <= labels.items()
    for spread in pod(overlay)["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    for monitor in of_kind(overlay, "ServiceMonitor"):
        matched = [
            service
            for service in of_kind(overlay, "Service")
            if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        ]
        ports = {port["name"] for service in matched for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == of_kind(overlay, "Deployment")[0]["metadata"]["name"]
        assert "replicas" not in of_kind(overlay, "Deployment")[0]["spec"]
    for scaler in of_kind(overlay, "ScaledObject"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == of_kind(overlay, "Deployment")[0]["metadata"]["name"]
        assert "replicas" not in of_kind(overlay, "Deployment")[0]["spec"]
        assert not of_kind(overlay, "HorizontalPodAutoscaler")  # two would pull at one Deployment


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_objects_are_in_one_namespace(overlay: str) -> None:
    named = {item["metadata"]["name"] for item in of_kind(overlay, "Namespace")} or {None}
    assert {item["metadata"].get("namespace") for item in built(overlay) if item["kind"] != "Namespace"} == named


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_outlives_its_drain_and_gives_nothing_away(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    (container,) = spec["containers"]
    (settings,) = of_kind(overlay, "ConfigMap")
    data = settings["data"]
    hook = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(data["FLIGHTQUANT_SERVE_DRAIN_DELAY_S"]) + float(data["FLIGHTQUANT_SERVE_GRACE_S"])
    assert spec["terminationGracePeriodSeconds"] > hook + drain
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == LISTENERS
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}
    assert set(mounts) == {volume["name"] for volume in spec.get("volumes", ())}
    for name, value in data.items():
        if value.startswith("/"):
            assert any(value.startswith(f"{path}/") for path in mounts.values()), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_setting_is_one_of_the_servers(overlay: str) -> None:
    known = set(re.findall(r'envvar="(\w+)"', Path(serve.__code__.co_filename).read_text())) | {
        f"FLIGHTQUANT_SERVE_{name}"
        for name in re.findall(r'envvar=f"\{_ENV\}(\w+)"', Path(serve.__code__.co_filename).read_text())
    }
    (settings,) = of_kind(overlay, "ConfigMap")
    assert set(settings["data"]) <= known


def test_the_prometheus_rule_is_made_of_the_rules() -> None:
    path = ROOT / "deploy/components/monitoring/generate.py"
    spec = importlib.util.spec_from_file_location("fq_rule", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (path.parent / "prometheusrule.yaml").read_text() == module.build()
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())["groups"]
    assert yaml.safe_load(module.build())["spec"]["groups"] == groups


def test_the_image_sets_the_heap_as_the_server_would() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"{heap.VARIABLE}={heap.TUNABLES}\n" in text
    for port in LISTENERS.values():
        assert re.search(rf"^EXPOSE .*\b{port}\b", text, re.MULTILINE)


def test_an_init_is_process_1_of_the_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ENTRYPOINT .*", text, re.MULTILINE) == ['ENTRYPOINT ["tini", "--", "flightquant"]']
    assert re.search(r"^COPY --from=build \S+ /usr/bin/tini$", text, re.MULTILINE)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_manifest_goes_past_the_init(overlay: str) -> None:
    assert ["command" in container for container in pod(overlay)["spec"]["containers"]] == [False]


def test_both_autoscalers_hold_the_same() -> None:
    (plain,), (keda,) = of_kind("prod", "HorizontalPodAutoscaler"), of_kind("prod-keda", "ScaledObject")
    made = keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    assert made["behavior"] == plain["spec"]["behavior"]
    assert keda["spec"]["minReplicaCount"] == plain["spec"]["minReplicas"]
    assert keda["spec"]["maxReplicaCount"] == plain["spec"]["maxReplicas"]
    cpu, held = plain["spec"]["metrics"]
    triggers = {trigger["type"]: trigger["metadata"] for trigger in keda["spec"]["triggers"]}
    assert int(triggers["cpu"]["value"]) == cpu["resource"]["target"]["averageUtilization"]
    mebibytes = held["pods"]["target"]["averageValue"].removesuffix("Mi")
    assert int(triggers["prometheus"]["threshold"]) == int(mebibytes) << 20
    asked = f'{held["pods"]["metric"]["name"]}{{namespace="{keda["metadata"]["namespace"]}"}}'
    assert asked in triggers["prometheus"]["query"]
    rules = yaml.safe_load((ROOT / "deploy/components/autoscaling/adapter-rules.yaml").read_text())["rules"]["custom"]
    assert held["pods"]["metric"]["name"] in [rule["name"]["as"] for rule in rules]


def test_the_certificate_names_both_services() -> None:
    (certificate,) = of_kind("prod-tls", "Certificate")
    (config,) = of_kind("prod-tls", "ConfigMap")
    services = {
        f"{item['metadata']['name']}.{item['metadata']['namespace']}" for item in of_kind("prod-tls", "Service")
    }
    names = set(certificate["spec"]["dnsNames"])
    assert {f"{service}.svc{domain}" for service in services for domain in ("", ".cluster.local")} <= names
    (volume,) = [item for item in pod("prod-tls")["spec"]["volumes"] if item["name"] == "tls"]
    assert volume["secret"]["secretName"] == certificate["spec"]["secretName"]
    assert config["data"]["FLIGHTQUANT_SERVE_LOCATION"].startswith("grpc+tls://")


FOREIGN = {
    "Certificate": "cert_manager.v1",
    "PrometheusRule": "prometheus_operator.v1",
    "ScaledObject": "keda.v1alpha1",
    "ServiceMonitor": "prometheus_operator.v1",
}
"""Kinds that are not Kubernetes' own, and where the classes made of their definitions are."""


@pytest.mark.parametrize("version", ["1.28", "1.32", "1.37"])
@pytest.mark.parametrize("overlay", ["dev", "prod", "prod-keda", "prod-tls"])
def test_the_manifests_fit_the_schema(overlay: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    objects = [item for item in built(overlay) if item["kind"] not in FOREIGN]
    assert len(objects) >= 7
    for item in objects:
        validator.validate(item, version, strict=True)


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_operators_read_fits_their_schema(kind: str) -> None:
    models = pytest.importorskip(f"cloudcoil.models.{FOREIGN[kind]}")
    found = [item for overlay in ("prod-keda", "prod-tls") for item in of_kind(overlay, kind)]
    assert found
    for item in found:
        # A field that the schema has not is dropped in silence: it is missing in what comes back.
        assert getattr(models, kind).model_validate(item).model_dump(by_alias=True, exclude_unset=True) == item
