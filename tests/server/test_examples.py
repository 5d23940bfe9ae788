"""The example that stands in the README runs, and its bytes are the reference's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from flightquant.server.app import Server

EXAMPLE = Path(__file__).parents[2] / "examples" / "stock_client.py"


def test_a_stock_client_needs_the_contract_alone(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), server.location], capture_output=True, text=True, check=True, timeout=60
    )
    *rows, totals = done.stdout.splitlines()
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert re.fullmatch(rf"layers\.{i}\.weight ok 8192 bytes, [12][0-9]\.[0-9]{{2}} dB", row), row
    assert totals == f"{4 * 65536} bytes in, {4 * (8192 + 512)} out, 0 copied"


def test_it_imports_nothing_of_ours() -> None:
    imported = {
        name.name.split(".")[0]
        for node in ast.walk(ast.parse(EXAMPLE.read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported == {"json", "sys", "numpy", "pyarrow"}
