"""Engines for every instruction set that this machine can run."""

from __future__ import annotations

from functools import lru_cache

import pytest

from flightquant.cython_core import available_isas
from flightquant.cython_core.engine import Engine

engine_of = lru_cache(maxsize=None)(lambda isa, n_threads: Engine(n_threads=n_threads, isa=isa))


@pytest.fixture(scope="session")
def all_engines() -> list[Engine]:
    """Each instruction set with one, two and three threads."""
    return [engine_of(isa, n_threads) for isa in available_isas() for n_threads in (1, 2, 3)]


@pytest.fixture(params=available_isas())
def isa_engine(request: pytest.FixtureRequest) -> Engine:
    """Each instruction set in turn, with two threads."""
    return engine_of(request.param, 2)


@pytest.fixture
def any_engine() -> Engine:
    """The engine that a user gets, with two threads."""
    return engine_of(None, 2)
