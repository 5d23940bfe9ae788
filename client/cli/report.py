"""Tables for people: what a conversion did, what a file holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite, prod
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flightquant.client import compressed
from flightquant.client.convert import Conversion
from flightquant.client.recipes import Plan, available_presets, module_of
from flightquant.client.safetensors import FLOATS
from flightquant.client.sinks import LayerResult
from flightquant.client.sources import Source
from flightquant.client.stored import AnswerSource, StoredLayer, stored_layers
from flightquant.describe import describe
from flightquant.errors import InvalidRequestError
from flightquant.layers import layer_class
from flightquant.reference import float8
from flightquant.reference.numeric import widen
from flightquant.schemes import LayerSpec

_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(nbytes: float) -> str:
    """Bytes with a unit, three digits: ``14.2 MB``."""
    for unit in _UNITS:
        if abs(nbytes) < 999.5 or unit == _UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "B" or abs(nbytes) >= 99.95 else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def count(number: float) -> str:
    """A count with a letter: ``10.6 M``."""
    for letter in ("", " k", " M", " G"):
        if abs(number) < 999.5 or letter == " G":
            return f"{number:.3g}{letter}"
        number /= 1000
    raise AssertionError


def console() -> Console:
    """Standard output; wide where nobody's window bounds it."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=140)


def layer_table(layers: Sequence[LayerResult], width: int) -> Table:
    """One line for each layer class, and the total; fewer columns where ``width`` characters do not hold all."""
    wide = width >= 100
    table = Table(pad_edge=False, box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    table.add_column("layer class", overflow="fold", style="cyan")
    headings = ["n", "weights", "in", "out", "bits/w", "SQNR dB", "worst", "kernels"]
    shown = [i for i, heading in enumerate(headings) if wide or heading not in ("bits/w", "worst")]
    for i in shown:
        table.add_column(headings[i] if wide else headings[i].split()[0], justify="right", no_wrap=True)
    classes: dict[str, list[LayerResult]] = {}
    for layer in layers:
        classes.setdefault(module_of(layer.layer_class), []).append(layer)
    for name, members in classes.items():
        cells = _sums(members)
        table.add_row(name, *(cells[i] for i in shown))
    table.add_section()
    cells = _sums(layers)
    table.add_row("all", *(cells[i] for i in shown), style="bold")
    return table


def _sums(layers: Sequence[LayerResult]) -> list[str]:
    weights = sum(layer.weights for layer in layers)
    bytes_out = sum(layer.bytes_out for layer in layers)
    ratios = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
    return [
        str(len(layers)),
        count(weights),
        size(sum(layer.bytes_in for layer in layers)),
        size(bytes_out),
        f"{8 * bytes_out / weights:.2f}",
        f"{np.mean(ratios):.1f}" if ratios else "",
        f"{min(ratios):.1f}" if ratios else "",
        f"{sum(layer.kernel_ns for layer in layers) / 1e6:.1f} ms",
    ]


def print_conversion(console: Console, result: Conversion, target: str) -> None:
    """The whole summary of a conversion."""
    console.print(layer_table(result.layers, console.width))
    console.print()
    bytes_in = sum(layer.bytes_in for layer in result.layers)
    kernel_s = sum(layer.kernel_ns for layer in result.layers) / 1e9
    copied = sum(layer.bytes_copied for layer in result.layers)
    console.print(
        f"{len(result.layers)} layers, {size(bytes_in)} read, quantized and written in {result.seconds:.2f} s: "
        f"{bytes_in / 1e9 / result.seconds:.2f} GB/s, kernels {kernel_s / result.seconds:.0%} of the time, "
        f"{size(copied)} copied",
        highlight=False,
    )
    if result.resumed:
        console.print(f"{result.resumed} of them had been written by an earlier call", highlight=False)
    _print_kept(console, result.kept, result.kept_bytes)
    share = result.bytes_out / result.bytes_in
    console.print(
        f"[green]{target}[/]: {size(result.bytes_out)}, {share:.0%} of {size(result.bytes_in)}",
        highlight=False,
        soft_wrap=True,
    )


def conversion_facts(result: Conversion, target: str) -> dict[str, Any]:
    """What a program wants to know of a conversion."""
    facts = asdict(result)
    return {"output": target, **facts}


def plan_facts(plan: Plan, source: Source, nbytes: Mapping[str, int], seconds: float | None) -> dict[str, Any]:
    """What a program wants to know of a plan."""
    layers = {
        name: {
            "scheme": command.scheme,
            "shape": source.tensors[name].shape,
            "bytes_in": source.tensors[name].nbytes,
            "bytes_out": nbytes[name],
        }
        for name, command in plan.commands.items()
    }
    kept = sum(source.tensors[name].nbytes for name in plan.kept)
    return {"target": plan.target, "layers": layers, "kept": plan.kept, "kept_bytes": kept, "kernel_seconds": seconds}


def print_plan(console: Console, plan: Plan, source: Source, nbytes: Mapping[str, int], seconds: float | None) -> None:
    """What a conversion would do: one line for each layer class and scheme, and the total."""
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer class", overflow="fold", style="cyan")
    table.add_column("scheme", no_wrap=True)
    for heading in ("n", "in", "out"):
        table.add_column(heading, justify="right", no_wrap=True)
    classes: dict[tuple[str, str], list[str]] = {}
    for name, command in plan.commands.items():
        classes.setdefault((module_of(layer_class(name)), command.scheme), []).append(name)
    for (name, scheme), members in classes.items():
        table.add_row(name, scheme, *_plan_cells(members, source, nbytes))
    table.add_section()
    table.add_row("all", "", *_plan_cells(list(plan.commands), source, nbytes), style="bold")
    console.print(table)
    console.print()
    _print_kept(console, plan.kept, sum(source.tensors[name].nbytes for name in plan.kept))
    kept = 0 if plan.target in ("parquet", "arrow") else sum(source.tensors[name].nbytes for name in plan.kept)
    before = sum(meta.nbytes for meta in source.tensors.values())
    after = kept + sum(nbytes.values())
    took = "" if seconds is None else f"; kernels about {seconds:.2f} s on this machine, reading and writing beside it"
    console.print(
        f"{plan.target}: {size(after)}, {after / before:.0%} of {size(before)}{took}; nothing was done",
        highlight=False,
        soft_wrap=True,
    )


def _plan_cells(names: Sequence[str], source: Source, nbytes: Mapping[str, int]) -> list[str]:
    before = sum(source.tensors[name].nbytes for name in names)
    return [str(len(names)), size(before), size(sum(nbytes[name] for name in names))]


def print_json(facts: Any) -> None:
    """One JSON object on standard output; null for what JSON has no number for, as the ratio of no error at all."""
    print(json.dumps(_finite(facts), allow_nan=False))  # noqa: T201


def _finite(facts: Any) -> Any:
    if isinstance(facts, Mapping):
        return {key: _finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite(each) for each in facts]
    return None if isinstance(facts, float) and not isfinite(facts) else facts


def scheme_rows() -> dict[str, Any]:
    """The schemes and presets, for programs."""
    return {"schemes": describe(), "presets": available_presets()}


def print_schemes(console: Console) -> None:
    """The schemes, a line for each packing, and the presets."""
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("scheme", "bits", "packing", "granularity", "group sizes", "bit for bit", "what"):
        table.add_column(heading, overflow="fold")
    for scheme in describe():
        bits = _listed(scheme["bit_widths"] or [scheme["bits"]])
        for packing, facts in scheme["packings"].items():
            ranges = (_listed(facts["granularities"]), _listed(facts["group_sizes"]))
            table.add_row(scheme["name"], bits, packing, *ranges, facts["exact_with"], facts["summary"])
    console.print(table)
    console.print()
    presets = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    presets.add_column("preset")
    presets.add_column("recipe")
    for name, keys in available_presets().items():
        presets.add_row(name, ", ".join(f"{key}: {value}" for key, value in keys.items()))
    console.print(presets)


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _print_kept(console: Console, kept: Mapping[str, str], nbytes: int) -> None:
    if kept:
        why = Counter(_broad(reason) for reason in kept.values())
        listed = ", ".join(f"{number} {reason}" for reason, number in why.most_common())
        console.print(f"kept as they are: {len(kept)} tensors, {size(nbytes)} ({listed})", highlight=False)


def _broad(reason: str) -> str:
    """Reasons that differ only by a shape, as one."""
    return "of other than two dimensions" if reason.startswith("shape") else reason


def print_inspection(console: Console, file: Source) -> None:
    """Every tensor of a file, quantized weights as one line each."""
    try:
        stored, misfit = stored_layers(file), ""
    except InvalidRequestError as error:
        stored, misfit = {}, str(error)
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tensor", overflow="fold", style="cyan")
    table.add_column("scheme", no_wrap=True)
    for heading in ("shape", "bits/w", "size", "scales"):
        table.add_column(heading, justify="right", no_wrap=True)
    parts = {part for layer in stored.values() for part in layer.parts}
    dense = {name: info for name, info in file.tensors.items() if name not in parts}
    weights = packed = 0
    for name in sorted([*stored, *dense], key=_natural):
        if name in dense:
            info = dense[name]
            table.add_row(name, Text(info.dtype, style="dim"), _shape(info.shape), "", size(info.nbytes), "")
            continue
        layer = stored[name]
        n, nbytes = prod(layer.shape), sum(file.tensors[part].nbytes for part in layer.parts)
        weights, packed = weights + n, packed + nbytes
        bits = f"{8 * nbytes / n:.2f}" if n else ""
        table.add_row(name, _scheme(layer.spec), _shape(layer.shape), bits, size(nbytes), _scale_range(file, layer))
    console.print(table)
    console.print()
    if weights:
        console.print(
            f"{len(stored)} quantized weights: {count(weights)} weights in {size(packed)}, "
            f"{8 * packed / weights:.2f} bits each",
            highlight=False,
        )
    console.print(f"{len(dense)} other tensors: {size(sum(info.nbytes for info in dense.values()))}", highlight=False)
    if misfit:
        console.print(f"What looks quantized is shown as it lies: {misfit}", highlight=False, markup=False)
    for key, value in file.metadata.items():
        console.print(f"metadata {key}: {value}", highlight=False, markup=False, soft_wrap=True)


def answer_facts(answers: AnswerSource) -> dict[str, Any]:
    """What a table of answers holds, for programs."""
    return {"layers": list(answers.rows()), "metadata": answers.metadata}


def print_answers(console: Console, answers: AnswerSource) -> None:
    """Every row of a table of answers."""
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold", style="cyan")
    table.add_column("scheme", no_wrap=True)
    for heading in ("shape", "bits/w", "size", "SQNR dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    weights = nbytes = rows = 0
    for row in answers.rows():
        n = prod(row["shape"])
        weights, nbytes, rows = weights + n, nbytes + row["nbytes"], rows + 1
        scheme = " ".join([row["scheme"] or "", f"g{row['group_size']}" if row["group_size"] else ""])
        bits = f"{8 * row['nbytes'] / n:.2f}" if n else ""
        ratio = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        table.add_row(row["layer_name"], scheme, _shape(row["shape"]), bits, size(row["nbytes"]), ratio)
    console.print(table)
    console.print()
    console.print(f"{rows} quantized layers: {count(weights)} weights in {size(nbytes)}", highlight=False)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``layer.2`` before ``layer.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _scheme(spec: LayerSpec) -> str:
    """The scheme, what a scale covers, and how codes lie about zero where there are two ways."""
    words = [spec.scheme.name]
    if spec.group_size:
        words.append(f"g{spec.group_size}")
    elif len(spec.scheme.granularities) > 1:
        words.append(spec.granularity)
    if spec.scheme.asymmetric:
        words.append("sym" if spec.symmetric else "asym")
    return " ".join(words)


def _scale_range(file: Source, layer: StoredLayer) -> str:
    """The range of the scales that stand beside the weights, in the steps of their own dtype."""
    name = next((part for part in layer.parts if part.endswith(("_scale", ".absmax"))), None)
    info = file.tensors.get(name or "")
    if name is None or info is None or not info.nbytes:
        return ""
    raw = file.load(name)
    if info.dtype in FLOATS:
        values = raw.layer()
        scales = widen(values.data, values.dtype)
    elif info.dtype == compressed.FLOAT8:
        scales = float8.decode(np.frombuffer(raw.data, np.uint8), float8.FORMATS["fp8_e4m3"])
    elif layer.spec.scheme.fixed_scales == "e8m0":
        scales = np.ldexp(np.float32(1), np.frombuffer(raw.data, np.uint8).astype(np.int32) - 127)
    else:
        return ""  # of nested scales the bytes say nothing by themselves
    return f"{scales.min():.2g} .. {scales.max():.2g} {info.dtype}"
