"""Schemes as Arrow functions: projections of data sets and Acero plans give the local call's bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import flightquant
from flightquant import compute
from flightquant.compute import RESULT_TYPE
from flightquant.errors import InvalidRequestError
from flightquant.layers import as_layer, layers_batch
from flightquant.schemes import SCHEMES

RNG = np.random.default_rng(8)
LAYERS = {f"layers.{i}.weight": RNG.standard_normal((4, 256), dtype=np.float32) for i in range(10)}
FREE = ("kernel_ns", "bytes_copied")
"""Columns that differ from call to call."""


FLOATS = pa.list_(pa.float32())


def table_of(kind: pa.DataType = FLOATS) -> pa.Table:
    return pa.table(
        {
            "layer_name": list(LAYERS),
            "weights": pa.array([array.reshape(-1) for array in LAYERS.values()], kind),
            "shape": pa.array([list(array.shape) for array in LAYERS.values()], pa.list_(pa.int64())),
        }
    )


def check_answers(got: Any, weights: Any = LAYERS, **options: Any) -> None:
    """The struct column is what the local call says of the same layers."""
    expected = flightquant.quantize(weights, **options)
    column = pa.chunked_array(got) if isinstance(got, pa.Array) else got
    assert column.type == RESULT_TYPE
    for field in RESULT_TYPE:
        if field.name not in FREE:
            values = pc.struct_field(column, field.name).combine_chunks()
            assert values.equals(expected.column(field.name).combine_chunks()), field.name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_a_function(scheme: str) -> None:
    names = compute.register()
    assert names == compute.register()
    assert f"flightquant_{scheme}" in names
    table = table_of().combine_chunks()
    arguments = [table["weights"].chunk(0), table["shape"].chunk(0)]
    check_answers(pc.call_function(f"flightquant_{scheme}", arguments), scheme=scheme)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_dtypes_have_functions_of_their_own(dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, array in LAYERS.items()
    }
    compute.register()
    batch = layers_batch([as_layer(name, array) for name, array in arrays.items()])
    weights = batch["weights"].cast(pa.list_(batch["weights"].type.value_type))
    check_answers(pc.call_function(f"flightquant_int4_{dtype}", [weights, batch["shape"]]), arrays, scheme="int4")
    check_answers(project(ds.dataset(pa.table(batch)), scheme="int4"), arrays, scheme="int4")


def project(data: ds.Dataset, **options: Any) -> pa.ChunkedArray:
    return data.to_table(columns={"q": compute.expression(data.schema, **options)})["q"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 1024),
        pa.list_(pa.field("item", pa.float32(), nullable=False)),
    ],
    ids=str,
)
def test_columns_of_every_list_type_are_taken(kind: pa.DataType) -> None:
    check_answers(project(ds.dataset(table_of(kind)), scheme="int8"), scheme="int8")


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "int4", "group_size": 64, "symmetric": False},
        {"bit_width": 8, "metrics": False},
        {"scheme": "fp8_e4m3", "granularity": "tensor", "scale_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_options_reach_the_kernels(options: dict[str, Any]) -> None:
    check_answers(project(ds.dataset(table_of()), **options), **options)


def test_a_partitioned_data_set_is_quantized_while_it_is_scanned(tmp_path: Path) -> None:
    table = table_of().append_column("part", pa.array([i % 2 for i in range(10)]))
    ds.write_dataset(table, tmp_path, format="parquet", partitioning=["part"], partitioning_flavor="hive")
    data = ds.dataset(tmp_path, partitioning="hive")
    columns = {"layer_name": pc.field("layer_name"), "q": compute.expression(data.schema, "int4")}
    batches = list(data.to_batches(columns=columns, filter=pc.field("part") == 1, batch_size=2))
    assert [batch.num_rows for batch in batches if batch.num_rows] == [2, 2, 1]
    found = pa.Table.from_batches(batches)
    chosen = {name: LAYERS[name] for name in found["layer_name"].to_pylist()}
    assert sorted(chosen) == sorted(list(LAYERS)[1::2])
    check_answers(found["q"], chosen, scheme="int4")


def test_an_acero_plan_quantizes_and_filters_by_the_answer() -> None:
    table = table_of()
    quantized = compute.expression(table.schema, "int4")
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
            acero.Declaration("project", acero.ProjectNodeOptions([pc.field("layer_name"), quantized], ["name", "q"])),
            acero.Declaration("filter", acero.FilterNodeOptions(pc.field("q", "sqnr_db") > 0)),
        ]
    )
    result = plan.to_table()
    assert result["name"].to_pylist() == list(LAYERS)
    check_answers(result["q"], scheme="int4")


def test_without_a_shape_each_layer_is_one_row(tmp_path: Path) -> None:
    table = table_of().select(["layer_name", "weights"])
    flat = {name: array.reshape(-1) for name, array in LAYERS.items()}
    check_answers(project(ds.dataset(table), scheme="int8"), flat, scheme="int8")
    check_answers(project(ds.dataset(table_of()), scheme="int8", shape=None), flat, scheme="int8")


def test_a_bad_layer_is_a_row_that_says_so() -> None:
    arrays = [array.copy() for array in LAYERS.values()]
    arrays[3][0, 5] = np.inf
    table = pa.table({"weights": pa.array([array.reshape(-1) for array in arrays], pa.list_(pa.float32()))})
    column = project(ds.dataset(table), scheme="int4")
    statuses = pc.struct_field(column, "status").to_pylist()
    assert statuses == ["ok"] * 3 + ["non_finite"] + ["ok"] * 6
    assert "weight 5 " in pc.struct_field(column, "error")[3].as_py()


def test_nothing_is_scanned_into_nothing(tmp_path: Path) -> None:
    pq.write_table(table_of().slice(0, 0), tmp_path / "empty.parquet")
    assert len(project(ds.dataset(tmp_path), scheme="int4")) == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scheme": "int99"}, "unknown scheme"),
        ({"scheme": "q8_0", "group_size": 64}, "group_size"),
        ({"scheme": "int4", "weights": "w"}, '"w" is missing'),
        ({"scheme": "int4", "weights": "layer_name"}, "expected list"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_scan(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        compute.expression(table_of().schema, **options)


def test_the_example_asks_a_folder(tmp_path: Path) -> None:
    pq.write_table(table_of(), tmp_path / "layers.parquet", row_group_size=3)
    example = Path(__file__).parents[2] / "examples" / "ask.py"
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    *worst, by_class = done.stdout.splitlines()
    expected = flightquant.quantize(LAYERS, "int4").sort_by("sqnr_db")["layer_name"].to_pylist()[:5]
    assert [line.split()[-1] for line in worst] == expected
    assert re.fullmatch(r" +10 layers, 0\.133 of their bytes, [0-9.]+ GB/s: layers\.\*\.weight", by_class)
