"""The command line as people use it: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as official

from flightquant import __version__
from flightquant.client.cli import main
from flightquant.server.app import running_server

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The console script in this process: what it prints on standard output and on standard error."""

    def call(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["flightquant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert left.value.code == code, out + err
        assert "Traceback" not in err
        return out, err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(31)
    tensors = {f"layers.{i}.up.weight": rng.standard_normal((96, 256), np.float32) for i in (0, 2, 10)}
    tensors |= {"norm.weight": np.ones(256, np.float32), "embed.weight": rng.standard_normal((9, 256), np.float32)}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    official.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with running_server() as server:
        yield server.location


def test_quantize_writes_a_file_and_tells_what_it_did(run: Run, model: Path, tmp_path: Path) -> None:
    out, err = run("quantize", model, "-o", tmp_path / "out.safetensors")
    assert "layers.*.up" in out
    assert "kept as they are: 2 tensors" in out
    assert "GB/s" in out
    assert "295 kB of 295 kB" in err
    stored = official.load_file(tmp_path / "out.safetensors")
    assert stored["layers.10.up.weight_packed"].shape == (96, 32)
    assert stored["layers.10.up.weight_scale"].shape == (96, 2)


def test_errors_that_nobody_wants_to_know_are_not_measured(run: Run, model: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    out, _ = run("quantize", model, "-o", tmp_path / "a.safetensors", "--no-quality", "--json", "--report", page)
    assert {each["sqnr_db"] for each in json.loads(out)["layers"]} == {None}
    assert "Not measured." in page.read_text()
    run("quantize", model, "-o", tmp_path / "b.safetensors", "--no-quality")
    run("quantize", model, "-o", tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--scheme", "int8"],
        ["--group-size", "32", "--asymmetric", "--scale-dtype", "float16"],
        ["--granularity", "tensor", "--keep", "layers.2.*"],
    ],
    ids=str,
)
def test_a_server_gives_the_same_file(run: Run, model: Path, tmp_path: Path, uri: str, options: list[str]) -> None:
    run("quantize", model, "-o", tmp_path / "local.safetensors", *options)
    run("quantize", model, "-o", tmp_path / "served.safetensors", *options, "--server", uri, "--timeout", "60")
    assert (tmp_path / "local.safetensors").read_bytes() == (tmp_path / "served.safetensors").read_bytes()


def test_options_reach_the_file(run: Run, model: Path, tmp_path: Path) -> None:
    options = ["--scheme", "int8", "--granularity", "group", "--group-size", "64", "--asymmetric", "--keep", "*.0.up"]
    run("quantize", model, "-o", tmp_path / "out.safetensors", *options, "--threads", "1")
    shown, _ = run("inspect", tmp_path / "out.safetensors")
    config = json.loads(shown.split("metadata quantization_config: ")[1])
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (8, 64, False)
    assert "layers.0.up" in config["ignore"]


def test_inspect_shows_every_tensor_in_its_order(run: Run, model: Path, tmp_path: Path) -> None:
    run("quantize", model, "-o", tmp_path / "out.safetensors")
    lines = run("inspect", tmp_path / "out.safetensors")[0].splitlines()
    names = [line.split()[0] for line in lines[1:6]]
    assert names == ["embed.weight", "layers.0.up.weight", "layers.2.up.weight", "layers.10.up.weight", "norm.weight"]
    packed = next(line for line in lines if line.startswith("layers.2.up.weight"))
    for cell in ("int4 g128 sym", "96x256", "4.26", "13.1 kB", "F32"):
        assert cell in packed
    assert any(line.startswith("3 quantized weights: 73.7 k weights") for line in lines)


@pytest.mark.parametrize(
    ("scheme", "cells"),
    [
        ("nvfp4", ("nvfp4 g16", "4.50", "F8_E4M3")),
        ("mxfp4", ("mxfp4 g32", "4.25", "U8")),
        ("mxfp8", ("mxfp8 g32", "8.25", "U8")),
        ("fp8_e4m3", ("fp8_e4m3 channel", "8.12", "F32")),
        ("nf4", ("nf4 g64", "F32")),
    ],
)
def test_inspect_knows_every_layout(run: Run, model: Path, tmp_path: Path, scheme: str, cells: tuple[str, ...]) -> None:
    run("quantize", model, "-o", tmp_path / "out.safetensors", "--scheme", scheme)
    lines = run("inspect", tmp_path / "out.safetensors")[0].splitlines()
    packed = next(line for line in lines if line.startswith("layers.2.up.weight"))
    for cell in ("96x256", " .. ", *cells):
        assert cell in packed, packed
    assert any(line.startswith("3 quantized weights: 73.7 k weights") for line in lines)


def test_inspect_shows_what_does_not_fit(run: Run, tmp_path: Path) -> None:
    official.save_file({"x.weight_packed": np.zeros((4, 4), np.int32)}, tmp_path / "odd.safetensors")
    shown, _ = run("inspect", tmp_path / "odd.safetensors")
    assert "x.weight_packed  I32" in shown
    assert '"x.weight_shape" of odd.safetensors is missing' in shown


def test_inspect_reads_files_of_others(run: Run, model: Path) -> None:
    shown, _ = run("inspect", model)
    assert "5 other tensors" in shown
    assert "quantized" not in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scheme", "q4_0"], "q4_0 is a GGUF format"),
        (["--group-size", "7"], '"group_size" is 7'),
        (["--keep", "nothing_like_it"], 'no tensor fits the pattern "nothing_like_it"'),
        (["--server", "grpc://127.0.0.1:1"], "check the address, and that the server runs"),
        (["--server", "nonsense"], 'cannot use the address "nonsense"'),
    ],
)
def test_mistakes_are_one_sentence(run: Run, model: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    _, err = run("quantize", model, "-o", tmp_path / "out.safetensors", *arguments, code=1)
    last = err.splitlines()[-1]
    assert last.startswith("flightquant: ")
    assert sentence in last
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_there_or_not_right(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a model, but long enough")
    missing = f"flightquant: {tmp_path}/none: No such file or directory\n"
    assert run("inspect", tmp_path / "none", code=1) == ("", missing)
    assert "text is no safetensors file" in run("inspect", tmp_path / "text", code=1)[1]
    assert "neither *.safetensors nor" in run("inspect", tmp_path, code=1)[1]


def test_wrong_usage_is_exit_code_2(run: Run, model: Path) -> None:
    assert "--output" in run("quantize", model, code=2)[1]
    assert "int4" in run("quantize", model, "-o", "x", "--scheme", "int9", code=2)[1]


def test_version_and_help(run: Run) -> None:
    assert run("--version")[0].strip() == f"flightquant {__version__}"
    overview = run("--help")[0]
    assert all(command in overview for command in ("quantize", "inspect", "serve"))
    shown = run("quantize", "--help")[0]
    assert "Examples" in shown
    assert "--server" in shown


def test_serve_has_its_own_options(run: Run) -> None:
    assert "--metrics-port" in run("serve", "--help")[0]
    assert "--no-such-option" in run("serve", "--no-such-option", code=2)[1]


@pytest.mark.parametrize(("missing", "command", "extra"), [("typer", "--help", "cli"), ("grpc", "serve", "server")])
def test_a_missing_extra_is_named(tmp_path: Path, missing: str, command: str, extra: str) -> None:
    blocked = f"raise ModuleNotFoundError(name={missing!r})"
    (tmp_path / f"{missing}.py").write_text(blocked)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from flightquant.client.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        f'flightquant: this command needs the package {missing}; install it with: pip install "flightquant[{extra}]"\n'
    )


def test_the_command_line_loads_neither_server_nor_extension() -> None:
    code = (
        "import sys; sys.argv = ['flightquant', '--version']\n"
        "from flightquant.client.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith(('flightquant.server', 'flightquant.cython_core', 'grpc'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
