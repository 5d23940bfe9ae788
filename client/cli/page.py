"""A report that is one HTML file: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from flightquant import __version__
from flightquant.client.cli.report import count, size
from flightquant.client.convert import Conversion
from flightquant.client.sinks import LayerResult

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #667085; --line: #e4e7ec; --bar: #3b6fd4;
  --warm: #d9822b; --tint: #f5f7fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --soft: #98a2b3; --line: #2a313c;
  --bar: #6b9bf2; --warm: #f0a356; --tint: #1b212b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
p { margin: .25rem 0; color: var(--soft) } code { font-size: .9em }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin-top: 1.5rem }
.card { background: var(--tint); border-radius: .5rem; padding: .75rem 1rem }
.card b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums } .card span { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .45rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--paper) }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 17rem }
.scroll { overflow-x: auto } .meter { width: 4rem } .meter div { height: .6rem; border-radius: .2rem;
  background: var(--bar); min-width: 1px } .cost div { background: var(--warm) }
.sizes { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem .75rem; align-items: center;
  color: var(--soft) }
.sizes div { height: 1.5rem; border-radius: .2rem; background: var(--bar); min-width: 1px }
.sizes .was { background: var(--warm) }
.bins { display: flex; align-items: end; gap: 2px; border-bottom: 1px solid var(--line) }
.bins span { flex: 1; min-width: 0; text-align: center; font-size: .8rem; color: var(--soft) }
.bins span div { background: var(--bar) }
.ticks { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft) }
@media (max-width: 40rem) { th:first-child, td:first-child { min-width: 9rem } .bins, .ticks { font-size: .7rem } }
"""


def write_page(path: Path, result: Conversion, *, source: str, output: str) -> None:
    """Write the report of a conversion.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    layers = result.layers
    title = f"{Path(source).name} → {Path(output).name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(result.target)}, {escape(', '.join(dict.fromkeys(each.scheme for each in layers)))} "
        f"by flightquant {escape(__version__)}</p>",
        _cards(result),
        "<h2>Size before and after</h2>",
        _sizes(result),
        "<h2>Signal-to-noise ratio of the layers, dB</h2>",
        _histogram([each.sqnr_db for each in layers if each.sqnr_db is not None and np.isfinite(each.sqnr_db)]),
        "<h2>Layers, the worst first</h2>",
        _layers(layers),
    ]
    if result.kept:
        parts += ["<h2>Kept as they are</h2>", _kept(result.kept)]
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _cards(result: Conversion) -> str:
    weights = sum(each.weights for each in result.layers)
    bits = 8 * sum(each.bytes_out for each in result.layers) / weights if weights else 0
    ratios = [each.sqnr_db for each in result.layers if each.sqnr_db is not None]
    shown = {
        "layers quantized": str(len(result.layers)),
        "weights in them": count(weights),
        "bits a weight": f"{bits:.2f}",
        "dB, the worst layer": f"{min(ratios):.1f}" if ratios else "-",
        "seconds": f"{result.seconds:.2f}",
        "of the size before": f"{result.bytes_out / result.bytes_in:.0%}",
    }
    cards = (f'<div class="card"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in shown.items())
    return f'<div class="cards">{"".join(cards)}</div>'


def _sizes(result: Conversion) -> str:
    largest = max(result.bytes_in, result.bytes_out, 1)
    rows = (("before", result.bytes_in, ' class="was"'), ("after", result.bytes_out, ""))
    bars = (
        f'<span>{label}</span><div{kind} style="width:{nbytes / largest:.1%}"></div><span>{size(nbytes)}</span>'
        for label, nbytes, kind in rows
    )
    return f'<div class="sizes">{"".join(bars)}</div>'


def _histogram(ratios: Sequence[float]) -> str:
    if not ratios:
        return "<p>Not measured.</p>"
    counts, edges = np.histogram(ratios, bins=min(24, max(1, len(set(ratios)))))
    bars = (
        f'<span title="{edges[i]:.2f} to {edges[i + 1]:.2f} dB: {number} layers">{number or ""}'
        f'<div style="height:{10 * number / counts.max():.2f}rem"></div></span>'
        for i, number in enumerate(counts.tolist())
    )
    ticks = "".join(f"<span>{edge:.1f}</span>" for edge in np.linspace(edges[0], edges[-1], 5))
    return f'<div class="bins">{"".join(bars)}</div><div class="ticks">{ticks}</div>'


def _layers(layers: Sequence[LayerResult]) -> str:
    def ratio(each: LayerResult) -> float:
        return each.sqnr_db if each.sqnr_db is not None else float("inf")

    best = max((ratio(each) for each in layers if np.isfinite(ratio(each))), default=1.0) or 1.0
    slowest = max((each.kernel_ns for each in layers), default=1) or 1
    head = "".join(
        f"<th>{name}</th>"
        for name in ("layer", "SQNR dB", "", "cosine", "max error", "scheme", "weights", "before", "after",
                     "kernels ms", "")
    )  # fmt: skip
    rows = []
    for each in sorted(layers, key=ratio):
        measured = each.sqnr_db is not None
        share = min(max(ratio(each) / best, 0), 1) if measured else 0
        cells = (
            _name(each.name),
            f"{each.sqnr_db:.2f}" if each.sqnr_db is not None else "-",
            f'<div class="meter"><div style="width:{share:.1%}"></div></div>',
            f"{each.cosine:.6f}" if each.cosine is not None else "-",
            f"{each.max_abs_error:.3g}" if each.max_abs_error is not None else "-",
            escape(each.scheme),
            count(each.weights),
            size(each.bytes_in),
            size(each.bytes_out),
            f"{each.kernel_ns / 1e6:.2f}",
            f'<div class="meter cost"><div style="width:{each.kernel_ns / slowest:.1%}"></div></div>',
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _kept(kept: dict[str, str]) -> str:
    rows = (f"<tr><td>{_name(name)}</td><td>{escape(why)}</td></tr>" for name, why in kept.items())
    return f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'


def _name(layer: str) -> str:
    """A layer's name, which may be broken behind its dots."""
    return f"<code>{escape(layer).replace('.', '.<wbr>')}</code>"
