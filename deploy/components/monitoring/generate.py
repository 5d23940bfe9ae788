"""Writes prometheusrule.yaml around deploy/prometheus/rules.yaml; ``--check`` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parents[1] / "prometheus/rules.yaml"
TARGET = HERE / "prometheusrule.yaml"
HEAD = """\
# Made by generate.py of deploy/prometheus/rules.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: flightquant
  labels: {app.kubernetes.io/name: flightquant}
spec:
"""


def build() -> str:
    """The object, with the rules' own text indented."""
    lines = RULES.read_text().splitlines()
    rules = lines[lines.index("groups:") :]
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in rules)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(build())
    elif TARGET.read_text() != build():
        sys.exit(f"{TARGET} is not what {Path(__file__).name} makes: run it")
