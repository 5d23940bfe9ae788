"""The commands of ``flightquant``; needs the ``cli`` extra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from flightquant import __version__
from flightquant.client import QuantClient
from flightquant.client.cli.in_process import in_process
from flightquant.client.cli.report import console, print_conversion, print_inspection, size
from flightquant.client.convert import convert
from flightquant.client.safetensors import SafetensorsFile
from flightquant.layers import Layer
from flightquant.spec import Command

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="flightquant",
    help="Exact quantization of neural-network weights at memory speed, in-process or over Arrow Flight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP,
)

_QUANTIZE_HELP = (
    "Quantize a checkpoint into the compressed-tensors layout.\n\nTwo-dimensional float tensors named *.weight are "
    "quantized, except embeddings, norms, the output layer and expert routers. All others are copied as they are."
)
_QUANTIZE_EXAMPLES = """
[bold]Examples[/]

  flightquant quantize model.safetensors -o model-int4.safetensors

  flightquant quantize model.safetensors -o out.safetensors --scheme int8

  flightquant quantize model.safetensors -o out.safetensors --keep '*.down_proj'

  flightquant quantize model.safetensors -o out.safetensors --server grpc://host:8815
"""


class SchemeName(StrEnum):
    """The schemes' names."""

    int4 = "int4"
    int8 = "int8"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Granularity(StrEnum):
    """What one scale covers."""

    group = "group"
    channel = "channel"
    tensor = "tensor"


class ScaleDtype(StrEnum):
    """To what scales are rounded."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flightquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(help=_QUANTIZE_HELP, epilog=_QUANTIZE_EXAMPLES)
def quantize(  # noqa: D103 - its help is what people read
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write.", show_default=False)],
    scheme: Annotated[SchemeName, typer.Option(help="The format of the weights.")] = SchemeName.int4,
    group_size: Annotated[
        int | None, typer.Option(help="Weights for each scale: 32, 64, 128 or 256.", show_default="128 for int4")
    ] = None,
    granularity: Annotated[
        Granularity | None, typer.Option(help="What one scale covers.", show_default="group for int4, channel for int8")
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")] = True,
    scale_dtype: Annotated[
        ScaleDtype | None, typer.Option(help="Dtype of the scales.", show_default="the weights' own")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave weights of these names as they are; may be repeated."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Quantize on this server, such as grpc://host:8815; else on this machine."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Deadline of the server's work.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Compute threads on this machine.", show_default="all it may use")
    ] = None,
) -> None:
    command = Command.build(
        scheme=scheme.value,
        group_size=group_size,
        granularity=granularity.value if granularity else None,
        symmetric=symmetric,
        scale_dtype=scale_dtype.value if scale_dtype else None,
    )
    with SafetensorsFile(model) as source:
        result = convert(source, output, command, _quantizer(command, server, timeout, threads), keep or [])
    print_conversion(console(), result, str(output))


def _quantizer(
    command: Command, server: str | None, timeout_s: float | None, threads: int | None
) -> Callable[[Mapping[str, Layer]], Iterator[pa.RecordBatch]]:
    def quantize_all(layers: Mapping[str, Layer]) -> Iterator[pa.RecordBatch]:
        with LayerProgress(layers) as progress:
            if server is None:
                yield from in_process(layers, command, progress.tell, threads)
                return
            with QuantClient(server, timeout_s=timeout_s) as client:
                yield from client.stream(
                    layers,
                    command.scheme,
                    granularity=command.granularity,
                    group_size=command.group_size,
                    symmetric=command.symmetric,
                    scale_dtype=command.scale_dtype,
                    progress=progress.tell,
                )

    return quantize_all


class _BytesColumn(ProgressColumn):
    """Bytes done of all, and how fast."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        rate = f"{speed / 1e9:.2f} GB/s" if speed else ""
        done = f"{size(task.completed)} of {size(task.total or 0)}  {rate:>9}"
        return Text(done, style="progress.download", no_wrap=True)


class LayerProgress(contextlib.AbstractContextManager["LayerProgress"]):
    """A progress bar in bytes of weights, on standard error, that names the current layer.

    Parameters
    ----------
    layers : mapping of str to Layer
        All layers that will be told of.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._sizes = {name: layer.nbytes for name, layer in layers.items()}
        self._done: dict[str, float] = dict.fromkeys(layers, 0.0)
        current = TextColumn("{task.description}", style="cyan", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(24), _BytesColumn(), TimeRemainingColumn(compact=True), current)
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=sum(self._sizes.values()))

    def __enter__(self) -> LayerProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, name: str, fraction: float) -> None:
        """The client's progress callback."""
        advance = (fraction - self._done[name]) * self._sizes[name]
        self._done[name] = fraction
        self._progress.update(self._task, advance=advance, description=name)


@app.command(epilog="[bold]Example[/]\n\n  flightquant inspect model-int4.safetensors")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file.", show_default=False)],
) -> None:
    """Show what a safetensors file holds: schemes, shapes, sizes, ranges of the scales, metadata."""
    with SafetensorsFile(file) as source:
        print_inspection(console(), source)


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
