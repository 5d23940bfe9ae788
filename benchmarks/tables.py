"""Tables of a Markdown file that the benchmarks write, each between two marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flightquant.benchmarks.kernels import Figures

Lines = list[list[str]]


def marks(name: str) -> tuple[str, str]:
    """The lines between which a Markdown file has one of :data:`TABLES`."""
    return f"<!-- table of {name}: begin -->", f"<!-- table of {name}: end -->"


def around(path: Path, name: str) -> tuple[str, str, str]:
    """What a Markdown file has before a table, in its place, and after it; the marks count as outside.

    Raises
    ------
    ValueError
        The file has no place for the table: both marks, each in a line of its own.
    """
    text = path.read_text()
    first, last = marks(name)
    begin, end = text.find(f"{first}\n"), text.find(f"{last}\n")
    if not 0 <= begin < end:
        raise ValueError(f"{path} has no lines {first} and {last}, between which the table goes")
    begin += len(first) + 1
    return text[:begin], text[begin:end], text[end:]


def write(path: Path, found: Mapping[str, Any], rounds: int, facts: str) -> None:
    """Replace each table of a Markdown file of which there are figures, and the line over it."""
    for name, (option, of, lines_of) in TABLES.items():
        if name not in found:
            continue
        before, old, after = around(path, name)
        heading = f"`flightquant bench kernels {option} --rounds {rounds}`, GB/s of {of}, medians. {facts}"
        heads, *rows = lines_of(found[name], _read(old))
        table = [_row(heads), "|---" * len(heads) + "|", *map(_row, rows)]
        path.write_text("\n".join([before, heading, "", *table, "", after]))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _read(table: str) -> Lines:
    """The rows of a table without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def _schemes(rows: Figures, old: Lines) -> Lines:
    """GB/s of each case by dtype, shape and number of threads, with quality and without."""
    groups = _grouped(rows, "dtype")
    lines = [["", *(head for name in groups for head in (f"{name}, quality off", "on"))], ["reading alone"]]
    for found in groups.values():
        lines[1] += [f"{found[0]['read']['gb_s']:.2f}", ""]
    return lines + _by_case(groups)


def _dequantized(rows: Figures, old: Lines) -> Lines:
    """GB/s of weights by operation, shape and number of threads."""
    groups = _grouped(rows, "operation")
    alone = [f"{found[0]['roof']['gb_s']:.2f}" for found in groups.values()]
    return [["", *groups], ["writing alone, or reading to verify", *alone], *_by_case(groups)]


def _peers(rows: Figures, old: Lines) -> Lines:
    """Other libraries' GB/s and ours; what the file has of schemes that are not among the rows stays."""
    measured = {row["case"] for row in rows}
    lines = [["scheme", "library", "threads", "theirs", "ours", "times"]]
    lines += [cells for cells in old if cells[0] not in measured]
    for row in rows:
        rates = [f"{row[side]['gb_s']:.3g}" for side in ("theirs", "ours")]
        lines.append([row["case"], row["peer"], str(row["threads"]), *rates, f"{row['times']:.1f}"])
    return lines


def _grouped(rows: Figures, first: str) -> dict[str, Figures]:
    """Rows by a column, shape and number of threads, in words."""
    groups: dict[str, Figures] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        groups.setdefault(f"{row[first]} {'x'.join(map(str, row['shape']))}, {threads}", []).append(row)
    return groups


def _by_case(groups: dict[str, Figures]) -> Lines:
    """A line for each case, with its figures in all groups, in their order."""
    lines: dict[str, list[str]] = {}
    for found in groups.values():
        for row in found:
            lines.setdefault(row["case"], [row["case"]]).append(f"{row['gb_s']:.2f}")
    return list(lines.values())


TABLES: dict[str, tuple[str, str, Callable[[Figures, Lines], Lines]]] = {
    "schemes": ("--op schemes", "input", _schemes),
    "dequantize": ("--op dequantize", "weights", _dequantized),
    "peers": ("--peers", "float32 input in whole calls", _peers),
}
"""By the name of the figures: the option that makes them, what GB/s are of, the lines with their heads first."""
