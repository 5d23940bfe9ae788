"""The Flight service: every method hands over to what does the work, inside the guard that keeps errors typed.

Methods that are not here are refused by the middleware, on their headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyarrow import flight

from flightquant.describe import describe
from flightquant.errors import InvalidRequestError
from flightquant.server import actions
from flightquant.server.auth import ACTION_ROLES
from flightquant.server.exchange import Exchange, command_bytes
from flightquant.server.faults import Guard
from flightquant.server.middleware import MIDDLEWARE_KEY, CallMiddlewareFactory, call_of
from flightquant.server.stored import SCHEMA, Stored, guarded


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
    stored : Stored
        Answers calls about stored models.
    threads : int
        Compute threads, for the ``version`` action.
    tls : mapping, optional
        The Flight server's own arguments for TLS.
    """

    def __init__(
        self,
        location: str,
        middleware: CallMiddlewareFactory,
        exchange: Exchange,
        stored: Stored,
        threads: int,
        tls: Mapping[str, Any] | None = None,
    ) -> None:
        self._exchange = exchange
        self._stored = stored
        self._threads = threads
        super().__init__(location, middleware={MIDDLEWARE_KEY: middleware}, **(tls or {}))

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Quantize a stream of layers."""
        with Guard(call_of(context)) as call:
            self._exchange.run(call, context, descriptor, reader, writer)

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        """What is in a stored source, and the ticket for its answers."""
        with Guard(call_of(context)) as call:
            command = command_bytes(descriptor)
            layers, _ = self._stored.info(call, command)
            return flight.FlightInfo(SCHEMA, descriptor, [flight.FlightEndpoint(command, [])], layers, -1)

    def do_get(self, context: Any, ticket: Any) -> Any:
        """The answers of a stored source; its ticket is the command itself."""
        with Guard(call_of(context)) as call:
            return flight.GeneratorStream(SCHEMA, guarded(call, self._stored.answers(call, context, ticket.ticket)))

    def do_action(self, context: Any, action: Any) -> Any:
        """Answer an action with JSON objects; ``quantize_to`` with one for each layer, while it works."""
        with Guard(call_of(context)) as call:
            call.op = action.type[:80]
            if action.type in actions.DESCRIPTIONS:
                call.identity.require(ACTION_ROLES.get(action.type), f"action {action.type}")
            if action.type == "schemes":
                answers = describe()
            elif action.type == "estimate":
                answers = [actions.estimate(action.body.to_pybytes())]
            elif action.type == "version":
                answers = [actions.version(self._threads)]
            elif action.type == "quantize_to":
                progress = guarded(call, self._stored.quantize_to(call, context, action.body.to_pybytes()))
                return (flight.Result(json.dumps(told).encode()) for told in progress)
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
