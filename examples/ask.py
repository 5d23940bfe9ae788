"""Quantize a data set of layers while it is scanned, and ask its answers: the worst layers, size and cost by class.

Usage: python examples/ask.py FOLDER [SCHEME]; the folder holds Parquet or Arrow files with the contract's columns
``layer_name``, ``weights`` and ``shape``, as ``flightquant`` and ``pyarrow.parquet.write_table`` make them.
"""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from flightquant.compute import expression


def quantize(folder: str, scheme: str) -> pa.Table:
    """Answers without the packed bytes: a few layers are in memory at a time."""
    data = ds.dataset(folder)
    quantized = expression(data.schema, scheme)
    asked = ("status", "sqnr_db", "kernel_ns", "bytes_in", "bytes_out")
    columns = {"layer_name": pc.field("layer_name")}
    scanner = data.scanner(columns={**columns, "q": quantized}, batch_size=8)
    parts = (
        pa.table([part["layer_name"], *(pc.struct_field(part["q"], name) for name in asked)], ["layer_name", *asked])
        for part in scanner.to_batches()
    )
    return pa.concat_tables(parts)


def worst_layers(answers: pa.Table, count: int = 5) -> pa.Table:
    """The layers with the lowest signal-to-noise ratio."""
    return answers.sort_by("sqnr_db").slice(0, count).select(["layer_name", "sqnr_db"])


def by_class(answers: pa.Table) -> pa.Table:
    """Layers, error, bytes and kernel time of each class: the names with their numbers replaced."""
    classes = pc.replace_substring_regex(answers["layer_name"], pattern="[0-9]+", replacement="*")
    sums = [("sqnr_db", "min"), ("bytes_in", "sum"), ("bytes_out", "sum"), ("kernel_ns", "sum"), ("sqnr_db", "count")]
    return (
        answers.append_column("class", classes)
        .group_by("class")
        .aggregate(sums)
        .sort_by([("bytes_out_sum", "descending")])
    )


def cost(classes: pa.Table) -> pa.Table:
    """GB/s of each class: bytes read for a nanosecond in the kernels."""
    speed = pc.divide(pc.cast(classes["bytes_in_sum"], pa.float64()), classes["kernel_ns_sum"])
    return pa.table({"class": classes["class"], "gb_per_s": speed})


def main() -> None:
    """Print the three answers."""
    folder, scheme = sys.argv[1], (sys.argv[2:] or ["int4"])[0]
    answers = quantize(folder, scheme)
    classes = by_class(answers)
    for row in worst_layers(answers).to_pylist():
        print(f"{row['sqnr_db']:6.2f} dB  {row['layer_name']}")
    for row, speed in zip(classes.to_pylist(), cost(classes)["gb_per_s"].to_pylist(), strict=True):
        share = row["bytes_out_sum"] / row["bytes_in_sum"]
        print(f"{row['sqnr_db_count']:4} layers, {share:.3f} of their bytes, {speed:.1f} GB/s: {row['class']}")


if __name__ == "__main__":
    main()
