"""``flightquant quantize``: source, recipe, output."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import typer

from flightquant.client import QuantClient, Retry
from flightquant.client.cli.page import write_page
from flightquant.client.cli.progress import LayerProgress
from flightquant.client.cli.report import (
    console,
    conversion_facts,
    plan_facts,
    print_conversion,
    print_json,
    print_plan,
)
from flightquant.client.client import LOCAL
from flightquant.client.connection import Credentials
from flightquant.client.convert import Conversion, Selection, convert, plan_of, read_importance
from flightquant.client.recipes import OPTION_KEYS, TARGETS, Recipe, available_presets, preset, read_recipe
from flightquant.client.safetensors import FLOATS
from flightquant.client.sinks import sizes
from flightquant.client.sources import Source, open_source, place
from flightquant.errors import InvalidRequestError
from flightquant.layers import Layer
from flightquant.reference.numeric import F32
from flightquant.schemes import GRANULARITIES, SCALE_DTYPES, SCHEMES
from flightquant.spec import CALIBRATIONS, Command

CONNECT_S = 3.0
"""How long a server is tried that cannot be reached: who waits at a terminal has most likely mistyped its address."""
MAX_THREADS = 1024
"""Where the system gives no more, the thread library ends the process with words of its own."""
EXAMPLES = """
[bold]Examples[/]

  flightquant quantize model/ -o model-w4a16/ --preset vllm-w4a16

  flightquant quantize model.safetensors -o model-int8.safetensors --scheme int8

  flightquant quantize model-bf16.gguf -o model-q8_0.gguf --scheme q8_0

  flightquant quantize s3://bucket/model -o out/ --keep 'lm_head,*down_proj*' --dry-run

  flightquant quantize model/ -o out/ --recipe recipe.yaml --server grpc://host:8815 --resume
"""


def choice(values: Iterable[str]) -> dict[str, Any]:
    """The parameters of an option that takes one of these values."""
    allowed = list(values)

    def check(value: str | None) -> str | None:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f'"{value}" is none; expected one of {", ".join(allowed)}')
        return value

    return {"callback": check, "autocompletion": lambda: allowed, "metavar": "NAME"}


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Safetensors file or folder, GGUF, Parquet or Arrow file or data set; a path or a URI (s3://...).",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="A folder, or a file named *.safetensors, *.gguf, *.parquet or *.arrow; a path or a URI.",
            show_default=False,
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(**choice(available_presets()), help="A ready-made recipe.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A recipe in YAML or JSON.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option(**choice(TARGETS), help="Kind of output.", show_default="by its name")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(**choice(SCHEMES), help="The number format.", show_default="int4")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights for each scale, such as 128.", show_default="the scheme's")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(**choice(GRANULARITIES), help="What one scale covers.", show_default="the scheme's"),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Without or with zero points.", show_default="symmetric"),
    ] = None,
    scale_dtype: Annotated[
        str | None,
        typer.Option(**choice(SCALE_DTYPES), help="Dtype of the scales.", show_default="the weights' own"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            **choice(CALIBRATIONS),
            help="Search instead, which takes longer and errs less: mse for int2 to int8, proximal for hqq.",
            show_default="absmax",
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What errors in each column count, by layer: *.npz, safetensors, or llama.cpp's imatrix.gguf.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERNS",
            help="Leave layers of these names as they are; commas between, or repeated.",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality", help="Measure each layer's error, which takes about half of the kernels' time."
        ),
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier call was cut off.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done: sizes and time.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with error and cost of each layer.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output instead of tables.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Quantize on this server, such as grpc://host:8815; else on this machine.",
            show_default=False,
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the server's bearer token.", show_default=False)
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the server's authority.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Deadline of each call to the server.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_THREADS, help="Compute threads on this machine.", show_default="all it may use"),
    ] = None,
) -> None:
    """Quantize a model into what vLLM, transformers or llama.cpp loads, or into a table.

    Two-dimensional float weights are quantized, except embeddings, norms, the output layer and expert routers, unless
    the recipe says otherwise. All other tensors and files are copied as they are. The output appears whole or not at
    all.
    """
    options = {
        "scheme": scheme,
        "group_size": group_size,
        "granularity": granularity,
        "symmetric": symmetric,
        "scale_dtype": scale_dtype,
        "calibration": calibration,
        "target": target,
    }
    made = build_recipe(preset, recipe, options, keep or [])
    if report is not None:
        report.touch()  # where it cannot be written, better now than after the work
    with open_source(model) as source:
        if dry_run:
            _show_plan(source, output, made, as_json=as_json, local=server is None, threads=threads)
            return
        access = Credentials(token_file, ca)
        with QuantClient(
            server or LOCAL, credentials=access, timeout_s=timeout, retry=Retry(connect_s=CONNECT_S), n_threads=threads
        ) as client:
            files = importance_files(recipe, importance)
            result = _convert(source, output, made, client, files, quality=quality, resume=resume)
    output = place(output).uri  # without the keys that a URI may have
    if report is not None:
        write_page(report, result, source=place(model).uri, output=output)
    if as_json:
        print_json(conversion_facts(result, output))
    else:
        print_conversion(console(), result, output)


def importance_files(path: Path | None, given: str | None) -> dict[str, str]:
    """The file of each pattern of layers: the option's for all, else those of the recipe's key ``importance``.

    The recipe's paths are taken from where it lies.

    Raises
    ------
    InvalidRequestError
        The recipe holds something else there.
    """
    if given is not None or path is None:
        return {"*": given} if given is not None else {}
    told = read_recipe(path).get("importance", {})
    files = {"*": told} if isinstance(told, str) else told
    if not isinstance(files, dict) or not all(isinstance(each, str) for pair in files.items() for each in pair):
        raise InvalidRequestError(
            f'"importance" in {path.name} is {str(told)[:80]}; expected a file, or a file for each pattern of layers',
            field="importance",
        )
    return {pattern: file if "://" in file else str(path.parent / file) for pattern, file in files.items()}


def build_recipe(name: str | None, path: Path | None, options: dict[str, Any], keep: list[str]) -> Recipe:
    """A recipe from a preset, a file and options; the later decide. A scheme that is named has its own options.

    Raises
    ------
    InvalidRequestError
        A value is wrong, or values do not go together.
    """
    keys: dict[str, Any] = {"scheme": "int4"} if name is None and path is None else {}
    if name is not None:
        keys |= preset(name)
    if path is not None:
        read = read_recipe(path)
        keys = {**keys, **preset(read.pop("preset"))} if "preset" in read else keys
        read.pop("importance", None)  # no part of how a layer is quantized: importance_files
        keys |= read
    given = {key: value for key, value in options.items() if value is not None}
    if "scheme" in given:
        keys = {key: value for key, value in keys.items() if key not in (*OPTION_KEYS, "mixture", "activations")}
    elif "granularity" in given:
        keys.pop("group_size", None)
    keys |= given
    patterns = [pattern for each in keep for pattern in each.split(",") if pattern.strip()]
    kept = keys.get("keep", [])
    if isinstance(kept, str | list):  # else the recipe is wrong, which is told where all of it is looked at
        keys["keep"] = [*(kept.split(",") if isinstance(kept, str) else kept), *patterns]
    return Recipe.parse(keys)


def _convert(
    source: Source,
    output: str,
    recipe: Recipe,
    client: QuantClient,
    importance: dict[str, str],
    *,
    quality: bool,
    resume: bool,
) -> Conversion:
    plan = plan_of(source, output, recipe)
    counts: dict[str, F32] = {}
    for pattern, file in importance.items():
        counts |= read_importance(file, plan, pattern)
    with LayerProgress({name: source.tensors[name].nbytes for name in plan.commands}) as progress:

        def quantize_all(layers: Selection, command: Command) -> Iterator[pa.RecordBatch]:
            options = {**command.options(), "metrics": quality}
            return client.stream(layers, **options, importance=counts or None, progress=progress.tell)

        return convert(source, output, recipe, quantize_all, resume=resume, already=progress.tell, importance=counts)


def _show_plan(source: Source, output: str, recipe: Recipe, *, as_json: bool, local: bool, threads: int | None) -> None:
    plan = plan_of(source, output, recipe)
    nbytes = sizes(plan, source)
    seconds = _estimate(source, plan.groups(list(plan.commands)), threads) if local else None
    if as_json:
        print_json(plan_facts(plan, source, nbytes, seconds))
    else:
        print_plan(console(), plan, source, nbytes, seconds)


def _estimate(source: Source, groups: dict[Command, list[str]], threads: int | None) -> float:
    """Seconds that the kernels will take, from a few milliseconds of work on made-up weights of the same dtypes."""
    client = QuantClient(LOCAL, n_threads=threads)
    total = 0.0
    made = np.random.default_rng(0).standard_normal((1024, 2048), np.float32)
    samples: dict[str, npt.NDArray[Any]] = {
        "F32": made,
        "F16": made.astype(np.float16),
        "F64": made.astype(np.float64),
        "BF16": (made.view(np.uint32) >> np.uint32(16)).astype(np.uint16),
    }
    for command, names in groups.items():
        counts: Counter[str] = Counter()
        for name in names:
            counts[source.tensors[name].dtype] += source.tensors[name].nbytes
        for dtype, nbytes in counts.items():
            layer = Layer("sample", made.shape, FLOATS[dtype], samples[dtype].reshape(-1))
            best = float("inf")
            for _ in range(3):
                started = time.perf_counter()
                client.quantize({"sample": layer}, **command.options())
                best = min(best, time.perf_counter() - started)
            total += best * nbytes / layer.nbytes
    return total
