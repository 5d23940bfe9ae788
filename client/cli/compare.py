"""``flightquant dequantize``, ``verify`` and ``ping``."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from pyarrow import flight
from rich.table import Table

from flightquant.client.cli.quantize import choice
from flightquant.client.cli.report import console, print_json, size
from flightquant.client.connection import Connection, Credentials
from flightquant.client.exchange import our_error
from flightquant.client.recipes import Plan, Recipe
from flightquant.client.sinks.safetensors import SafetensorsSink
from flightquant.client.sources import Source, place
from flightquant.client.stored import DequantizedSource, StoredLayer, open_dequantized
from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer
from flightquant.reference import quality
from flightquant.reference.numeric import widen

EXIT_BEYOND = 3
_CHUNK = 1 << 20

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on standard output instead of tables.")]
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def dequantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A quantized file or folder, or a table.", show_default=False)
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="OUT", help="A folder, or *.safetensors.", show_default=False),
    ],
    dtype: Annotated[str, typer.Option(**choice(_DTYPES), help="Of the weights.")] = "float32",
) -> None:
    """Write the float weights that a quantized model stands for.

    Reads compressed-tensors (integers of 2 to 8 bits, floats of 4 and 8), bitsandbytes, GGUF, and tables of answers.
    """
    started = time.perf_counter()
    target = place(output)
    kind = Path(target.path).suffix
    if kind in (".gguf", ".parquet", ".arrow", ".feather"):
        raise InvalidRequestError(
            f"dequantized weights go into a folder or *.safetensors; the output is {target.uri}",
            field="output",
            got=target.uri,
        )
    with open_dequantized(model, _DTYPES[dtype]) as source:
        plan = Plan("plain", Recipe.parse({"scheme": "int8"}), kept=dict.fromkeys(source.tensors, ""))
        with SafetensorsSink(target, plan, source, resume=False) as sink:
            for tensor in source.read():
                sink.keep(tensor)
        stored = len(getattr(source, "stored", source.tensors))
    seconds = time.perf_counter() - started
    typer.echo(f"{target.uri}: {stored} weights dequantized to {dtype}, {size(sink.nbytes)} in {seconds:.2f} s")


def verify(
    original: Annotated[str, typer.Argument(metavar="A", help="The original model.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", help="Its quantized twin.", show_default=False)],
    min_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Smallest signal-to-noise ratio.", show_default="any")
    ] = None,
    min_cosine: Annotated[float | None, typer.Option(help="Smallest cosine.", show_default="any")] = None,
    max_error: Annotated[float | None, typer.Option(help="Largest error of a weight.", show_default="any")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare two models layer by layer; exit code 3 if a layer is missing, misshapen or beyond a threshold.

    Both may be anything that flightquant reads, quantized or not; weights that are the same bits are not listed.
    """
    with open_dequantized(original) as a, open_dequantized(other) as b:
        rows = [_compare(a[name], b, min_sqnr, min_cosine, max_error) for name in a if len(a.tensors[name].shape) > 1]
    if not any("cosine" in row for row in rows):
        raise InvalidRequestError(f"{original} and {other} have no layer in common", field="model")
    beyond = [row for row in rows if row["problem"]]
    if as_json:
        print_json({"layers": rows, "passed": not beyond})
    else:
        _print_comparison(rows)
    if beyond:
        raise typer.Exit(EXIT_BEYOND)


def _compare(
    layer: Layer, other: Source, min_sqnr: float | None, min_cosine: float | None, max_error: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.name, "problem": ""}
    if layer.name not in other:
        return {**row, "problem": "missing"}
    shape = other.tensors[layer.name].shape
    if shape != layer.shape:
        return {**row, "problem": f"shape {list(shape)}, not {list(layer.shape)}"}
    stored = other.stored.get(layer.name) if isinstance(other, DequantizedSource) else None
    measured = _of_floats(layer, other[layer.name]) if stored is None else _of_stored(layer, stored)
    sqnr, cosine, largest = measured
    row |= {"sqnr_db": sqnr, "cosine": cosine, "max_abs_error": largest}
    if math.isnan(sqnr) or not math.isfinite(cosine) or not math.isfinite(largest):
        row["problem"] = "not finite"
    elif min_sqnr is not None and sqnr < min_sqnr:
        row["problem"] = f"SQNR under {min_sqnr:g} dB"
    elif min_cosine is not None and cosine < min_cosine:
        row["problem"] = f"cosine under {min_cosine:g}"
    elif max_error is not None and largest > max_error:
        row["problem"] = f"error over {max_error:g}"
    return row


def _of_stored(layer: Layer, twin: StoredLayer) -> tuple[float, ...]:
    """SQNR, cosine and largest error in one pass of the kernels over both, the weights never written out."""
    from flightquant import verify as compare

    row = compare({layer.name: layer}, twin.answer()).to_pylist()[0]
    if row["status"] != "ok":
        return math.nan, math.nan, math.nan
    return row["sqnr_db"], row["cosine"], row["max_abs_error"]


def _of_floats(layer: Layer, twin: Layer) -> tuple[float, ...]:
    sums = np.zeros(4)
    for first in range(0, layer.data.size, _CHUNK):
        x = widen(layer.data[first : first + _CHUNK], layer.dtype).astype(np.float64)
        e = widen(twin.data[first : first + _CHUNK], twin.dtype).astype(np.float64) - x
        sums[:3] += (x @ x, e @ e, x @ e)
        sums[3] = max(sums[3], np.abs(e).max(initial=0.0))
    return tuple(float(column[0]) for column in quality.columns(sums))


def _print_comparison(rows: list[dict[str, Any]]) -> None:
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold", style="cyan")
    for heading in ("SQNR dB", "cosine", "max error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    same = 0
    for row in rows:
        if not row["problem"] and row["max_abs_error"] == 0:
            same += 1
            continue
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in
                 (("sqnr_db", ".2f"), ("cosine", ".6f"), ("max_abs_error", ".3g"))]  # fmt: skip
        table.add_row(row["layer"], *cells, f"[red]{row['problem']}[/]" if row["problem"] else "[green]pass[/]")
    out = console()
    out.print(table)
    failed = sum(bool(row["problem"]) for row in rows)
    out.print(f"\n{len(rows) - failed} layers pass ({same} of them are the same), {failed} do not", highlight=False)


def ping(
    server: Annotated[str, typer.Argument(metavar="URI", help="Such as grpc://host:8815.", show_default=False)],
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with a bearer token.", show_default=False)
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the server's authority.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="How long to wait.")] = 5.0,
    as_json: JsonFlag = False,
) -> None:
    """Ask a server for its version, and how long it takes to say so."""
    credentials = Credentials(token_file, ca)
    connection = Connection(server, credentials, None)
    headers = [(name.encode(), value.encode()) for name, value in credentials.headers().items()]
    options = flight.FlightCallOptions(timeout=timeout, headers=headers)
    try:
        took = []
        for _ in range(3):
            started = time.perf_counter()
            (answer,) = connection.flight.do_action(flight.Action("version", b""), options)
            took.append(time.perf_counter() - started)
    except (flight.FlightError, pa.ArrowException, OSError) as error:
        raise our_error(error) from None
    finally:
        connection.close()
    facts = json.loads(answer.body.to_pybytes())
    if as_json:
        print_json({"server": server, "milliseconds": min(took) * 1000, **facts})
        return
    told = ", ".join(f"{key} {value}" for key, value in facts.items())
    typer.echo(f"{server} answers in {min(took) * 1000:.1f} ms: {told}")
