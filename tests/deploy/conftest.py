"""What the tests of deploy/ share: its files, and tools that are not Python packages."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    """deploy/grafana/generate.py, which is a program and no package."""
    pytest.importorskip("grafana_foundation_sdk")
    spec = importlib.util.spec_from_file_location("fq_dashboard", ROOT / "deploy/grafana/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def promtool() -> str:
    return _tool("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return _tool("prometheus")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus)")
    return found
