"""The installed package has every file of the tree: what no meson.build names would be missing for users."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.resources import files
from pathlib import Path

import pytest

import flightquant

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "flightquant": ROOT / "src" / "flightquant",
    "flightquant.benchmarks": ROOT / "benchmarks",
    "flightquant.client": ROOT / "client",
    "flightquant.cython_core": ROOT / "cython_core",
    "flightquant.server": ROOT / "server",
}


def tree(suffix: str) -> list[tuple[str, Path]]:
    """Each file of the tree with the package that it belongs to."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob(f"*{suffix}")):
            parts = path.relative_to(folder).parts
            if f"{package}.{parts[0]}" not in FOLDERS:
                found.append((".".join([package, *parts[:-1]]), path))
    return found


@pytest.mark.parametrize(("package", "path"), tree(".py"), ids=str)
def test_every_module_is_installed(package: str, path: Path) -> None:
    name = package if path.stem == "__init__" else f"{package}.{path.stem}"
    assert importlib.util.find_spec(name) is not None


@pytest.mark.parametrize(("package", "path"), tree(".pyi") + tree("py.typed"), ids=str)
def test_every_stub_is_installed(package: str, path: Path) -> None:
    assert (files(package) / path.name).is_file()


@pytest.mark.parametrize(("package", "path"), tree(".pyx"), ids=str)
def test_every_extension_is_compiled_and_has_a_stub(package: str, path: Path) -> None:
    spec = importlib.util.find_spec(f"{package}.{path.stem}")
    assert spec is not None
    assert str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))
    assert path.with_suffix(".pyi").is_file()
    module = importlib.import_module(f"{package}.{path.stem}")
    named = {thing.__module__ for thing in vars(module).values() if callable(thing)}
    assert module.__name__ in named
    assert f"cython_core.{path.stem}" not in named


def test_the_version_has_one_source() -> None:
    declared = re.search(r"^  version: '([^']+)'", (ROOT / "meson.build").read_text(), re.MULTILINE)
    assert declared is not None
    assert flightquant.__version__ == declared[1]


def test_the_licence_is_declared_and_shipped() -> None:
    metadata = importlib.metadata.metadata("flightquant")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "LICENSE" in metadata.get_all("License-File", [])


def test_every_dependency_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    loose = [line for line in listed if not re.search(r">=|==", line) and not line.startswith("flightquant[")]
    assert not loose


def test_cython_directives_stand_in_one_place() -> None:
    """A directive at the head of a .pyx would hold for that file alone."""
    pyx = [*(ROOT / "cython_core").rglob("*.pyx"), *(ROOT / "cython_core").rglob("*.pxd")]
    assert pyx
    assert not [path.name for path in pyx if re.search(r"^#\s*cython:", path.read_text(), re.MULTILINE)]
