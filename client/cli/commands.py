"""The commands of ``flightquant``; needs the ``cli`` extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flightquant import __version__
from flightquant.client.cli import InterruptedCommandError, fail
from flightquant.client.cli.compare import JsonFlag, dequantize, ping, verify
from flightquant.client.cli.quantize import EXAMPLES, quantize
from flightquant.client.cli.report import (
    answer_facts,
    console,
    print_answers,
    print_inspection,
    print_json,
    print_schemes,
    scheme_rows,
)
from flightquant.client.sources import open_source
from flightquant.client.stored import open_answers


class _Commands(TyperGroup):
    """The commands; what Ctrl-C interrupts is told by us, where typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedCommandError(*getattr(error, "__notes__", ())) from None


_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="flightquant",
    cls=_Commands,
    help="Exact quantization of neural-network weights at memory speed, in-process or over Arrow Flight.",
    epilog="Exit codes: 0; 1 for a failure; 2 for wrong usage; 3 where verify found layers beyond a threshold; 130 "
    "after Ctrl-C, 143 after SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP,
)


# typer brings its own click or the installed one, by its version; what it exports tells which.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_ClickError: type[Exception] = _UsageError.__bases__[0]


@contextlib.contextmanager
def usage_sentence() -> Iterator[None]:
    """Wrong usage as one sentence and exit code 2."""
    try:
        yield
    except _ClickError as error:
        text: str = error.format_message()  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(text or context.get_help())  # type: ignore[union-attr]
            raise SystemExit(2) from None
        where = context.command_path if context else "flightquant"
        usage = isinstance(error, _UsageError)
        fail(f"{text.rstrip('.')}; see {where} --help" if usage else text, 2 if usage else 1)
    except typer.Abort:
        raise KeyboardInterrupt from None


def _show_version(shown: bool) -> None:
    if shown:
        typer.echo(f"flightquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command(epilog=EXAMPLES)(quantize)
app.command(epilog="[bold]Example[/]\n\n  flightquant dequantize model-w4a16/ -o model-again/ --dtype bfloat16")(
    dequantize
)
app.command(epilog="[bold]Example[/]\n\n  flightquant verify model/ model-w4a16/ --min-sqnr 15")(verify)
app.command()(ping)


@app.command(epilog="[bold]Example[/]\n\n  flightquant inspect model-int4/")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A file, folder, data set or URI.", show_default=False)],
    as_json: JsonFlag = False,
) -> None:
    """Show what a model holds: schemes, shapes, sizes, ranges of the scales, metadata."""
    answers = open_answers(model)
    if answers is not None:
        print_json(answer_facts(answers)) if as_json else print_answers(console(), answers)
        return
    with open_source(model) as source:
        if as_json:
            tensors = {name: asdict(meta) for name, meta in source.tensors.items()}
            print_json({"tensors": tensors, "metadata": source.metadata})
        else:
            print_inspection(console(), source)


@app.command()
def schemes(as_json: JsonFlag = False) -> None:
    """List the number formats, and the presets that use them."""
    if as_json:
        print_json(scheme_rows())
    else:
        print_schemes(console())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def serve(context: typer.Context) -> None:
    """Run the quantization service; needs the server extra.

    Its own help: flightquant serve --help
    """
    # The server and all that it needs load only here; its own options are its own to read.
    from flightquant.server.cli import serve as run

    server = typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    server.command()(run)
    server(args=context.args, prog_name="flightquant serve")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """Measure kernels and exchange on this machine.

    Its own help: flightquant bench --help
    """
    from flightquant.benchmarks.cli import app as benchmarks

    benchmarks(args=context.args, prog_name="flightquant bench")


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Who it is for; stands in the server's log.")],
    roles: Annotated[str, typer.Option(help="What it may do: quantize, sources.")] = "quantize",
) -> None:
    """Make a bearer token: its line for the server's token file on standard output, the token on standard error."""
    from flightquant.server.auth import new_token

    try:
        secret, line = new_token(name, roles)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(line)
    typer.echo(secret, err=True)
