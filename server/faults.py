"""The one place where an exception becomes what a client sees: the table "Errors" of the contract.

pyarrow sends the whole traceback of anything that is not a ``FlightError``, so nothing else may leave a handler or a
middleware: both run inside a :class:`Guard`.
"""

from __future__ import annotations

import json
import logging
import math
from types import TracebackType
from typing import Any

from pyarrow import flight

from flightquant.errors import FlightquantError, InternalError
from flightquant.server.calls import Call, CallCancelledError

log = logging.getLogger("flightquant.server")

_FLIGHT_ERRORS: dict[str, Any] = {
    "invalid_request": flight.FlightServerError,
    "too_large": flight.FlightServerError,
    "unauthenticated": flight.FlightUnauthenticatedError,
    "permission_denied": flight.FlightUnauthorizedError,
    "overloaded": flight.FlightUnavailableError,
    "draining": flight.FlightUnavailableError,
    "deadline": flight.FlightTimedOutError,
    "internal": flight.FlightInternalError,
}

MAX_EXTRA_BYTES = 2048
"""Longest ``extra_info``: with the text it stays far below the 16 KiB at which Flight loses the error's class."""


def extra_info(error: FlightquantError) -> bytes:
    """The contract's JSON object, strict JSON, at most :data:`MAX_EXTRA_BYTES` long."""
    facts = error.to_json()
    got = facts["got"]
    if isinstance(got, float) and not math.isfinite(got):
        facts["got"] = str(got)
    for dropped in ("expected", "got", "field"):
        raw = json.dumps(facts, allow_nan=False).encode()
        if len(raw) <= MAX_EXTRA_BYTES:
            return raw
        facts[dropped] = None
    return json.dumps(facts, allow_nan=False).encode()


def as_fault(error: BaseException, call: Call) -> FlightquantError:
    """The error to send for ``error``: itself if it was meant for the client, else ``internal`` and nothing of it.

    What was not meant for the client goes to the log, with its traceback.
    """
    if isinstance(error, FlightquantError) and error.code in _FLIGHT_ERRORS and error.code != InternalError.code:
        error.request_id = call.request_id
        return error
    log.error("unexpected error", exc_info=error, extra={"fields": {"request_id": call.request_id}})
    return InternalError(
        f"the server failed; its log has the reason under request id {call.request_id}", request_id=call.request_id
    )


def flight_error(fault: FlightquantError) -> Exception:
    """``fault`` as the Flight error of its code."""
    error: Exception = _FLIGHT_ERRORS[fault.code](fault.wire_message(), extra_info(fault))
    return error


class Guard:
    """Runs a handler's body; whatever it raises leaves as a Flight error, and the call remembers its outcome."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __enter__(self) -> Call:
        return self._call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        if isinstance(error, CallCancelledError):
            self._call.outcome = "cancelled"
            raise flight.FlightCancelledError("cancelled: the client ended the call") from None
        try:
            fault = as_fault(error, self._call)
            sent = flight_error(fault)
        except Exception:
            # An error whose own text cannot be made: still nothing of it may leave.
            fault = InternalError("the server failed", request_id=self._call.request_id)
            sent = flight_error(fault)
        self._call.outcome, self._call.error = fault.code, fault.message
        raise sent from None
