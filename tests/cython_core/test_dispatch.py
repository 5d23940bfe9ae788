"""Which instruction set runs, and how the environment chooses one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from fq_testing import request

from flightquant.cython_core import active_isa, available_isas
from flightquant.cython_core.engine import Engine
from flightquant.errors import InvalidRequestError
from flightquant.spec import Command

SHOW = "from flightquant.cython_core import active_isa; from flightquant.cython_core.engine import Engine; "
SHOW += "assert Engine(1).isa == active_isa(); print(active_isa())"


def python_with(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLIGHTQUANT_ISA": isa}
    return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, env=environment, timeout=120)


def test_the_best_one_is_active_unless_the_environment_says_otherwise() -> None:
    assert available_isas()[-1] == "baseline"
    assert set(available_isas()) <= {"baseline", "avx2", "avx512", "neon"}
    assert active_isa() == os.environ.get("FLIGHTQUANT_ISA", available_isas()[0])


@pytest.mark.parametrize("isa", available_isas())
def test_the_environment_forces_one(isa: str) -> None:
    done = python_with(isa)
    assert (done.returncode, done.stdout.strip()) == (0, isa), done.stderr


@pytest.mark.parametrize("isa", ["avx3", "", "AVX2", "neon" if "avx2" in available_isas() else "avx512"])
def test_an_unknown_one_is_an_error(isa: str) -> None:
    done = python_with(isa)
    assert done.returncode != 0
    assert "FLIGHTQUANT_ISA" in done.stderr
    assert "baseline" in done.stderr


@pytest.mark.parametrize("n_threads", [0, -1])
def test_a_thread_count_below_one_is_refused(n_threads: int) -> None:
    with pytest.raises(InvalidRequestError, match="n_threads"):
        Engine(n_threads=n_threads)


def test_threads_default_to_the_cpus_that_the_process_may_use() -> None:
    assert 1 <= Engine().n_threads <= len(os.sched_getaffinity(0))


def test_an_engine_of_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="avx3"):
        Engine(isa="avx3")


def test_an_engine_works_in_a_forked_child() -> None:
    code = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np, flightquant
weights = {"w": np.ones((4096, 128), np.float32)}
flightquant.quantize(weights, "int4")
child = os.fork()
if child == 0:
    ok = flightquant.quantize(weights, "int4").column("status").to_pylist() == ["ok"]
    os._exit(0 if ok else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_closed_engine_ends_its_thread() -> None:
    engine = Engine(n_threads=2)
    batch = request({"w": np.ones((4096, 128), np.float32)})
    engine.session(batch.schema, Command.build(scheme="int4")).quantize(batch)
    engine.close()
