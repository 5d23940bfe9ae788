"""The public API as a type checker sees it: checked by ``mypy --strict``, never run.

Each ``type: ignore`` names an error that must stay one: without it mypy reports an unused comment.
"""

from collections.abc import Iterator
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import flightquant
from flightquant.client import QuantClient
from flightquant.cython_core import active_isa, available_isas
from flightquant.cython_core.engine import Answer, Engine, Limits
from flightquant.errors import FlightquantError, InvalidRequestError
from flightquant.spec import Command

weights = {"w": np.ones((4, 128), np.float32)}

assert_type(flightquant.__version__, str)
assert_type(flightquant.dequantize(flightquant.quantize(weights, "int4")), dict[str, npt.NDArray[Any]])
flightquant.quantize(weights, scheme="int4", granularity="group", group_size=128, symmetric=False, n_threads=2)
flightquant.quantize(weights, "int4", 128)  # type: ignore[call-arg]
flightquant.quantize(weights, scheme=4)  # type: ignore[arg-type]
flightquant.quantize(weights, groupsize=128)  # type: ignore[call-arg]

assert_type(active_isa(), str)
assert_type(available_isas(), list[str])

engine = Engine(n_threads=2)
assert_type(engine.n_threads, int)


def use_session(schema: Any, batch: Any) -> None:
    session = engine.session(schema, Command.build(scheme="int8"), Limits(max_rows=10))
    assert_type(session.quantize(batch, should_stop=lambda: False), Answer)
    session.quantize(batch, should_stop=True)  # type: ignore[arg-type]
    Limits(max_row=10)  # type: ignore[call-arg]


def use_client() -> None:
    def progress(layer_name: str, fraction: float) -> None: ...

    with QuantClient("grpc://127.0.0.1:8815") as client:
        assert_type(client, QuantClient)
        client.quantize(weights, scheme="int4", group_size=128, progress=progress)
        assert_type(client.stream(weights, scheme="int4"), Iterator[Any])
        client.quantize(weights, scheme="int4", progress=3)  # type: ignore[arg-type]


def use_errors(error: FlightquantError) -> None:
    assert_type(error.code, str)
    assert_type(error.retry_after_s, float | None)


def as_value_error() -> ValueError:
    return InvalidRequestError("message", field="scheme")


def as_os_error() -> OSError:
    return InvalidRequestError("message")  # type: ignore[return-value]
