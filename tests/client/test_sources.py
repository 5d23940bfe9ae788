"""Every way in which people hold weights gives the same layers, and what is wrong is told in one sentence."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from safetensors import numpy as official

import flightquant
from flightquant.client.sources import open_source, place
from flightquant.errors import InvalidRequestError, UnavailableError
from flightquant.layers import as_layer, layers_batch

RNG = np.random.default_rng(5)
WEIGHTS = {
    "model.layers.0.up.weight": RNG.standard_normal((8, 128)).astype(ml_dtypes.bfloat16),
    "model.layers.1.up.weight": RNG.standard_normal((4, 256)).astype(ml_dtypes.bfloat16),
    "model.layers.10.up.weight": RNG.standard_normal((2, 128)).astype(ml_dtypes.bfloat16),
    "model.norm.weight": np.ones(128, ml_dtypes.bfloat16),
}


def table(rows_per_batch: int = 2, dtype: Any = ml_dtypes.bfloat16) -> pa.Table:
    layers = [as_layer(name, weights.astype(dtype)) for name, weights in WEIGHTS.items()]
    return pa.Table.from_batches(
        [layers_batch(layers[i : i + rows_per_batch]) for i in range(0, len(layers), rows_per_batch)]
    )


def sharded(folder: Path, index: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    names = list(WEIGHTS)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, members in shards.items():
        official.save_file({name: WEIGHTS[name] for name in members}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("")
    return folder


def file_of(tmp_path: Path) -> Path:
    official.save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def parquet(tmp_path: Path) -> Path:
    pq.write_table(table(), tmp_path / "m.parquet", row_group_size=3)
    return tmp_path / "m.parquet"


def arrow(tmp_path: Path) -> Path:
    feather.write_feather(table(), str(tmp_path / "m.arrow"), compression="uncompressed")
    return tmp_path / "m.arrow"


def dataset_folder(tmp_path: Path, kind: str = "parquet") -> Path:
    part = pa.array([name.split(".")[-2] for name in WEIGHTS])
    ds.write_dataset(
        table(4).append_column("x_part", part), tmp_path / "data", format=kind,
        partitioning=ds.partitioning(pa.schema([("x_part", pa.utf8())]), flavor="hive"),
    )  # fmt: skip
    return tmp_path / "data"


def by_layer(tmp_path: Path) -> Path:
    """Partitioned by the layer's name, so that no file has it as a column."""
    ds.write_dataset(
        table(4), tmp_path / "data", format="parquet",
        partitioning=ds.partitioning(pa.schema([("layer_name", pa.utf8())]), flavor="hive"),
    )  # fmt: skip
    return tmp_path / "data"


class Stream:
    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return table().__arrow_c_stream__(requested_schema)


class Module:
    def state_dict(self) -> dict[str, Any]:
        return WEIGHTS


HOLDERS: dict[str, Callable[[Path], Any]] = {
    "file": file_of,
    "file as text": lambda path: str(file_of(path)),
    "file URI": lambda path: f"file://{file_of(path)}",
    "folder": lambda path: sharded(path / "model"),
    "mapping": lambda _: WEIGHTS,
    "module": lambda _: Module(),
    "table": lambda _: table(),
    "batch": lambda _: table().combine_chunks().to_batches()[0],
    "reader": lambda _: table().to_reader(),
    "stream": lambda _: Stream(),
    "parquet": parquet,
    "arrow": arrow,
    "dataset": lambda path: ds.dataset(dataset_folder(path)),
    "filtered dataset": lambda path: ds.dataset(dataset_folder(path)).filter(ds.field("layer_name") != "none"),
    "folder of parquet": dataset_folder,
    "folder of arrow": lambda path: dataset_folder(path, "ipc"),
    "partitioned by layer": by_layer,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_same_layers(tmp_path: Path, holder: str) -> None:
    with open_source(HOLDERS[holder](tmp_path)) as source:
        assert set(source.tensors) == set(WEIGHTS)
        for name, meta in source.tensors.items():
            assert (meta.dtype, meta.shape) == ("BF16", WEIGHTS[name].shape)
        read = {tensor.name: bytes(tensor.data) for tensor in source.read()}
        assert list(read) == list(source.tensors)
        assert read == {name: WEIGHTS[name].tobytes() for name in read}
        for name in reversed(list(source)):  # against the order, too
            layer = source[name]
            assert (layer.dtype, layer.shape) == ("bfloat16", WEIGHTS[name].shape)
            assert layer.data.tobytes() == WEIGHTS[name].tobytes()
        assert json.dumps(source.fingerprint())
        only = [layer.name for layer in source.layers(["model.norm.weight", "model.layers.1.up.weight"])]
        assert sorted(only) == ["model.layers.1.up.weight", "model.norm.weight"]


def test_a_source_is_a_mapping_that_can_be_quantized(tmp_path: Path) -> None:
    answers = flightquant.quantize(open_source(parquet(tmp_path)), "int8")
    again = flightquant.quantize(WEIGHTS, "int8")
    assert answers.drop_columns(["kernel_ns"]).equals(again.drop_columns(["kernel_ns"]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_dtypes_of_tables(tmp_path: Path, dtype: Any) -> None:
    pq.write_table(table(dtype=dtype), tmp_path / "m.parquet")
    for layer in open_source(tmp_path / "m.parquet").layers():
        assert layer.data.tobytes() == WEIGHTS[layer.name].astype(dtype).tobytes()


def test_a_table_without_shapes_has_vectors(tmp_path: Path) -> None:
    pq.write_table(table().drop_columns("shape"), tmp_path / "m.parquet")
    assert [meta.shape for meta in open_source(tmp_path / "m.parquet").tensors.values()] == [
        (w.size,) for w in WEIGHTS.values()
    ]


def test_torch_tensors_of_every_kind() -> None:
    torch = pytest.importorskip("torch")
    state = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "half": torch.ones(3, dtype=torch.float16),
        "ids": torch.arange(3),
        "scalar": torch.tensor(2.0),
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
        "mask": torch.tensor([True, False]),
    }
    source = open_source(state)
    assert list(source) == ["a", "half", "scalar"]
    assert source["a"].data.view(ml_dtypes.bfloat16).tolist() == [0, 3, 1, 4, 2, 5]
    assert [meta.dtype for meta in source.tensors.values()] == ["BF16", "F16", "I64", "F32", "F8_E4M3", "BOOL"]
    assert {t.name: bytes(t.data) for t in source.read()}["ids"] == np.arange(3).tobytes()
    assert bytes(source.load("scalar").data) == np.float32(2).tobytes()
    with pytest.raises(InvalidRequestError, match=r'"eight" has dtype F8_E4M3; expected F32, F16'):
        source.load("eight").layer()


def test_a_folder_tells_what_lies_beside(tmp_path: Path) -> None:
    source = open_source(sharded(tmp_path / "model"))
    assert set(source.companions) == {"config.json", "1_Pooling/config.json"}  # type: ignore[attr-defined]
    assert [len(names) for names in source.shards] == [2, 2]  # type: ignore[attr-defined]
    assert source.metadata == {"format": "pt"}


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    assert set(open_source(folder)) == set(WEIGHTS)
    official.save_file({"model.norm.weight": np.ones(3)}, folder / "other.safetensors")
    with pytest.raises(InvalidRequestError, match=r'"model.norm.weight" stands in two files'):
        open_source(folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../other.safetensors"},
        {"a": "/etc/x.safetensors"},
        {"a": "model.bin"},
        {"a": 3},
        {},
        [],
    ],
    ids=str,
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, weight_map: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is no index; expected"):
        open_source(sharded(tmp_path / "model", {"weight_map": weight_map}))


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    with pytest.raises(InvalidRequestError, match=f'index names tensor "none", which {first} does not hold'):
        open_source(sharded(tmp_path / "a", {"weight_map": {"none": first}}))
    with pytest.raises(FileNotFoundError):
        open_source(sharded(tmp_path / "b", {"weight_map": {"none": "gone.safetensors"}}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.rename_columns(["layer_name", "values", "shape"]), 'has no column "weights"'),
        (lambda t: t.rename_columns(["layer_name", "quantized_data", "shape"]), "holds quantized layers already"),
        (lambda t: pa.concat_tables([t, t]), "stands twice"),
        (lambda t: t.set_column(0, "layer_name", pa.array([None] * 4, pa.utf8())), "a layer has no name"),
        (lambda t: t.set_column(2, "shape", pa.array([[8, 127]] * 4)), "has 1024 weights; expected 1016"),
        (lambda t: t.set_column(2, "shape", pa.array([[-1]] * 4)), r"has the shape \[-1\]"),
        (lambda t: t.set_column(2, "shape", pa.array([[2**62] * 999] * 4)), r"has the shape \[4611686018427387904"),
        (lambda t: t.set_column(2, "shape", pa.array([["a"]] * 4)), r"has the shape \["),
        (
            lambda t: t.set_column(
                1, pa.field("weights", pa.list_(pa.float32())), pa.array([[1, None]] * 4, pa.list_(pa.float32()))
            ),
            "has null weights",
        ),
    ],
)
def test_tables_that_are_not_right(tmp_path: Path, change: Any, sentence: str) -> None:
    pq.write_table(change(table()), tmp_path / "m.parquet")
    with pytest.raises(InvalidRequestError, match=sentence):
        list(open_source(tmp_path / "m.parquet").layers())


@pytest.mark.parametrize(("at", "bad"), [(0, -(1 << 30)), (1, 1 << 30), (2, 1 << 30), (2, 1)])
@pytest.mark.parametrize("offsets", [(0, 3, 6), (0, 2, 4), (0, 8, 16)], ids=["names", "shapes", "weights"])
def test_an_arrow_file_whose_offsets_lead_elsewhere(
    tmp_path: Path, offsets: tuple[int, ...], at: int, bad: int
) -> None:
    """Without a check of each batch this reads other memory of the process, or ends it."""
    lists = pa.array([[0.5] * 8] * 2, pa.list_(pa.float32()))
    good = pa.table({"layer_name": ["one", "two"], "weights": lists, "shape": [[2, 4]] * 2})
    feather.write_feather(good, tmp_path / "m.arrow", compression="uncompressed")
    written = (tmp_path / "m.arrow").read_bytes()
    assert len(list(open_source(tmp_path / "m.arrow").layers())) == 2
    sent = np.array(offsets, np.int32)
    changed = sent.copy()
    changed[at] = bad
    assert written.count(sent.tobytes()) == 1
    (tmp_path / "m.arrow").write_bytes(written.replace(sent.tobytes(), changed.tobytes()))
    with pytest.raises(InvalidRequestError, match="the rows cannot be read"):
        list(open_source(tmp_path / "m.arrow").layers())


def test_names_that_are_no_text(tmp_path: Path) -> None:
    nothing = pa.table({"layer_name": pa.nulls(4), "weights": table()["weights"]})
    feather.write_feather(nothing, tmp_path / "m.arrow")
    with pytest.raises(InvalidRequestError, match="layer_name is null"):
        open_source(tmp_path / "m.arrow")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([_text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60)], "header has 1152921504606846976 values"),
        ([_text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 20)], "ends behind the end"),
        ([_text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 20)], "cut short"),
        ([_text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000], "a value of type 9"),
        ([_text(b"a") + struct.pack("<IQ", 8, 1 << 63)], "cut short|ends behind"),
        ([_text(b"a") + struct.pack("<II", 99, 1)], "a value of type 99"),
        ([_text(b"general.architecture") + struct.pack("<I", 8) + _text(b"\xff\x80")], "utf-8"),
        ([struct.pack("<Q", 1 << 63)], "cut short"),
    ],
)
def test_a_gguf_header_that_announces_what_is_not_there(tmp_path: Path, pairs: list[bytes], sentence: str) -> None:
    """The package gguf would make objects for all of it, until memory ends."""
    pytest.importorskip("gguf")
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs))
    (tmp_path / "m.gguf").write_bytes(header + b"".join(pairs) + b"\0" * 8)
    with pytest.raises(InvalidRequestError, match=f"m.gguf is no good GGUF file: .*({sentence})"):
        open_source(tmp_path / "m.gguf")


def test_a_gguf_header_of_more_tensors_than_bytes(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 20, 0) + b"\0" * 64)
    with pytest.raises(InvalidRequestError, match="ends behind the end"):
        open_source(tmp_path / "m.gguf")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequestError, match="neither"):
        open_source(tmp_path / "empty")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02 pickle")
    with pytest.raises(InvalidRequestError, match="is a pickle"):
        open_source(tmp_path / "model.bin")
    (tmp_path / "x").write_bytes(b"PAR1 but nothing more")
    with pytest.raises(InvalidRequestError, match="no good parquet file"):
        open_source(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"ARROW1 but nothing more")
    with pytest.raises(InvalidRequestError, match=r"no good (ipc|Arrow) file"):
        open_source(tmp_path / "x")
    for wrong in (3, None, ["a"]):
        with pytest.raises(InvalidRequestError, match="expected a mapping"):
            open_source(wrong)
    with pytest.raises(InvalidRequestError, match="cannot open nothing://key"):
        open_source("nothing://secret@key/x")


@pytest.fixture
def memory() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_a_bucket_by_fsspec(tmp_path: Path, memory: str) -> None:
    import fsspec

    folder = sharded(tmp_path / "model")
    fsspec.filesystem("memory").put(str(folder), "/bucket/model", recursive=True)
    with open_source(f"{memory}/model") as source:
        assert {t.name: bytes(t.data) for t in source.read()} == {n: w.tobytes() for n, w in WEIGHTS.items()}
    assert set(open_source(f"{memory}/model/model-00001-of-00002.safetensors")) == set(list(WEIGHTS)[:2])
    fsspec.filesystem("memory").put(str(parquet(tmp_path)), "/bucket/m.parquet")
    fsspec.filesystem("memory").put(str(arrow(tmp_path)), "/bucket/m.arrow")
    for name in ("m.parquet", "m.arrow"):
        assert {la.name: la.data.tobytes() for la in open_source(f"{memory}/{name}").layers()} == {
            n: w.tobytes() for n, w in WEIGHTS.items()
        }
    with pytest.raises(FileNotFoundError):
        open_source(f"{memory}/none")


def test_a_bucket_that_nobody_serves() -> None:
    with pytest.raises((UnavailableError, InvalidRequestError), match="cannot") as caught:
        open_source("s3://key:secret@bucket/m?endpoint_override=127.0.0.1:1&scheme=http&region=x&connect_timeout=1")
    assert "secret" not in str(caught.value)


def test_a_place_keeps_what_was_asked_for(tmp_path: Path) -> None:
    assert place(tmp_path).local == tmp_path
    assert place(f"file://{tmp_path}").local == tmp_path
    assert place(tmp_path).child("a/b").local == tmp_path / "a" / "b"


MEASURE = """
import resource, sys
from flightquant.client.sources import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_source(sys.argv[1]) as source:
    total = sum(int(layer.data[::1024].size) for layer in source.layers())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["safetensors", "parquet", "arrow"])
def test_memory_is_one_layers_not_the_models(tmp_path: Path, kind: str) -> None:
    layers = {f"l.{i}": np.full((4096, 1024), i, np.float32) for i in range(16)}  # 16 MiB each
    path = tmp_path / f"m.{kind}"
    if kind == "safetensors":
        official.save_file(layers, path)
    else:
        batches = [layers_batch([as_layer(name, weights)]) for name, weights in layers.items()]
        if kind == "parquet":
            with pq.ParquetWriter(path, batches[0].schema) as writer:
                writer.write_table(pa.Table.from_batches(batches), row_group_size=16)
        else:
            feather.write_feather(pa.Table.from_batches(batches), str(path), compression="uncompressed")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    total, grown = map(int, done.stdout.split())
    assert total == 16 * 4096
    assert grown < 150 << 10, f"{grown} KiB for a model of 256 MiB"
