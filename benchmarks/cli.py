"""``flightquant bench``: its options."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flightquant.benchmarks import exchange as exchange_bench
from flightquant.benchmarks import kernels as measured
from flightquant.benchmarks import peers as other_libraries
from flightquant.benchmarks import report, restoring, tables
from flightquant.benchmarks.harness import OtherLoad, header, machine, write_json
from flightquant.schemes import SCHEMES

app = typer.Typer(
    help="Measure this machine: medians and ranges of interleaved rounds, with the machine's header.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXAMPLES = """
[bold]Examples[/]

  flightquant bench kernels --fast

  flightquant bench kernels --op schemes --scheme int4 --scheme nf4 --size 4096x4096

  flightquant bench kernels --peers --json figures.json --plot roofline.png
"""


class Op(StrEnum):
    """What is measured."""

    schemes = "schemes"
    dequantize = "dequantize"
    sizes = "sizes"
    reductions = "reductions"
    layers = "layers"


@app.command(epilog=_EXAMPLES)
def kernels(
    op: Annotated[
        list[Op] | None,
        typer.Option(
            help="Only this: every scheme, every scheme's way back, size classes, what scales are taken over, or whole "
            "calls; may be repeated."
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="ROWSxCOLS", help="Shape of the layer; may be repeated.", show_default="4096x4096"),
    ] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Only this scheme; may be repeated.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype of the weights; may be repeated.", show_default="float32")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Number of threads; may be repeated.", show_default="1 and 2")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 7,
    fast: Annotated[bool, typer.Option("--fast", help="Three rounds, and nothing over 16 Mi weights.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Other installed libraries on the same weights; with --op, beside that.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the tables of schemes, of their way back and of other libraries, as far as they are measured, "
            "into a Markdown file that has such.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot each scheme under its roofs.")] = None,
) -> None:
    """Kernels against the read bandwidth measured in the same rounds, and against other libraries.

    The share is of that bandwidth, with the same number of threads; "quality" says whether the quality columns are on.
    """
    if plot is not None:
        import matplotlib  # noqa: F401 - fails before the work, not after it
    for name in scheme or []:
        if name not in SCHEMES:
            raise typer.BadParameter(f"unknown scheme {name}; expected one of {', '.join(SCHEMES)}")
    shapes = [_shape(text) for text in size or ["4096x4096"]]
    wanted = set(op or (() if peers else Op))
    if plot is not None:
        wanted.add(Op.schemes)
    if table is not None:
        try:
            for name in [*wanted & tables.TABLES.keys(), *(["peers"] if peers else [])]:
                tables.around(table, name)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None
    rounds = min(rounds, 3) if fast else rounds
    chosen, counts = measured.cases(tuple(scheme or ())), threads or [1, 2]
    console, load = report.console(), OtherLoad()
    facts = machine(other_libraries.LIBRARIES if peers else ())
    console.print(header(facts), soft_wrap=True)
    found: dict[str, Any] = {"machine": facts}
    rows: measured.Figures = []
    if Op.schemes in wanted:
        for shape in shapes:
            rows += measured.schemes(chosen, shape, dtype or ["float32"], counts, rounds)
        report.print_schemes(console, rows)
        found["schemes"] = rows
    if Op.dequantize in wanted:
        found["dequantize"] = restored = [
            row for shape in shapes for row in restoring.dequantize(chosen, shape, counts, rounds)
        ]
        report.print_dequantized(console, restored)
    if Op.sizes in wanted:
        found["sizes"] = sized = measured.sizes(counts, rounds, 1 << 24 if fast else 1 << 27)
        report.print_sizes(console, "sizes", sized)
    if Op.reductions in wanted:
        found["reductions"] = reduced = measured.reductions(counts, rounds, largest=1 << 24 if fast else 1 << 27)
        report.print_sizes(console, "the largest magnitude", reduced)
    if Op.layers in wanted:
        found["layers"] = calls = measured.layers(rounds)
        report.print_layers(console, calls)
    if peers:
        compared = [
            row
            for n_threads in counts
            for row in other_libraries.compare(tuple(scheme or ()), shapes[0], n_threads, rounds)
        ]
        found["peers"] = compared
        report.print_peers(console, compared)
    if plot is not None:
        cached = measured.in_cache(chosen, rounds)
        found["in_cache"] = cached
        report.roofline(plot, rows, cached, header(facts))
    shares = load.shares()
    found["load"] = shares
    console.print(f"\nCPU time stolen by the host: {shares['stolen']:.1%}; used by this process: {shares['own']:.0%}")
    if table is not None:
        tables.write(table, found, rounds, f"{header(facts)}; {shares['stolen']:.0%} of the CPU time stolen")
    write_json(json, found)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--size {text}; expected ROWSxCOLS, such as 4096x4096")
    return int(parts[0]), int(parts[1])


@app.command(epilog="[bold]Example[/]\n\n  flightquant bench exchange --batch-mib 4 --batch-mib 8")
def exchange(
    scheme: Annotated[str, typer.Option(help="The format of the answers.")] = "int4",
    batch_mib: Annotated[
        list[int] | None, typer.Option(help="MiB of a batch; may be repeated.", show_default="1, 4 and 16")
    ] = None,
    total_mib: Annotated[int, typer.Option(help="MiB of input in one round.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures.")] = None,
) -> None:
    """The whole exchange over loopback against the same one whose server answers the same sizes without computing."""
    exchange_bench.run(scheme, batch_mib or [1, 4, 16], total_mib, rounds, json)
