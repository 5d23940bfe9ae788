"""The Flight service: every method hands over to what does the work, inside the guard that keeps errors typed.

Methods that are not here are refused by the middleware, on their headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyarrow import flight

from flightquant.errors import InvalidRequestError
from flightquant.server import actions
from flightquant.server.exchange import Exchange
from flightquant.server.faults import Guard
from flightquant.server.middleware import MIDDLEWARE_KEY, CallMiddlewareFactory, call_of


class QuantService(flight.FlightServerBase):  # type: ignore[misc]
    """The Flight server; it listens as soon as it is made.

    Parameters
    ----------
    location : str
        Where to listen.
    middleware : CallMiddlewareFactory
        Sees the headers of every call.
    exchange : Exchange
        Answers ``DoExchange``.
    threads : int
        Compute threads, for the ``version`` action.
    """

    def __init__(self, location: str, middleware: CallMiddlewareFactory, exchange: Exchange, threads: int) -> None:
        self._exchange = exchange
        self._threads = threads
        super().__init__(location, middleware={MIDDLEWARE_KEY: middleware})

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Quantize a stream of layers."""
        with Guard(call_of(context)) as call:
            self._exchange.run(call, context, descriptor, reader, writer)

    def do_action(self, context: Any, action: Any) -> list[Any]:
        """Answer ``schemes``, ``estimate`` or ``version``, with JSON."""
        with Guard(call_of(context)) as call:
            call.op = action.type[:80]
            if action.type == "schemes":
                answers = actions.schemes()
            elif action.type == "estimate":
                answers = [actions.estimate(action.body.to_pybytes())]
            elif action.type == "version":
                answers = [actions.version(self._threads)]
            else:
                raise InvalidRequestError(
                    f'unknown action "{action.type[:80]}"; expected one of {", ".join(actions.DESCRIPTIONS)}',
                    field="action",
                    got=action.type,
                    expected=tuple(actions.DESCRIPTIONS),
                )
            return [flight.Result(json.dumps(answer).encode()) for answer in answers]

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        """Every action, with a line about it."""
        with Guard(call_of(context)):
            return list(actions.DESCRIPTIONS.items())


def build_labels(facts: Mapping[str, Any]) -> dict[str, str]:
    """The ``version`` action's facts as labels of the build metric."""
    return {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in facts.items()}
