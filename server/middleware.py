"""What runs on a call's headers, before any of its body is read: identity of the call, admission, its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyarrow import flight

from flightquant.errors import InvalidRequestError
from flightquant.server.admission import Admission
from flightquant.server.auth import CERTIFICATE, METHOD_ROLES, Gate
from flightquant.server.calls import REQUEST_ID_HEADER, TRACE_HEADER, UNKNOWN, Call, Headers
from flightquant.server.faults import Guard

MIDDLEWARE_KEY = "call"

_METHODS = {
    "LIST_FLIGHTS": "ListFlights",
    "GET_FLIGHT_INFO": "GetFlightInfo",
    "GET_SCHEMA": "GetSchema",
    "DO_GET": "DoGet",
    "DO_PUT": "DoPut",
    "DO_ACTION": "DoAction",
    "LIST_ACTIONS": "ListActions",
    "DO_EXCHANGE": "DoExchange",
    "HANDSHAKE": "Handshake",
}
OFFERED = ("DoExchange", "DoAction", "ListActions", "GetFlightInfo", "DoGet")


class CallMiddleware(flight.ServerMiddleware):  # type: ignore[misc]
    """Carries the :class:`Call` to its handler, names it to the client and hears of its end."""

    def __init__(self, call: Call, on_end: Callable[[Call], None]) -> None:
        super().__init__()
        self.call = call
        self._on_end = on_end

    def sending_headers(self) -> dict[str, str]:
        """Headers of the answer: the id under which the log knows the call, and the trace that it belongs to."""
        trace = {TRACE_HEADER: self.call.traceparent} if self.call.traceparent else {}
        return {REQUEST_ID_HEADER: self.call.request_id, **trace}

    def call_completed(self, exception: Exception | None) -> None:
        """The last that is heard of a call, whether it ended well, badly or not at all (a killed client)."""
        if exception is not None and self.call.outcome == "ok":
            # Flight refused the first message before any handler ran, or could not send what a handler left to it.
            self.call.outcome = "invalid_request" if self.call.op == UNKNOWN else "cancelled"
        self._on_end(self.call)


class CallMiddlewareFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Makes a call of its headers and lets it in, or refuses it.

    Parameters
    ----------
    gate : Gate
        Says who calls.
    on_end : callable
        Told of every call that is over, refused ones included.
    on_start : callable
        Told of every call, before anything is done for it.
    is_pulse : callable
        Whether these are the headers of the server's call to itself, which needs no place and is counted nowhere.
    """

    def __init__(
        self,
        gate: Gate,
        admission: Admission,
        on_end: Callable[[Call], None],
        on_start: Callable[[Call], None] = lambda call: None,
        is_pulse: Callable[[Headers], bool] = lambda headers: False,
    ) -> None:
        super().__init__()
        self._is_pulse = is_pulse
        self._gate = gate
        self._admission = admission
        self._on_start = on_start
        self._on_end = on_end

    def start_call(self, info: Any, headers: Headers) -> CallMiddleware:
        """Called by Flight with the headers of every call."""
        method = _METHODS.get(info.method.name, "other")
        if method == "ListActions" and self._is_pulse(headers):
            return CallMiddleware(Call("pulse", method), lambda call: None)
        call = Call.from_headers(method, headers)
        self._on_start(call)
        self._admission.came()
        try:
            with Guard(call):
                call.identity = self._gate.identify(headers)
                check_method(call.method)
                call.identity.require(METHOD_ROLES.get(call.method), call.method)
                self._admission.enter(call)
        except flight.FlightError:
            self._on_end(call)
            raise
        return CallMiddleware(call, self._on_end)


def check_method(method: str) -> None:
    """Refuse what is not offered here: a body is not read, and pyarrow's GetSchema sends the traceback of any error.

    Raises
    ------
    InvalidRequestError
        The method is none of :data:`OFFERED`.
    """
    if method not in OFFERED:
        raise InvalidRequestError(
            f"this server has no {method}; expected one of {', '.join(OFFERED)}",
            field="method",
            got=method,
            expected=OFFERED,
        )


def call_of(context: Any) -> Call:
    """The call that a handler's context belongs to."""
    call: Call = context.get_middleware(MIDDLEWARE_KEY).call
    call.peer = context.peer() or None
    if call.identity.name == CERTIFICATE:
        name = context.peer_identity().decode("utf-8", "replace")[:256]
        call.identity = replace(call.identity, name=name)
    return call
