"""``flightquant bench``: it measures, prints and writes; what the figures are is no test's matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flightquant.benchmarks import kernels, restoring, tables
from flightquant.benchmarks.cli import app
from flightquant.benchmarks.harness import weights
from flightquant.benchmarks.kernels import cases
from flightquant.cython_core.engine import Engine
from flightquant.schemes import SCHEMES
from flightquant.spec import Command

INT4 = ("int4", *(f"int4 {which}" for which in ("group 32", "zero points", "gptq", "awq", "onnx", "fbgemm")))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_kernels_are_measured_against_reading(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "roofline.png"
    small = ("--scheme", "int4", "--scheme", "q8_0", "--size", "64x1024", "--threads", "1", "--dtype", "bfloat16")
    options = ("--dtype", "float32", "--rounds", "1", "--json", str(figures), "--plot", str(plot))
    printed = run("kernels", "--op", "schemes", *small, *options)
    found = json.loads(figures.read_text())
    assert {(row["case"], row["metrics"], row["dtype"]) for row in found["schemes"]} == {
        (case, metrics, dtype)
        for case in (*INT4, "q8_0")
        for metrics in ("off", "on")
        for dtype in ("float32", "bfloat16")
    }
    for row in found["schemes"]:
        assert row["share"] == pytest.approx(row["gb_s"] / row["read"]["gb_s"])
        assert 0 < row["min"] <= row["gb_s"] <= row["max"]
        assert row["case"] in printed
    assert set(found["in_cache"]) == {row["case"] for row in found["schemes"]}
    assert found["machine"]["cpu"] in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_schemes_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = tables.marks("schemes")
    page.write_text(f"# Before\n\n{begin}\nold\n{end}\n\nAfter\n")
    small = ("--scheme", "q8_0", "--scheme", "nf4", "--size", "64x1024", "--rounds", "1", "--table", str(page))
    for _ in range(2):
        run("kernels", "--op", "schemes", *small)
    lines = page.read_text().splitlines()
    assert lines[:3] == ["# Before", "", begin]
    assert lines[-4:] == ["", end, "", "After"]
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == [
        *("", "reading alone", "q8_0", "nf4", "nf4 bnb-nested")
    ]
    assert {line.count("|") for line in lines if line.startswith("|")} == {6}
    page.write_text("no marks")
    result = CliRunner().invoke(app, ["kernels", "--table", str(page)])
    assert (result.exit_code, page.read_text()) == (2, "no marks")


def test_the_way_back_is_measured_against_writing(tmp_path: Path) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text("\n".join([*tables.marks("dequantize"), ""]))
    small = ("--scheme", "int4", "--scheme", "q6_k", "--size", "64x1024", "--threads", "1", "--rounds", "1")
    printed = run("kernels", "--op", "dequantize", *small, "--json", str(figures), "--table", str(page))
    found = json.loads(figures.read_text())
    cases_ = (*INT4, "q6_k")
    assert [(row["operation"], row["case"]) for row in found["dequantize"]] == [
        (operation, case) for operation in ("float32", "float16", "verify") for case in cases_
    ]
    for row in found["dequantize"]:
        assert row["share"] == pytest.approx(row["gb_s"] / row["roof"]["gb_s"])
        assert row["call"]["gb_s"] <= row["max"]
        assert row["case"] in printed
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines] == ["", "writing alone, or reading to verify", *cases_]
    assert {line.count("|") for line in lines} == {5}
    assert "schemes" not in found


def test_every_scheme_has_its_way_back_measured() -> None:
    """Also that each answer is taken back whole: a row that is refused would be fast."""
    layer, engine = weights((32, 1024)), Engine(1)
    for case, answer in restoring.answers(cases(), layer).items():
        assert answer.column("status").to_pylist() == ["ok"], case
        for operation, options in restoring.OPERATIONS.items():
            back = restoring.bound(engine, layer, answer, options)
            (row,) = back().batch.to_pylist()
            assert row["status"] == "ok", (case, operation)
            assert row["sqnr_db"] > 3 if operation == "verify" else len(row["weights"]) == layer.data.size


def test_a_table_of_other_libraries_grows_piece_by_piece(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    first, last = tables.marks("peers")
    page.write_text(f"{first}\n{last}\n")

    def row(case: str, times: float) -> dict[str, object]:
        rates = {"theirs": {"gb_s": 0.0123}, "ours": {"gb_s": 12.345}}
        return {"case": case, "peer": "ggml", "threads": 2, **rates, "times": times}

    for measured in ([row("q4_0", 3), row("q5_0", 4)], [row("nf4", 1)], [row("q4_0", 5)]):
        tables.write(page, {"peers": measured}, 2, "a machine")
    lines = page.read_text().splitlines()
    assert lines[2].startswith("`flightquant bench kernels --peers --rounds 2`, GB/s of ")
    assert lines[2].endswith(". a machine")
    assert lines[6:-2] == [
        f"| {case} | ggml | 2 | 0.0123 | 12.3 | {times} |"
        for case, times in (("q5_0", 4.0), ("nf4", 1.0), ("q4_0", 5.0))
    ]


def test_reductions_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.SIZES, "4.2M", (1, (256, 1024)))
    measured = kernels.reductions
    monkeypatch.setattr(kernels, "reductions", lambda threads, rounds, largest: measured(threads, rounds, 1 << 19))
    figures = tmp_path / "figures.json"
    printed = run("kernels", "--op", "reductions", "--threads", "1", "--rounds", "1", "--json", str(figures))
    found = json.loads(figures.read_text())["reductions"]
    assert [row["case"] for row in found] == list(kernels.REDUCTIONS)
    assert all(row["case"] in printed and row["share"] > 0 for row in found)


def test_every_scheme_is_a_case() -> None:
    chosen = cases()
    assert {options["scheme"] for options in chosen.values()} == set(SCHEMES)
    for options in chosen.values():
        Command.build(**options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--scheme", "int9"), "unknown scheme int9; expected one of int8, "),
        (("--size", "64"), "--size 64; expected ROWSxCOLS, such as 4096x4096"),
        (("--size", "0x5"), "--size 0x5; expected ROWSxCOLS"),
    ],
)
def test_a_wrong_option_is_said_in_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.replace("│", " ").split())
