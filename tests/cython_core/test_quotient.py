"""The shortcut that replaces the kernels' divisions, proven for every divisor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flightquant.cython_core import available_isas


@pytest.mark.skipif("avx2" not in available_isas(), reason="without fused multiply-add the kernels divide")
def test_one_correction_gives_the_code_of_a_division_for_every_divisor(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler, "the package was built with a C compiler"
    program = tmp_path / "proof"
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    source = Path(__file__).with_name("quotient_proof.c")
    subprocess.run([compiler, *flags, str(source), "-o", str(program), "-lm"], check=True)
    cases, wrong, uncorrected = map(int, subprocess.run([program], check=True, capture_output=True).stdout.split())
    assert cases == (1 << 23) * 128 * 5
    assert wrong == 0
    # The same dividends do tell a quotient without the correction from a division.
    assert uncorrected > 1_000_000
