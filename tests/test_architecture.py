"""Dependencies point one way: shared <- cython_core <- server, shared <- client; C knows neither Python nor Arrow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "shared": ROOT / "src" / "flightquant",
    "cython_core": ROOT / "cython_core",
    "server": ROOT / "server",
    "client": ROOT / "client",
    "benchmarks": ROOT / "benchmarks",
}
SIDES = ("benchmarks", "client", "cython_core", "server")


@dataclass(frozen=True)
class Rule:
    """What a folder may import of flightquant: always, and only inside functions of the named files."""

    always: frozenset[str]
    inside: frozenset[str] = frozenset()
    files: str = ""
    foreign: frozenset[str] = frozenset()


RULES = {
    "shared": Rule(
        frozenset({"shared"}),
        frozenset({"cython_core", "client"}),
        r"__(init|main)__\.py|compat/models\.py",
        foreign=frozenset({"grpc", "prometheus_client", "pyarrow.flight"}),
    ),
    "cython_core": Rule(
        frozenset({"shared", "cython_core"}),
        foreign=frozenset({"grpc", "prometheus_client", "pyarrow.flight"}),
    ),
    # Stored sources are read and written by the one code that knows files; it loads when they are asked for.
    "server": Rule(frozenset({"shared", "cython_core", "server"}), frozenset({"client"}), r"stored\.py"),
    "client": Rule(
        frozenset({"shared", "client"}),
        frozenset({"benchmarks", "cython_core", "server"}),
        r"cli(\.py|/.*)|in_process\.py",
        foreign=frozenset({"grpc", "prometheus_client"}),
    ),
    "benchmarks": Rule(
        frozenset({"shared", "cython_core", "benchmarks"}),
        frozenset({"client"}),
        r"(apis|files)\.py",
        foreign=frozenset({"grpc"}),
    ),
}


def sources(folder: str) -> list[Path]:
    return sorted(
        path
        for pattern in ("*.py", "*.pyi", "*.pyx", "*.pxd")
        for path in FOLDERS[folder].rglob(pattern)
        if path.relative_to(FOLDERS[folder]).parts[0] not in SIDES
    )


def imports(text: str) -> Iterator[tuple[str, bool]]:
    """Every imported name of a module in dotted form, and whether the import runs when the module is loaded."""
    tree = ast.parse(text)
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((f"{node.module}.{alias.name}", node not in later) for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def cython_imports(text: str) -> Iterator[tuple[str, bool]]:
    for module, names in re.findall(r"^\s*from\s+([\w.]+)\s+c?import\s+(.+)", text, re.MULTILINE):
        yield from ((f"{module}.{name.strip(' ()')}", True) for name in names.split(","))
    yield from ((name, True) for name in re.findall(r"^\s*c?import\s+([\w.]+)", text, re.MULTILINE))


def side(name: str) -> str | None:
    """The folder that an imported name belongs to; None for other packages."""
    parts = name.split(".")
    if parts[0] != "flightquant":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in SIDES else "shared"


def broken_rules(folder: str, relative: str, text: str) -> list[str]:
    rule = RULES[folder]
    found = imports(text) if relative.endswith((".py", ".pyi")) else cython_imports(text)
    inside = rule.inside if re.fullmatch(rule.files, relative) else frozenset()
    broken = []
    for name, at_load in found:
        owner = side(name)
        if name.split(".")[0] in SIDES:
            broken.append(f"{name}: a second copy of flightquant.{name}")
        elif owner and owner not in rule.always and (at_load or owner not in inside):
            broken.append(f"{name}: {folder} does not import {owner} {'when it is loaded' if inside else 'here'}")
        elif any(name == banned or name.startswith(f"{banned}.") for banned in rule.foreign):
            broken.append(f"{name}: {folder} does not know it")
    return broken


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    paths = sources(folder)
    assert paths
    broken = {
        str(path.relative_to(ROOT)): problems
        for path in paths
        if (problems := broken_rules(folder, path.relative_to(FOLDERS[folder]).as_posix(), path.read_text()))
    }
    assert not broken


@pytest.mark.parametrize(
    ("folder", "relative", "text"),
    [
        ("shared", "wire.py", "from flightquant.cython_core import engine"),
        ("shared", "wire.py", "def f():\n    import flightquant.cython_core.engine"),
        ("shared", "__init__.py", "from flightquant.cython_core.local import quantize"),
        ("shared", "wire.py", "import pyarrow.flight as fl"),
        ("shared", "wire.py", "from pyarrow import flight"),
        ("cython_core", "engine.py", "from flightquant import server"),
        ("cython_core", "_quantize.pyx", "from flightquant.server cimport app"),
        ("cython_core", "_quantize.pyx", "cdef f():\n    import flightquant.client"),
        ("server", "app.py", "def f():\n    from flightquant.client import QuantClient"),
        ("client", "client.py", "def f():\n    import flightquant.cython_core.engine"),
        ("client", "cli.py", "import flightquant.server.app"),
        ("client", "cli.py", "if True:\n    from flightquant import cython_core"),
        ("client", "cli.py", "import grpc"),
        ("client", "cli.py", "from server import app"),
        ("client", "cli.py", "import server.app"),
    ],
)
def test_a_wrong_import_is_found(folder: str, relative: str, text: str) -> None:
    assert broken_rules(folder, relative, text)


@pytest.mark.parametrize(
    ("folder", "relative", "text"),
    [
        ("shared", "__init__.py", "def f():\n    from flightquant.cython_core.local import quantize"),
        ("shared", "__init__.py", "if TYPE_CHECKING:\n    from flightquant.cython_core.local import quantize"),
        ("cython_core", "engine.py", "from flightquant.errors import InternalError"),
        ("server", "service.py", "import pyarrow.flight as fl\nfrom flightquant.cython_core.engine import Engine"),
        ("client", "cli.py", "def f():\n    from flightquant.server.app import serve"),
        ("client", "client.py", "from flightquant import wire"),
        ("client", "in_process.py", "def f():\n    import flightquant.cython_core.local"),
    ],
)
def test_a_right_import_is_not(folder: str, relative: str, text: str) -> None:
    assert broken_rules(folder, relative, text) == []


def test_kernels_know_neither_python_nor_arrow() -> None:
    paths = sorted((ROOT / "cython_core" / "kernels").glob("*.[ch]"))
    assert paths
    included = {name for path in paths for name in re.findall(r'#\s*include\s*[<"]([^">]+)', path.read_text())}
    assert not [name for name in included if re.search(r"python|numpy|arrow", name, re.IGNORECASE)]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("flightquant", "flightquant.cython_core flightquant.server flightquant.client pyarrow.flight"),
        ("flightquant.compat", "flightquant.cython_core flightquant.server flightquant.client pyarrow.flight"),
        ("flightquant.client", "flightquant.cython_core flightquant.server grpc prometheus_client torch"),
        ("flightquant.client.cli", "flightquant.cython_core flightquant.server grpc prometheus_client torch"),
        ("flightquant.cython_core.engine", "flightquant.client flightquant.server pyarrow.flight"),
        ("flightquant.server.app", "flightquant.client torch"),
    ],
)
def test_importing_a_side_loads_no_other(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]"
