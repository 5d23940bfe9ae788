"""Error and cost of every layer as a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from flightquant.client.sinks import LayerResult

_COLOURS = ("#2f6db3", "#d9822b", "#3a9d6e", "#b0413e", "#7a5ea8", "#5c6670", "#b58b00", "#3aa6b9")
_INK, _FAINT = "#2b2f36", "#d7dbe0"


def draw(layers: Sequence[LayerResult], path: Path, title: str) -> None:
    """Write a PNG: on the left each layer's signal-to-noise ratio, on the right its kernel time."""
    kinds: dict[str, list[LayerResult]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    places, labels = _places(layers)
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.labelcolor": _INK}
    style |= {"xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _FAINT}
    with plt.rc_context(style):
        figure, (error, cost) = plt.subplots(1, 2, figsize=(11.5, 5.0), dpi=150)
        for colour, (kind, members) in zip(_COLOURS * len(kinds), kinds.items(), strict=False):
            look: dict[str, Any] = {"color": colour, "label": kind, "marker": "o", "markersize": 5, "linewidth": 1.6}
            blocks = [places[layer.name] for layer in members]
            error.plot(blocks, [layer.sqnr_db for layer in members], **look, zorder=3)
            cost.plot(blocks, [layer.kernel_ns / 1e3 for layer in members], **look, zorder=3)
        error.set_title("Error: signal-to-noise ratio in dB, higher is better", loc="left", fontsize=10.5)
        cost.set_title("Cost: kernel time of each layer in µs", loc="left", fontsize=10.5)
        # Logarithmic, so that one layer that had to wait for its CPU does not flatten all others.
        cost.set_yscale("log")
        cost.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        cost.yaxis.set_major_formatter("{x:g}")
        cost.yaxis.set_minor_locator(NullLocator())
        for axes in (error, cost):
            axes.set_xlabel("encoder block")
            axes.set_xticks(range(len(labels)), labels)
            axes.grid(axis="y", color=_FAINT, linewidth=0.8)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
        weights = sum(layer.weights for layer in layers)
        mean = sum(layer.sqnr_db or 0.0 for layer in layers) / len(layers)
        bytes_in, bytes_out = sum(x.bytes_in for x in layers), sum(x.bytes_out for x in layers)
        figure.suptitle(title, x=0.012, y=0.98, ha="left", fontsize=14, fontweight="bold")
        figure.text(
            0.012,
            0.9,
            f"{len(layers)} layers, {weights / 1e6:.1f} M weights, "
            f"{bytes_in / 1e6:.1f} MB to {bytes_out / 1e6:.1f} MB, mean {mean:.1f} dB",
            color="#5c6670",
        )
        figure.legend(
            *error.get_legend_handles_labels(), loc="lower center", ncol=len(kinds), frameon=False, fontsize=9
        )
        figure.tight_layout(rect=(0, 0.06, 1, 0.95), w_pad=3)
        figure.savefig(path)
        plt.close(figure)


def _places(layers: Sequence[LayerResult]) -> tuple[dict[str, int], list[str]]:
    """Where each layer stands, and what stands there; layers of no block come after the last one."""
    found = {layer.name: re.search(r"\.(\d+)\.", layer.name) for layer in layers}
    blocks = {name: int(number[1]) for name, number in found.items() if number}
    after = max(blocks.values(), default=-1) + 1
    labels = [str(block) for block in range(after)] + (["after"] if len(blocks) < len(layers) else [])
    return {name: blocks.get(name, after) for name in found}, labels


def _kind(layer: LayerResult) -> str:
    """A short name for the legend: what follows the block's number."""
    name = re.sub(r"^.*\.\d+\.", "", layer.name).removesuffix(".weight")
    return name.replace(".self", "").replace(".dense", "").replace("attention.output", "attention.out")
