"""Figures for people: tables on the terminal, and a plot of every kernel under its roofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flightquant.benchmarks.kernels import Figures


def console() -> Console:
    """The terminal, or a page wide enough for every column where the output is a file or a pipe."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['gb_s']:.2f} ({rate['min']:.2f} to {rate['max']:.2f})"


def print_schemes(console: Console, rows: Figures) -> None:
    """One table for each shape, dtype and number of threads."""
    groups: dict[tuple[Any, ...], Figures] = {}
    for row in rows:
        groups.setdefault((*row["shape"], row["dtype"], row["threads"], id(row["read"])), []).append(row)
    for (height, width, dtype, threads, _), members in groups.items():
        title = f"\n{dtype} {height} x {width}, {threads} thread(s); reading {_rate(members[0]['read'])} GB/s"
        table = _table(title, "scheme", "quality", "kernel GB/s", "of reading", "ns/weight", "call GB/s", "of reading")
        for row in members:
            figures = (_rate(row), f"{row['share']:.0%}", f"{row['ns_per_weight']:.3f}")
            table.add_row(
                row["case"], row["metrics"], *figures, f"{row['call']['gb_s']:.2f}", f"{row['call_share']:.0%}"
            )
        console.print(table)


def print_sizes(console: Console, title: str, rows: Figures) -> None:
    """Cases by size class."""
    table = _table(
        f"\n{title}, float32, quality off",
        "weights",
        "case",
        "threads",
        "kernel GB/s",
        "of reading",
        "ns/weight",
        "call",
    )
    for row in rows:
        shares = (f"{row['share']:.0%}", f"{row['ns_per_weight']:.3f}", f"{row['call_share']:.0%}")
        table.add_row(row["size"], row["case"], str(row["threads"]), _rate(row), *shares)
    console.print(table)


def print_dequantized(console: Console, rows: Figures) -> None:
    """One table for each shape, operation and number of threads."""
    groups: dict[tuple[Any, ...], Figures] = {}
    for row in rows:
        groups.setdefault((*row["shape"], row["operation"], row["threads"]), []).append(row)
    for (height, width, operation, threads), members in groups.items():
        what, roof = ("verified", "reading") if operation == "verify" else (f"dequantized to {operation}", "writing")
        title = f"\n{what}, {height} x {width}, {threads} thread(s); {roof} {_rate(members[0]['roof'])} GB/s"
        table = _table(title, "scheme", "kernel GB/s", f"of {roof}", "ns/weight", "call GB/s", f"of {roof}")
        for row in members:
            figures = (_rate(row), f"{row['share']:.0%}", f"{row['ns_per_weight']:.3f}")
            table.add_row(row["case"], *figures, f"{row['call']['gb_s']:.2f}", f"{row['call_share']:.0%}")
        console.print(table)


def print_layers(console: Console, rows: Figures) -> None:
    """Single calls."""
    table = _table("\nwhole calls of flightquant.quantize, int4, two threads", "", "ms", "range")
    for row in rows:
        table.add_row(row["case"], f"{row['ms']:.2f}", f"{row['min']:.2f} to {row['max']:.2f}")
    console.print(table)


def print_peers(console: Console, rows: Figures) -> None:
    """Other libraries."""
    table = _table(
        "\nagainst other libraries, float32, whole calls", "scheme", "library", "threads", "theirs", "ours", "times"
    )
    for row in rows:
        rates = (_rate(row["theirs"]), _rate(row["ours"]))
        table.add_row(row["case"], row["peer"], str(row["threads"]), *rates, f"{row['times']:.1f}")
    console.print(table)


def roofline(path: Path, rows: Figures, cached: dict[str, float], facts: str) -> None:
    """Plot what one thread reaches on weights in memory against what it reaches on weights in cache.

    No kernel can be above either roof: the diagonal (as fast from memory as from cache) or reading itself.
    """
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row["threads"] == 1 and row["dtype"] == "float32" and row["metrics"] == "off"]
    read = chosen[0]["read"]["gb_s"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    rates = [cached[row["case"]] for row in chosen]
    low, high = min(*rates, *(row["gb_s"] for row in chosen), read) / 1.5, max(*rates, read) * 1.5
    axes.plot(
        [low, read, high], [low, read, read], color="0.4", lw=1.5, label=f"roofs: compute, reading {read:.1f} GB/s"
    )
    axes.plot([low, read, high], [low * 0.5, read * 0.5, read * 0.5], color="0.8", lw=1, ls="--", label="half of both")
    for i, row in enumerate(chosen):
        x, y = cached[row["case"]], row["gb_s"]
        axes.plot(x, y, "o", ms=5, color=f"C{i % 10}", label=f"{i + 1} {row['case']}")
        axes.annotate(str(i + 1), (x, y), (4, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.set_xlabel("kernel on weights in cache, GB/s of float32")
    axes.set_ylabel(f"kernel on weights in memory ({chosen[0]['shape'][0]} x {chosen[0]['shape'][1]}), GB/s")
    axes.set_title("Each scheme under its roofs, one thread", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    figure.text(0.01, -0.02, facts, fontsize=7, color="0.4")
    figure.savefig(path, dpi=150, bbox_inches="tight")
