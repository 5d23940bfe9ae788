"""Batches that break Arrow's own rules, as streams that a reader lets through.

``python tests/fq_hostile.py`` gives each to the engine and prints one JSON line a case: the error's code and text, or
each row's status. In a process of its own, so that a crash is one failed test.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pyarrow as pa
from fq_ipc import DICTIONARY_BATCH, crafted, locate, read_first, serialized
from fq_testing import check_row, reference_layer, request, same_bits

from flightquant import reference
from flightquant.cython_core.engine import Engine, Limits
from flightquant.cython_core.restore import QuantizedSession
from flightquant.errors import FlightquantError
from flightquant.spec import Command

ROWS, SIZE = 3, 64
WEIGHTS = np.random.default_rng(2).standard_normal((ROWS, SIZE)).astype(np.float32)
COMMAND = Command.build(scheme="int4", group_size=32)
LAYERS = {name: WEIGHTS[i] for i, name in enumerate(("aaa", "bbb", "ccc"))}
COLUMNS = {
    "scheme": pa.array(["int4"] * 3),
    "group_size": pa.array([32] * 3, pa.int64()),
    "symmetric": pa.array([True] * 3),
    "row_offset": pa.array([0] * 3),
    "global_amax": pa.array([1.0] * 3, pa.float32()),
    "x_note": pa.array(["xxx"] * 3),
    "x_list": pa.array([[1, 2, 3]] * 3, pa.list_(pa.int8())),
}
PLAIN = request(LAYERS, columns=COLUMNS)
LARGE = request(LAYERS, kind="large_list", columns={**COLUMNS, "layer_name": pa.array(list(LAYERS), pa.large_utf8())})
FIXED = request(LAYERS, kind="fixed_size_list", columns=COLUMNS)
NAMED = request(LAYERS, columns={"layer_name": pa.array(list(LAYERS)).cast(pa.dictionary(pa.int8(), pa.utf8()))})
BATCHES = {"list": PLAIN, "large_list": LARGE, "fixed_size_list": FIXED, "dictionary": NAMED}


QUANTIZED_COLUMNS = (
    *("layer_name", "shape", "status", "scheme", "packing", "bit_width", "group_size"),
    *("quantized_data", "scales", "zero_points", "x_note"),
)
WIDE = ("quantized_data", "scales", "zero_points")


def _quantized() -> dict[str, pa.RecordBatch]:
    command = Command.build(scheme="int4", group_size=32, symmetric=False)
    sent = request(LAYERS, columns={"x_note": COLUMNS["x_note"]})
    answer = Engine(n_threads=1).session(sent.schema, command).quantize(sent).batch.select(QUANTIZED_COLUMNS)
    large = answer
    for name in WIDE:
        kind = pa.large_binary() if name == "quantized_data" else pa.large_list(pa.float32())
        large = large.set_column(large.schema.names.index(name), name, large.column(name).cast(kind))
    return {"quantized": answer, "quantized-large": large}


QUANTIZED = _quantized()


def integers(kind: str, *values: int) -> bytes:
    return np.array(values, np.int64 if kind == "large_list" else np.int32).tobytes()


def offset_cases(unit: int) -> dict[str, tuple[int, int, int, int]]:
    """Four offsets of three lists of ``unit`` values that are wrong in one way."""
    good = (0, unit, 2 * unit, 3 * unit)
    return {
        "last offset 10^6": (*good[:3], 10**6),
        "last offset 2^31-1": (*good[:3], 2**31 - 1),
        "last offset one too far": (*good[:3], 3 * unit + 1),
        "first offset negative": (-4, *good[1:]),
        "all offsets negative": (-4, -3, -2, -1),
        "middle offset out of order": (0, 2 * unit, unit, 3 * unit),
        "middle offset out of bounds": (0, 2**30, 2 * unit, 3 * unit),
        "middle offset negative": (0, -(2**31), 2 * unit, 3 * unit),
        "offsets fall": good[::-1],
    }


def cases() -> dict[str, bytes]:
    """Every case's stream."""
    made = {f"{kind}: good": crafted(batch) for kind, batch in BATCHES.items()}
    for kind in ("list", "large_list"):
        batch = BATCHES[kind]
        for column, unit in (("weights", SIZE), ("shape", 1), ("layer_name", 3)):
            width = "large_list" if kind == "large_list" and column != "shape" else "list"
            for label, offsets in offset_cases(unit).items():
                contents = {f"{column}.offsets": integers(width, *offsets)}
                made[f"{kind}: {column}: {label}"] = crafted(batch, contents=contents)
    for column, unit in (("x_note", 3), ("x_list", 3), ("scheme", 4)):
        for label, offsets in offset_cases(unit).items():
            contents = {f"{column}.offsets": integers("list", *offsets)}
            made[f"{column}: {label}"] = crafted(PLAIN, contents=contents)
    huge = integers("large_list", 0, 2**61, 2**62, 2**62)
    wrap = integers("large_list", 0, SIZE, 2**63 - 1, -(2**63))
    for column in ("weights", "layer_name"):
        made[f"{column}: offsets at 2^62"] = crafted(LARGE, contents={f"{column}.offsets": huge})
        made[f"{column}: offsets overflow"] = crafted(LARGE, contents={f"{column}.offsets": wrap})
    for kind, batch in BATCHES.items():
        made |= _sizes_and_lengths(kind, batch)
    for text in (b"\xff\xfe\xfd", b"a\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80"):
        for column in ("layer_name", "scheme", "x_note"):
            made[f"{column}: not UTF-8 {text!r}"] = crafted(PLAIN, contents={f"{column}.values": text})
        made[f"dictionary: not UTF-8 {text!r}"] = crafted(
            NAMED, contents={"dictionary.values": text}, message=DICTIONARY_BATCH
        )
    for index in (3, -1, 127, -128):
        contents = {"layer_name.values": np.array([0, index, 1], np.int8).tobytes()}
        made[f"dictionary: index {index}"] = crafted(NAMED, contents=contents)
    for label, offsets in offset_cases(3).items():
        contents = {"dictionary.offsets": integers("list", *offsets)}
        made[f"dictionary: {label}"] = crafted(NAMED, contents=contents, message=DICTIONARY_BATCH)
    return made | _row_counts() | _quantized_cases()


def _quantized_cases() -> dict[str, bytes]:
    """The same of quantized rows that come back."""
    made = {}
    for kind, batch in QUANTIZED.items():
        made[f"{kind}: good"] = crafted(batch)
        wide = kind.endswith("large")
        units = {"layer_name": 3, "shape": 2, "quantized_data": 32, "scales": 2, "zero_points": 2, "scheme": 4}
        for column, unit in (units | {"packing": 8, "x_note": 3}).items():
            width = "large_list" if wide and column in WIDE else "list"
            for label, offsets in offset_cases(unit).items():
                contents = {f"{column}.offsets": integers(width, *offsets)}
                made[f"{kind}: {column}: {label}"] = crafted(batch, contents=contents)
        for part in ("quantized_data.values", "scales.item.values", "zero_points.item.values", "shape.item.values"):
            for size in (0, 1, 4, 8, 12):
                if size < len(batch) * units[part.split(".")[0]] * (1 if "data" in part else 4):
                    made[f"{kind}: {part} of {size} bytes"] = crafted(batch, sizes={part: size})
        for name in ("quantized_data", "scales", "zero_points", "shape"):
            made[f"{kind}: {name}.offsets of 0 bytes"] = crafted(batch, sizes={f"{name}.offsets": 0})
            for count in (1, 5, 100, -7, -(2**63)):
                made[f"{kind}: {name}: {count} nulls without a bitmap"] = crafted(batch, nulls={name: count})
        for name in ("scales.item", "zero_points.item"):
            for length in (10**9, 2**62, 0, -1):
                made[f"{kind}: {name} of length {length}"] = crafted(batch, lengths={name: length})
            for count in (1, 5, 1000, -7):
                made[f"{kind}: {name}: {count} nulls without a bitmap"] = crafted(batch, nulls={name: count})
        for text in (b"\xff\xfe\xfd", b"a\xc3\x28"):
            for column in ("scheme", "packing", "layer_name"):
                changed = crafted(batch, contents={f"{column}.values": text})
                made[f"{kind}: {column}: not UTF-8 {text!r}"] = changed
        for count in (2**62, 65_537, 0, -1):
            every = dict.fromkeys(batch.schema.names, count)
            made[f"{count} rows in every column ({kind})"] = crafted(batch, rows=count, lengths=every)
    return made


def _sizes_and_lengths(kind: str, batch: pa.RecordBatch) -> dict[str, bytes]:
    """Every buffer of too few bytes, every child of another length, every null count without a bitmap."""
    made = {}
    names = [name for name in batch.schema.names if name in ("layer_name", "weights", "shape", *COLUMNS)]
    buffers = {
        "list": ("offsets", "item.values"),
        "large_list": ("offsets", "item.values"),
        "fixed_size_list": ("item.values",),
        "dictionary": ("offsets", "item.values"),
    }
    for part in buffers[kind]:
        for size in (0, 1, 4, 8, 12):
            made[f"{kind}: weights.{part} of {size} bytes"] = crafted(batch, sizes={f"weights.{part}": size})
    for length in (10**9, 2**62, 2**63 - 1, ROWS * SIZE - 1, 0, -1):
        made[f"{kind}: child length {length}"] = crafted(batch, lengths={"weights.item": length})
    for name in names:
        for count in (1, 5, 100, -7, -(2**63)):
            made[f"{kind}: {name}: {count} nulls without a bitmap"] = crafted(batch, nulls={name: count})
    for count in (1, 5, 192, 1000, -7):
        made[f"{kind}: weights.item: {count} nulls without a bitmap"] = crafted(batch, nulls={"weights.item": count})
        made[f"{kind}: shape.item: {count} nulls without a bitmap"] = crafted(batch, nulls={"shape.item": count})
    for name in names:
        last = "values" if pa.types.is_dictionary(batch.schema.field(name).type) else None
        for part in (last,) if last else ("offsets", "values"):
            if f"{name}.{part}" in _buffer_names(batch):
                for size in (0,) if name == "symmetric" else (0, 1, 2):
                    made[f"{kind}: {name}.{part} of {size} bytes"] = crafted(batch, sizes={f"{name}.{part}": size})
    return made


def _buffer_names(batch: pa.RecordBatch) -> set[str]:
    return set(locate(serialized(batch), batch.schema).buffers)


def _row_counts() -> dict[str, bytes]:
    """Very many rows that take no bytes."""
    made = {}
    zero = pa.record_batch(
        [pa.array([""]), pa.array([[]], pa.list_(pa.float32(), 0)), pa.nulls(1)], ["layer_name", "weights", "x_null"]
    )
    for count in (2**62, 2**40, 65_537, 0, -1):
        lengths = dict.fromkeys(zero.schema.names, count)
        made[f"{count} rows of zero-width columns"] = crafted(zero, rows=count, lengths=lengths)
        every = dict.fromkeys(PLAIN.schema.names, count)
        made[f"{count} rows in every column"] = crafted(PLAIN, rows=count, lengths=every)
    return made


def outcome(engine: Engine, stream: bytes) -> dict[str, Any]:
    """The error's code and text, or each row's status; every ``ok`` row has been compared with the reference."""
    batch = read_first(stream)
    try:
        if "quantized_data" in batch.schema.names:
            return restored(engine, batch)
        answers = engine.session(batch.schema, COMMAND).quantize(batch).batch
    except FlightquantError as error:
        return {"code": error.code, "text": error.wire_message()}
    statuses = answers.column("status").to_pylist()
    for i, status in enumerate(statuses):
        if status == "ok":
            weights = batch.column("weights")[i].values.to_numpy()
            check_row(answers, i, reference_layer(weights, "float32", COMMAND))
    return {"statuses": statuses}


def restored(engine: Engine, batch: pa.RecordBatch) -> dict[str, Any]:
    """Each row's status after ``op: dequantize``; every ``ok`` row has been compared with the reference."""
    command = Command.build(op="dequantize")
    answers = QuantizedSession(engine, batch.schema, command, Limits()).answer(batch).batch
    statuses = answers.column("status").to_pylist()
    for i, status in enumerate(statuses):
        if status == "ok":
            (weights,) = reference.dequantize(batch.slice(i, 1)).values()
            same_bits(answers.column("weights")[i].values.to_numpy(), weights.reshape(-1), "weights")
    return {"statuses": statuses}


def main() -> None:
    """Run every case; a line before each, so that a crash names its case."""
    engine = Engine(n_threads=2)
    for name, stream in cases().items():
        sys.stdout.write(json.dumps({"case": name}) + "\n")
        sys.stdout.flush()
        try:
            result = outcome(engine, stream)
        except BaseException as error:
            result = {"untyped": repr(error)[:300]}
        sys.stdout.write(json.dumps({"case": name, **result}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
