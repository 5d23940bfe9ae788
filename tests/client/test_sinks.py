"""Outputs: whole or not at all, the same after any crash, readable by those who know nothing of us."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import numpy as official

import flightquant
from flightquant.client import QuantClient
from flightquant.client.convert import Conversion, convert
from flightquant.client.recipes import Recipe
from flightquant.client.sinks import safetensors as sink_module
from flightquant.client.sinks import work as work_module
from flightquant.client.sinks.work import Work
from flightquant.client.sources import open_source
from flightquant.client.stored import open_dequantized
from flightquant.errors import InvalidRequestError, UnavailableError
from flightquant.spec import Command

LOCAL = QuantClient("local")

LAYERS = 6


def weights(columns: int = 256) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    made = {f"model.layers.{i}.up.weight": rng.standard_normal((32, columns)) for i in range(LAYERS)}
    made |= {"model.norm.weight": np.ones(columns), "lm_head.weight": rng.standard_normal((50, columns))}
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in made.items()}


def model(folder: Path, columns: int = 256) -> Path:
    folder.mkdir()
    official.save_file(weights(columns), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "hidden_size": columns}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def run(source: Any, output: Any, stop_after: int | None = None, resume: bool = False, **recipe: Any) -> Conversion:
    def quantize(layers: Any, command: Command) -> Iterator[pa.RecordBatch]:
        for number, name in enumerate(layers):
            if number == stop_after:
                raise UnavailableError("the server was lost")
            yield from LOCAL.stream({name: layers[name]}, **command.options())

    with open_source(source) as opened:
        return convert(opened, output, Recipe.parse({"scheme": "int4", **recipe}), quantize, resume=resume)


def tree(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def test_a_folder_has_all_that_a_loader_needs(tmp_path: Path) -> None:
    result = run(model(tmp_path / "m"), tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {
        "model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 256
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert result.bytes_out == sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]
    stored = official.load_file(tmp_path / "out" / "model.safetensors")
    assert stored["lm_head.weight"].tobytes() == weights()["lm_head.weight"].tobytes()


def test_large_outputs_are_cut_into_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "SHARD_BYTES", 20_000)
    run(model(tmp_path / "m"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    seen = {}
    for file in files:
        stored = official.load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][name] == file for name in stored)
        seen |= stored
    assert set(seen) == set(index["weight_map"])
    run(model(tmp_path / "m2"), tmp_path / "one.safetensors")
    whole = official.load_file(tmp_path / "one.safetensors")
    assert {name: t.tobytes() for name, t in seen.items()} == {name: t.tobytes() for name, t in whole.items()}
    with pytest.raises(InvalidRequestError, match='is quantized already: it has a "'):
        run(tmp_path / "out", tmp_path / "twice")


def test_schemes_side_by_side_name_their_modules(tmp_path: Path) -> None:
    rules = [{"match": "*.layers.1.*", "scheme": "int8"}, {"match": "*.2.up", "scheme": "fp8_e4m3"}]
    run(model(tmp_path / "m"), tmp_path / "out", rules=rules)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert config["format"] == "mixed-precision"
    assert sorted(len(group["targets"]) for group in groups) == [1, 1, LAYERS - 2]
    assert {group["format"] for group in groups} == {"pack-quantized", "naive-quantized"}
    stored = open_source(tmp_path / "out").tensors
    assert stored["model.layers.2.up.weight"].dtype == "F8_E4M3"
    assert stored["model.layers.1.up.weight_packed"].shape == (32, 64)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_hold_the_answers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    result = run(model(tmp_path / "m"), path, scheme="q8_0")
    table = pq.read_table(path) if suffix == "parquet" else pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    names = list(result.kept)
    wanted = flightquant.quantize({n: w for n, w in weights().items() if n not in names}, "q8_0")
    order = pa.compute.sort_indices(table.column("layer_name"))
    other = pa.compute.sort_indices(wanted.column("layer_name"))
    assert table.take(order).drop_columns("kernel_ns").equals(wanted.take(other).drop_columns("kernel_ns"))
    assert len(flightquant.dequantize(table)) == LAYERS


@pytest.mark.parametrize("output", ["out", "out.safetensors", "out.parquet"])
def test_work_that_broke_off_is_gone_on_with(tmp_path: Path, output: str) -> None:
    source = model(tmp_path / "m")
    run(source, tmp_path / output)
    whole = tree(tmp_path / output)
    (tmp_path / "again").mkdir()
    with pytest.raises(UnavailableError) as caught:
        run(source, tmp_path / "again" / output, stop_after=3)
    assert caught.value.__notes__ == ["what is written stays: repeat the command with --resume to go on"]
    assert not (tmp_path / "again" / output).exists()
    result = run(source, tmp_path / "again" / output, resume=True)
    assert result.resumed == 3
    assert len(result.layers) == LAYERS
    assert os.listdir(tmp_path / "again") == [output]
    if output.endswith("parquet"):  # which says how long the kernels took
        paths = (tmp_path / output, tmp_path / "again" / output)
        tables = [pq.read_table(each).drop_columns("kernel_ns") for each in paths]
        assert tables[0].equals(tables[1])
    else:
        assert tree(tmp_path / "again" / output) == whole


def test_work_of_another_kind_is_not_gone_on_with(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    with pytest.raises(UnavailableError):
        run(source, tmp_path / "out", stop_after=2)
    with pytest.raises(InvalidRequestError, match="begun with other options or another source"):
        run(source, tmp_path / "out", resume=True, group_size=64)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(InvalidRequestError, match="begun with other options or another source"):
        run(source, tmp_path / "out", resume=True)
    assert run(source, tmp_path / "out").resumed == 0


def test_a_machine_that_started_anew_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had not reached the disk is lost, whatever the journal says."""
    source = model(tmp_path / "m")
    with pytest.raises(UnavailableError):
        run(source, tmp_path / "out", stop_after=2)
    monkeypatch.setattr("flightquant.client.sinks.work._boot", lambda: "another")
    assert run(source, tmp_path / "out", resume=True).resumed == 0


def test_a_journal_that_was_cut_in_mid_line(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    with pytest.raises(UnavailableError):
        run(source, tmp_path / "out", stop_after=3)
    journal = tmp_path / ".out.flightquant" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert run(source, tmp_path / "out", resume=True).resumed == 2


def test_outputs_that_exist_are_not_overwritten(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    run(source, tmp_path / "out")
    with pytest.raises(InvalidRequestError, match="exists and is not empty"):
        run(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    assert tree(tmp_path / "empty") == tree(tmp_path / "out")


def test_two_at_one_output(tmp_path: Path) -> None:
    source = model(tmp_path / "m")

    def quantize(layers: Any, command: Command) -> Iterator[pa.RecordBatch]:
        with pytest.raises(InvalidRequestError, match="another process is writing"):
            run(source, tmp_path / "out")
        yield from LOCAL.stream(layers, **command.options())

    with open_source(source) as opened:
        convert(opened, tmp_path / "out", Recipe.parse({"scheme": "int4"}), quantize)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "m")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"No space left on device: [0-9]+ bytes are needed, 10 are free"):
        run(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("output", "recipe", "sentence"),
    [
        ("out", {"scheme": "q4_0"}, r"GGUF format .* expected \*.gguf"),
        ("out.gguf", {"scheme": "q4_0"}, r"is no GGUF file, and only such a file has the metadata"),
        ("out.gguf", {"scheme": "int4", "target": "bitsandbytes"}, "expected .*a folder"),
        ("out", {"scheme": "int8", "target": "bitsandbytes"}, "int8 is no scheme of bitsandbytes; expected nf4"),
    ],
)
def test_outputs_that_do_not_fit(tmp_path: Path, output: str, recipe: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        run(model(tmp_path / "m"), tmp_path / output, **recipe)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("after", ["_sync", "rmtree", "close"])
def test_ctrl_c_while_the_output_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    source = model(tmp_path / "m")
    owner: Any = {"_sync": work_module, "rmtree": work_module.shutil, "close": work_module.os}[after]
    real, interrupted = getattr(owner, after), []

    def once(*given: Any, **options: Any) -> Any:
        done = real(*given, **options)
        if (tmp_path / "out").exists() and not interrupted:
            interrupted.append(after)
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as raised:
        patched.setattr(owner, after, once)
        run(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]
    assert not getattr(raised.value, "__notes__", [])
    run(source, tmp_path / "again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_a_gguf_output_takes_the_packing_of_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    made = np.random.default_rng(3).standard_normal((8, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run(tmp_path / "m.gguf", tmp_path / "q.gguf", scheme="mxfp4")
    (tensor,) = gguf.GGUFReader(tmp_path / "q.gguf").tensors
    assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
    wanted = gguf.quants.quantize(made, gguf.GGMLQuantizationType.MXFP4)
    assert tensor.data.tobytes() == wanted.tobytes()


def test_a_bucket(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    source = model(tmp_path / "m")
    run(source, tmp_path / "out")
    run(source, "memory://bucket/out")
    try:
        got = {path.removeprefix("/bucket/out/"): memory.cat(path) for path in memory.find("/bucket/out")}
        wanted = {str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*.*")}
        assert got == wanted
        with pytest.raises(InvalidRequestError, match="memory://bucket/out exists; remove it or choose another"):
            run(source, "memory://bucket/out")
        assert {path.removeprefix("/bucket/out/"): memory.cat(path) for path in memory.find("/bucket/out")} == wanted
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_bucket_that_was_written_in_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    source = model(tmp_path / "m")

    def killed(work: Work, files: list[Path]) -> None:
        memory.pipe("/bucket/out/model.safetensors", b"half")
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Work, "_upload", killed)
            run(source, "memory://bucket/out")
        with pytest.raises(InvalidRequestError, match="exists"):
            run(source, "memory://bucket/out")
        run(source, "memory://bucket/out", resume=True)
        assert memory.size("/bucket/out/model.safetensors") > 4
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_bitsandbytes_names(tmp_path: Path, scheme: str) -> None:
    run(model(tmp_path / "m"), tmp_path / "out", scheme=scheme)
    stored = official.load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.up.weight"
    assert {key.removeprefix(name) for key in stored if key.startswith(name)} == {
        "", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{scheme}"
    }  # fmt: skip
    state = json.loads(stored[f"{name}.quant_state.bitsandbytes__{scheme}"].tobytes())
    assert state == {"quant_type": scheme, "blocksize": 64, "dtype": "bfloat16", "shape": [32, 256]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["llm_int8_skip_modules"]) == (scheme, ["lm_head"])


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_bitsandbytes_names_of_double_quantization(tmp_path: Path, scheme: str) -> None:
    run(model(tmp_path / "m"), tmp_path / "out", scheme=scheme, double_quant=True)
    stored = official.load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.up.weight"
    state = json.loads(stored[f"{name}.quant_state.bitsandbytes__{scheme}"].tobytes())
    offset = state.pop("nested_offset")
    assert state == {
        "quant_type": scheme, "blocksize": 64, "dtype": "bfloat16", "shape": [32, 256], "nested_blocksize": 256,
        "nested_dtype": "float32",
    }  # fmt: skip
    assert np.float32(offset) == offset > 0
    shapes = {key: (array.dtype.name, array.shape) for key, array in stored.items() if key.startswith(f"{name}.")}
    assert shapes[f"{name}.absmax"] == ("uint8", (128,))
    assert shapes[f"{name}.nested_absmax"] == ("float32", (1,))
    assert shapes[f"{name}.nested_quant_map"] == ("float32", (256,))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is True
    again = open_dequantized(str(tmp_path / "out"))
    weights = np.frombuffer(open_source(str(tmp_path / "m")).load(name).data, ml_dtypes.bfloat16).astype(np.float32)
    error = np.frombuffer(again.load(name).data, np.float32) - weights
    assert np.abs(error).max() < np.abs(weights).max() / 4


KILLS = 20


def test_a_killed_command_line_is_gone_on_with(tmp_path: Path) -> None:
    """Killed at random moments, as often as it takes; the output is the same bytes."""
    rng = random.Random(11)
    source = tmp_path / "m"
    source.mkdir()
    made = np.random.default_rng(1).standard_normal((64, 512), np.float32)
    official.save_file({f"layers.{i}.up.weight": made + i for i in range(300)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    command = [sys.executable, "-m", "flightquant.client.cli", "quantize", str(source), "--threads", "2", "-o"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=120)
    seconds = time.monotonic() - started
    wanted = tree(tmp_path / "whole")
    target = tmp_path / "out"
    found: list[int] = []
    journal = tmp_path / ".out.flightquant" / "journal.jsonl"
    for number in range(KILLS):
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, str(target), "--resume"], **quiet)
        if number % 2:
            time.sleep(rng.uniform(0.3, 1.05) * seconds)
        else:  # in the midst of the layers, which take a small part of the time
            before = journal.stat().st_size if journal.exists() else 0
            while process.poll() is None and not (journal.exists() and journal.stat().st_size > before + 1000):
                time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
        if target.exists():
            assert tree(target) == wanted
            for path in sorted(target.rglob("*"), reverse=True):
                path.unlink()
            target.rmdir()
    subprocess.run([*command, str(target), "--resume"], check=True, capture_output=True, timeout=120)
    assert tree(target) == wanted
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    assert any(lines > 1 for lines in found), "no kill came while it worked"


def test_a_disk_that_gives_no_room_is_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    official.save_file({"up.weight": np.ones((256, 512), np.float32)}, source)
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
        "from flightquant.client.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "quantize", str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("flightquant: ")
    assert last.endswith(f"{tmp_path / 'out'}: File too large")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["m.safetensors"]
