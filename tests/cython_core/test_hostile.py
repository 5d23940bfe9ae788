"""Batches that no honest writer makes: each is a typed error or the exact answer, never a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fq_fuzz
import fq_hostile
import pytest

TESTS = Path(__file__).parents[1]
CASES = fq_hostile.cases()
MUTATIONS = int(os.environ.get("FLIGHTQUANT_FUZZ", "0"))
"""Mutations of each weight type; a long run sets it to 100000."""


def expected_of(case: str) -> dict[str, Any]:
    if case.endswith(": good"):
        return {"statuses": ["ok"] * 3}
    count = case.split(" rows")[0]
    return {"code": "too_large" if count.isdecimal() and int(count) > 65_536 else "invalid_request"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    done = subprocess.run([sys.executable, TESTS / "fq_hostile.py"], capture_output=True, text=True, timeout=240)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died in {lines[-1] if lines else 'no case'}: {done.stderr[-2000:]}"
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_breaks_arrows_rules_is_a_typed_error(outcomes: dict[str, dict[str, Any]], case: str) -> None:
    got = outcomes[case]
    expected = expected_of(case)
    assert {key: got.get(key) for key in expected} == expected, got
    if "code" in expected:
        assert got["text"].startswith(f"{got['code']}: ")
        assert "pyarrow" not in got["text"].lower()


def fuzz(kind: str, count: int, seed: int, at: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    at.write_bytes(bytes(8))
    command = [sys.executable, str(TESTS / "fq_fuzz.py"), kind, str(count), str(seed), *flags]
    environment = {**os.environ, "FLIGHTQUANT_FUZZ_AT": str(at)}
    if flags:
        # What a sanitizer finds in the control is no finding: it goes to the child's own standard error.
        environment |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=250 + count / 20, env=environment)


@pytest.mark.timeout(0 if MUTATIONS else 300)
@pytest.mark.parametrize("kind", [*fq_fuzz.TYPES, *fq_fuzz.QUANTIZED, *fq_fuzz.AMAX])
def test_mutated_batches_are_refused_or_answered_exactly(kind: str, tmp_path: Path) -> None:
    count = MUTATIONS or 150
    done = fuzz(kind, count, 20261121, tmp_path / "at")
    number = int.from_bytes((tmp_path / "at").read_bytes(), "little")
    assert done.returncode == 0, f"{kind}: mutation {number} (seed 20261121): {done.returncode} {done.stderr[-3000:]}"
    totals = json.loads(done.stdout)
    assert totals["tried"] == count
    assert totals["refused"] > count // 50
    assert totals["rows_ok"] > count // 4


def test_the_fuzzer_bites_when_nothing_is_checked(tmp_path: Path) -> None:
    """The control: with the checks off, the unchanged batch still passes and the mutated ones do not."""
    honest = fuzz("float32-list", 1, 1, tmp_path / "at", "--unchecked")
    assert honest.returncode == 0, honest.stderr[-2000:]
    assert fuzz("float32-list", 2000, 1, tmp_path / "at", "--unchecked").returncode != 0
