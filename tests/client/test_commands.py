"""The other commands, and what people do wrong: one sentence that helps, the right exit code, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import numpy as official

import flightquant
from flightquant.client.cli.quantize import build_recipe
from flightquant.client.convert import plan_of, read_importance
from flightquant.client.recipes import PRESETS, Recipe, available_presets
from flightquant.client.sources import open_source
from flightquant.client.stored import open_dequantized
from flightquant.describe import describe
from flightquant.errors import InvalidRequestError
from flightquant.schemes import SCHEMES
from flightquant.server.app import running_server


def flightquant_(*arguments: Any, code: int = 0, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flightquant.client.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "140", **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    folder.mkdir()
    official.save_file(weights(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    made = {f"layers.{i}.up.weight": rng.standard_normal((37, 256)).astype(ml_dtypes.bfloat16) for i in range(3)}
    return made | {"norm.weight": np.ones(256, ml_dtypes.bfloat16), "ids": np.arange(3)}


@pytest.mark.parametrize(
    "options",
    [
        ["--scheme", "int4"],
        ["--scheme", "int3", "--asymmetric", "--group-size", "64"],
        ["--scheme", "int8"],
        ["--scheme", "int8", "--asymmetric"],
        ["--scheme", "int5", "--granularity", "tensor", "--asymmetric"],
        ["--scheme", "fp8_e4m3"],
        ["--scheme", "fp8_e4m3", "--granularity", "tensor"],
        ["--scheme", "nf4"],
        ["--scheme", "fp4", "--group-size", "128"],
    ],
    ids=" ".join,
)
def test_files_are_read_back(model: Path, tmp_path: Path, options: list[str]) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q", *options)
    keys = {"--scheme": "scheme", "--group-size": "group_size", "--granularity": "granularity"}
    given: dict[str, Any] = {keys[k]: int(v) if v.isdigit() else v for k, v in pairwise(options) if k in keys}
    given |= {"symmetric": False} if "--asymmetric" in options else {}
    layers = {name: array for name, array in weights().items() if ".up." in name}
    wanted = flightquant.dequantize(flightquant.quantize(layers, **given))
    with open_dequantized(str(tmp_path / "q")) as source:
        assert set(source.tensors) == set(weights())
        for name, array in wanted.items():
            np.testing.assert_array_equal(source[name].data.reshape(array.shape), array)
        assert source.load("ids").meta.dtype == "I64"


def test_tables_are_read_back(model: Path, tmp_path: Path) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q.parquet", "--scheme", "q8_0")
    out, _ = flightquant_("verify", model, tmp_path / "q.parquet", "--min-sqnr", "30", "--json")
    told = json.loads(out)
    assert told["passed"]
    assert {row["layer"] for row in told["layers"]} == {f"layers.{i}.up.weight" for i in range(3)}


def test_tables_are_inspected(model: Path, tmp_path: Path) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q.parquet", "--scheme", "q8_0")
    shown = flightquant_("inspect", tmp_path / "q.parquet")[0]
    assert "layers.2.up.weight  q8_0 g32  37x256    8.50" in shown
    assert "3 quantized layers: 28.4 k weights in 30.2 kB" in shown
    told = json.loads(flightquant_("inspect", tmp_path / "q.parquet", "--json")[0])["layers"]
    assert [(row["layer_name"], row["shape"], row["nbytes"]) for row in told] == [
        (f"layers.{i}.up.weight", [37, 256], 37 * 8 * 34) for i in range(3)
    ]


ROWS = {
    'layer "x" of t.parquet has the shape None': {"layer_name": ["x"], "shape": pa.array([None], pa.list_(pa.int64()))},
    'in t.parquet layer "x" stands twice': {"layer_name": ["x", "x"], "shape": [[1, 2], [1, 2]]},
    "in t.parquet a row has no layer name": {"layer_name": pa.array([None], pa.utf8()), "shape": [[1, 2]]},
    "t.parquet has no column 'shape'": {"layer_name": ["x"]},
}


@pytest.mark.parametrize("sentence", ROWS)
def test_tables_that_no_call_gave_are_told(tmp_path: Path, sentence: str) -> None:
    columns = ROWS[sentence]
    pq.write_table(pa.table({**columns, "quantized_data": [b"1"] * len(columns["layer_name"])}), tmp_path / "t.parquet")
    with pytest.raises(InvalidRequestError) as raised:
        open_dequantized(str(tmp_path / "t.parquet"))
    assert sentence in raised.value.message


def test_no_keys_of_a_uri_are_shown(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    out, err = flightquant_("quantize", model, "-o", "memory://me:secret@b/out", "--report", tmp_path / "r.html")
    assert "memory://b/out: " in out
    assert "secret" not in out + err + (tmp_path / "r.html").read_text()


def test_json_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    official.save_file({"a.weight": np.zeros((2, 128), np.float32)}, tmp_path / "zeros.safetensors")
    for words in (("quantize", tmp_path / "zeros.safetensors", "-o", tmp_path / "q"),
                  ("verify", tmp_path / "zeros.safetensors", tmp_path / "q")):  # fmt: skip
        told = flightquant_(*words, "--json")[0]
        (layer,) = json.loads(told, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["layers"]
        assert (layer["sqnr_db"], layer["max_abs_error"]) == (None, 0.0)


@pytest.mark.parametrize("kind", ["npz", "safetensors", "gguf"])
def test_importance_comes_from_a_file(model: Path, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(9)
    counts = {f"layers.{i}.up.weight": (rng.standard_normal(256) ** 2).astype(np.float32) for i in (0, 2)}
    path = tmp_path / f"counts.{kind}"
    if kind == "npz":
        np.savez(path, **counts)
    elif kind == "safetensors":
        official.save_file(counts, path)
    else:
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(path, "imatrix")
        for name, vector in counts.items():
            writer.add_tensor(f"{name}.in_sum2", (vector * 4).reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.array([[4.0]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with open_source(str(model)) as source:
        plan = plan_of(source, tmp_path / "q.parquet", build_recipe(None, None, {"scheme": "iq4_nl"}, []))
        read = read_importance(str(path), plan)
    assert {name: vector.tolist() for name, vector in read.items()} == {k: v.tolist() for k, v in counts.items()}
    flightquant_("quantize", model, "-o", tmp_path / "q.parquet", "--scheme", "iq4_nl", "--importance", path)
    layers = {name: array for name, array in weights().items() if ".up." in name}
    wanted = flightquant.quantize(layers, "iq4_nl", importance=counts)
    assert wanted.column("quantized_data") != flightquant.quantize(layers, "iq4_nl").column("quantized_data")
    got = pq.read_table(tmp_path / "q.parquet", columns=["layer_name", "quantized_data"]).to_pylist()
    data = wanted.column("quantized_data").to_pylist()
    assert got == [{"layer_name": name, "quantized_data": each} for name, each in zip(layers, data, strict=True)]


def test_importance_comes_from_a_recipe(model: Path, tmp_path: Path) -> None:
    """A file for all layers or for those of a pattern, beside the recipe."""
    rng = np.random.default_rng(10)
    layers = {name: array for name, array in weights().items() if ".up." in name}
    counts = {name: (rng.standard_normal(256) ** 2).astype(np.float32) for name in layers}
    np.savez(tmp_path / "a.npz", **counts)
    recipe = tmp_path / "recipe.json"
    chosen = {name: vector for name, vector in counts.items() if ".2." not in name}
    for key, used in (("a.npz", counts), ({"*.0.*": "a.npz", "*.1.up": str(tmp_path / "a.npz")}, chosen)):
        recipe.write_text(json.dumps({"scheme": "iq4_nl", "importance": key}))
        output = tmp_path / f"{len(used)}.parquet"
        flightquant_("quantize", model, "-o", output, "--recipe", recipe)
        wanted = flightquant.quantize(layers, "iq4_nl", importance=used)
        got = pq.read_table(output, columns=["quantized_data"])
        assert got.column("quantized_data").to_pylist() == wanted.column("quantized_data").to_pylist()
    recipe.write_text(json.dumps({"scheme": "iq4_nl", "importance": ["a.npz"]}))
    asked = ("quantize", model, "-o", tmp_path / "q.parquet", "--recipe", recipe)
    assert "a file for each pattern" in flightquant_(*asked, code=1)[1]
    with pytest.raises(InvalidRequestError, match="importance"):  # a server's caller names no files there
        Recipe.parse({"scheme": "iq4_nl", "importance": "a.npz"})


def test_importance_that_does_nothing_is_an_error(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.ones(256))
    asked = ["quantize", model, "-o", tmp_path / "q.parquet", "--importance", tmp_path / "a.npz", "--scheme"]
    assert "no effect" in flightquant_(*asked, "int4", code=1)[1]
    assert "layers.0.up.weight" in flightquant_(*asked, "iq4_nl", code=1)[1]
    (tmp_path / "a.npz").write_bytes(b"PK")
    assert "no good npz" in flightquant_(*asked, "iq4_nl", code=1)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize_writes_a_plain_model(model: Path, tmp_path: Path, dtype: str) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q")
    out, _ = flightquant_("dequantize", tmp_path / "q", "-o", tmp_path / "plain", "--dtype", dtype)
    assert f"3 weights dequantized to {dtype}" in out
    stored = official.load_file(tmp_path / "plain" / "model.safetensors")
    assert set(stored) == set(weights())
    assert stored["layers.0.up.weight"].dtype.name == dtype
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"model_type": "none"}
    with open_dequantized(str(tmp_path / "q")) as source:
        values = source["layers.0.up.weight"].data.reshape(37, 256)
    np.testing.assert_array_equal(stored["layers.0.up.weight"], values.astype(stored["layers.0.up.weight"].dtype))


@pytest.mark.parametrize("scheme", ["int4", "nvfp4", "nf4"])
def test_verify_says_what_the_weights_written_out_say(model: Path, tmp_path: Path, scheme: str) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q", "--scheme", scheme)
    flightquant_("dequantize", tmp_path / "q", "-o", tmp_path / "plain")
    packed, plain = (
        json.loads(flightquant_("verify", model, tmp_path / twin, "--json")[0])["layers"] for twin in ("q", "plain")
    )
    assert [row["layer"] for row in packed] == [row["layer"] for row in plain]
    for mine, other in zip(packed, plain, strict=True):
        assert (mine["problem"], mine["max_abs_error"]) == ("", other["max_abs_error"])
        assert mine["sqnr_db"] == pytest.approx(other["sqnr_db"], abs=1e-4)
        assert mine["cosine"] == pytest.approx(other["cosine"], abs=1e-6)


def test_verify_passes_and_fails(model: Path, tmp_path: Path) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q", "--scheme", "int8", "--keep", "layers.2.*")
    out, _ = flightquant_("verify", model, tmp_path / "q", "--min-sqnr", "30", "--min-cosine", "0.999")
    assert "3 layers pass (1 of them are the same), 0 do not" in out
    out, _ = flightquant_("verify", model, tmp_path / "q", "--min-sqnr", "60", code=3)
    assert "SQNR under 60 dB" in out
    told = json.loads(flightquant_("verify", model, tmp_path / "q", "--max-error", "1e-6", "--json", code=3)[0])
    assert [row["problem"] for row in told["layers"]] == ["error over 1e-06", "error over 1e-06", ""]
    official.save_file({"layers.0.up.weight": np.ones((37, 255), np.float32)}, tmp_path / "other.safetensors")
    told = json.loads(flightquant_("verify", model, tmp_path / "q", "--json")[0])
    assert told["passed"]
    err = flightquant_("verify", model, tmp_path / "other.safetensors", code=1)[1]
    assert "have no layer in common" in err


def test_ping(tmp_path: Path) -> None:
    with running_server() as server:
        assert "answers in" in flightquant_("ping", server.location)[0]
        assert "milliseconds" in json.loads(flightquant_("ping", server.location, "--json")[0])
    err = flightquant_("ping", "grpc://127.0.0.1:1", "--timeout", "1", code=1)[1]
    assert err.startswith("flightquant: ")
    assert err.count("\n") == 1


def test_a_server_is_asked_for_every_option_of_a_recipe(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"scheme": "arrowquant", "bit_width": 2, "group_size": 64}))
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    flightquant_("quantize", model, "-o", here, "--recipe", recipe)
    with running_server() as server:
        flightquant_("quantize", model, "-o", there, "--recipe", recipe, "--server", server.location)
    tables = [pq.read_table(path).drop_columns(["kernel_ns", "bytes_copied"]) for path in (here, there)]
    assert tables[0].equals(tables[1])


def test_calibration_is_an_option(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.parquet"
    flightquant_("quantize", model, "-o", out, "--scheme", "int4", "--calibration", "mse")
    with open_source(str(model)) as source:
        layers = {layer.name: layer for layer in source.layers() if len(layer.shape) == 2 and layer.dtype == "bfloat16"}
        wanted = flightquant.quantize(layers, "int4", calibration="mse")
    columns = ["layer_name", "quantized_data", "scales"]
    assert pq.read_table(out, columns=columns).equals(wanted.select(columns))


def test_a_scheme_on_the_command_line_leaves_a_presets_options_behind() -> None:
    assert build_recipe("qlora-nf4", None, {}, []).command.packing == "bnb-nested"
    assert build_recipe("qlora-nf4", None, {"scheme": "fp4"}, []).command.packing is None


def test_a_dry_run_tells_the_very_sizes(model: Path, tmp_path: Path) -> None:
    arguments = ("quantize", model, "-o", tmp_path / "q", "--scheme", "int4", "--json")
    plan = json.loads(flightquant_(*arguments, "--dry-run")[0])
    assert not (tmp_path / "q").exists()
    done = json.loads(flightquant_(*arguments)[0])
    assert {layer["name"]: layer["bytes_out"] for layer in done["layers"]} == {
        name: layer["bytes_out"] for name, layer in plan["layers"].items()
    }
    assert plan["kept"] == done["kept"]
    assert plan["kernel_seconds"] > 0
    assert "nothing was done" in flightquant_(*arguments[:-1], "--keep", "*.0.up", "--dry-run")[0]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.classes: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href") and value]
        self.classes += [value for key, value in attrs if key == "class" and value]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_report_is_one_page(model: Path, tmp_path: Path) -> None:
    flightquant_("quantize", model, "-o", tmp_path / "q", "--report", tmp_path / "report.html")
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.links == []
    assert "script" not in page.tags
    assert {"sizes", "bins"} <= set(page.classes)
    for name in weights():
        assert name in page.words


def test_schemes_lists_all(tmp_path: Path) -> None:
    told = json.loads(flightquant_("schemes", "--json")[0])
    assert told["schemes"] == describe()
    assert list(told["presets"]) == list(available_presets())
    shown = flightquant_("schemes")[0]
    assert all(scheme["name"] in shown and packing in shown for scheme in describe() for packing in scheme["packings"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell: str) -> None:
    variables = {"bash": {"COMP_WORDS": "flightquant quantize --preset ", "COMP_CWORD": "3"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "flightquant quantize --preset ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    code = "import sys; sys.argv[0] = 'flightquant'; from flightquant.client.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "_FLIGHTQUANT_COMPLETE": f"complete_{shell}", **variables},
    )  # fmt: skip
    for name in available_presets():
        assert name in done.stdout, done.stdout + done.stderr


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "missing file": (["quantize", "none", "-o", "out"], 1, "none: No such file or directory"),
    "no output": (["quantize", "MODEL"], 2, "Missing option '--output'"),
    "unknown scheme": (
        ["quantize", "MODEL", "-o", "out", "--scheme", "int9"],
        2,
        '"int9" is none; expected one of int8',
    ),
    "unknown preset": (["quantize", "MODEL", "-o", "out", "--preset", "x"], 2, "expected one of vllm-w4a16"),
    "unknown option": (["quantize", "MODEL", "-o", "out", "--sceme", "int4"], 2, "No such option"),
    "unknown command": (["quantise"], 2, "No such command"),
    "no recipe": (["quantize", "MODEL", "-o", "out", "--recipe", "none.yaml"], 1, "none.yaml: No such file"),
    "wrong recipe": (["quantize", "MODEL", "-o", "out", "--recipe", "BAD"], 1, 'unknown key "shceme" in the recipe'),
    "wrong group": (["quantize", "MODEL", "-o", "out", "--group-size", "7"], 1, '"group_size" is 7'),
    "wrong place": (["quantize", "MODEL", "-o", "no/such/folder/out"], 1, "no/such/folder/out: No such file"),
    "no permission": (["quantize", "MODEL", "-o", "/proc/out"], 1, "/proc/out: "),
    "a file of its own": (["quantize", "MODEL", "-o", "MODEL"], 1, "exists and is not empty"),
    "a pickle": (["quantize", "PICKLE", "-o", "out"], 1, "is a pickle"),
    "no server": (["ping", "grpc://127.0.0.1:1", "--timeout", "1"], 1, "server was lost or cannot be reached"),
    "no address": (["ping", "nonsense"], 1, 'cannot use the address "nonsense"'),
    "no bucket": (["inspect", "nothing://x/y"], 1, "cannot open nothing://x/y"),
    "nan": (["quantize", "NAN", "-o", "out"], 1, '--keep "a.weight" leaves it as it is'),
    "gguf from safetensors": (["quantize", "MODEL", "-o", "x.gguf", "--scheme", "q8_0"], 1, "convert_hf_to_gguf.py"),
    "no room": (["quantize", "MODEL", "-o", "FULL"], 1, "No space left on device"),
    "a file that is there": (["quantize", "MODEL", "-o", "NAN"], 1, "nan.safetensors exists; remove it"),
    "no path": (["quantize", "MODEL", "-o", ""], 1, "the path is empty"),
    "a number for patterns": (["quantize", "MODEL", "-o", "out", "--recipe", "KEEP"], 1, '"keep" in the recipe is 3'),
    "rules alone": (["quantize", "MODEL", "-o", "out", "--recipe", "RULES"], 1, 'the recipe has no "scheme"'),
    "too many threads": (["quantize", "MODEL", "-o", "out", "--threads", "99999"], 2, "'--threads'"),
    "no npz": (["quantize", "MODEL", "-o", "out", "--importance", "NPZ", "--calibration", "mse"], 1, "no zip archive"),
    "no importance": (
        ["quantize", "MODEL", "-o", "out", "--importance", "x.npz", "--calibration", "mse"],
        1,
        "x.npz: No such file or directory",
    ),
    "no place for the report": (["quantize", "MODEL", "-o", "out", "--report", "no/r.html"], 1, "no/r.html: No such"),
    "weights into a GGUF": (
        ["dequantize", "MODEL", "-o", "out.gguf"],
        1,
        "into a folder or *.safetensors; the output is",
    ),
    "a shard is missing": (["quantize", "SHARDS", "-o", "out"], 1, "shards/gone.safetensors: No such file"),
    "Ctrl-C": (["quantize", "MODEL", "-o", "out", "--threads", "5"], 130, "interrupted; what is written stays"),
    "no memory": (["quantize", "MODEL", "-o", "out", "--threads", "3"], 1, "there is not enough memory"),
    "no thread": (["quantize", "MODEL", "-o", "out", "--threads", "4"], 1, "the system starts no more threads"),
}


BROKEN = {
    "no room": "shutil.disk_usage = lambda path: type('', (), {'free': 10})\n",
    "no memory": "import pyarrow as pa\nfrom flightquant.client.cli import quantize\n"
    "def convert(*arguments, **options): raise pa.ArrowMemoryError('malloc of size 64 failed')\n"
    "quantize.convert = convert\n",
    "Ctrl-C": "from flightquant.client.cli import quantize\n"
    "def convert(*arguments, **options):\n"
    "    error = KeyboardInterrupt()\n"
    "    error.add_note('what is written stays')\n"
    "    raise error\n"
    "quantize.convert = convert\n",
    "no thread": "import threading\nfrom flightquant.client.cli import quantize\n"
    'def start(thread): raise RuntimeError("can\'t start new thread")\n'
    "threading.Thread.start = start\n",
}
"""What the system lacks in some of these."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(model: Path, tmp_path: Path, mistake: str) -> None:
    arguments, code, sentence = MISTAKES[mistake]
    (tmp_path / "bad.yaml").write_text("shceme: int4\n")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02")
    official.save_file({"a.weight": np.full((2, 128), np.nan, np.float32)}, tmp_path / "nan.safetensors")
    (tmp_path / "keep.yaml").write_text("scheme: int4\nkeep: 3\n")
    (tmp_path / "rules.yaml").write_text('rules: [{match: "*", scheme: int4}]\n')
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    before = sorted(os.listdir(tmp_path))
    names = {"MODEL": model, "BAD": tmp_path / "bad.yaml", "PICKLE": tmp_path / "model.bin",
             "NAN": tmp_path / "nan.safetensors", "FULL": tmp_path / "full", "KEEP": tmp_path / "keep.yaml",
             "RULES": tmp_path / "rules.yaml", "NPZ": tmp_path / "junk.npz", "SHARDS": tmp_path / "shards"}  # fmt: skip
    program = "import sys, shutil; from flightquant.client.cli import main\n"
    program += BROKEN.get(mistake, "")
    done = subprocess.run(
        [sys.executable, "-c", program + "main()", *(str(names.get(each, each)) for each in arguments)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("flightquant: ")
    assert sentence in last
    assert sorted(os.listdir(tmp_path)) == before


def test_presets_are_those_whose_schemes_are_there() -> None:
    assert set(available_presets()) == {name for name, keys in PRESETS.items() if keys["scheme"] in SCHEMES}
    assert {"vllm-w4a16", "vllm-fp8", "qlora-nf4", "edge", "local", "cloud"} <= set(available_presets())


@pytest.mark.parametrize("preset", [name for name in available_presets() if not name.startswith("gguf")])
def test_every_preset_makes_a_folder(model: Path, tmp_path: Path, preset: str) -> None:
    told = json.loads(flightquant_("quantize", model, "-o", tmp_path / "out", "--preset", preset, "--json")[0])
    assert len(told["layers"]) == 3
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
