"""Every error that flightquant raises or sends, each with the code of the wire contract.

Three families share one base: the caller's mistake (``InvalidRequestError`` and friends), the service's refusal
(``OverloadedError``, ``DrainingError``, ...) and our own fault (``InternalError``). Each also subclasses the builtin
that describes it, so that ``except ValueError`` keeps working for people who do not know this module.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

MAX_MESSAGE_BYTES = 1000
"""Longest error message sent, in UTF-8 bytes: Flight loses the error's class when text and trailers reach 16 KiB."""


def clip_text(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """Cut ``text`` to at most ``limit`` UTF-8 bytes, marking the cut with an ellipsis."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return raw.decode("utf-8")
    return raw[: limit - 3].decode("utf-8", "ignore") + "..."


def shown(value: Any, limit: int = 80) -> str:
    """A value of a request as it stands in a message: text in quotes, else JSON, cut to ``limit`` characters."""
    if isinstance(value, str):
        return f'"{value[:limit]}"'
    try:
        return json.dumps(value, default=str)[:limit]
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"


class FlightquantError(Exception):
    """Base of all errors: a sentence that a person can act on, and the facts a program needs.

    Attributes
    ----------
    code : str
        The contract's error code, the same on the wire and in-process.
    field : str or None
        The command key, column or setting at fault.
    got, expected : Any
        What was found there and what would have been right.
    request_id : str or None
        The service's name for the call; it stands in its log.
    retry_after_s : float or None
        Seconds to wait before the same call may succeed.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        got: Any = None,
        expected: Any = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.got = got
        self.expected = expected
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def to_json(self) -> dict[str, Any]:
        """The contract's ``extra_info`` object; values of other types than JSON's become text, cut short."""

        def plain(value: Any) -> Any:
            if value is None or isinstance(value, bool | int | float):
                return value
            try:
                return clip_text(str(value), 200)
            except RecursionError:
                return shown(value)

        expected = self.expected
        if isinstance(expected, list | tuple):
            expected = [plain(value) for value in expected][:50]
        else:
            expected = plain(expected)
        return {
            "code": self.code,
            "field": plain(self.field),
            "got": plain(self.got),
            "expected": expected,
            "request_id": plain(self.request_id),
            "retry_after_s": self.retry_after_s,
        }

    def wire_message(self) -> str:
        """The text sent over the wire: ``code: sentence``, under 1 KiB."""
        return clip_text(f"{self.code}: {self.message}")


class InvalidRequestError(FlightquantError, ValueError):
    """The command, the schema or a batch breaks the contract."""

    code = "invalid_request"


class TooLargeError(FlightquantError, ValueError):
    """A layer, a batch or a row count is over a limit."""

    code = "too_large"


class UnauthenticatedError(FlightquantError, PermissionError):
    """No identity, or one that does not hold."""

    code = "unauthenticated"


class PermissionDeniedError(FlightquantError, PermissionError):
    """A known identity asked for what it may not have."""

    code = "permission_denied"


class OverloadedError(FlightquantError, ConnectionError):
    """Refused before the body was read; repeat after ``retry_after_s``."""

    code = "overloaded"


class DrainingError(FlightquantError, ConnectionError):
    """The server is about to stop; repeat elsewhere or later."""

    code = "draining"


class DeadlineError(FlightquantError, TimeoutError):
    """The call's time is over."""

    code = "deadline"


class InternalError(FlightquantError, RuntimeError):
    """Our fault; the request id stands in the server's log."""

    code = "internal"


class StreamCutError(FlightquantError, ConnectionError):
    """The client saw fewer rows answered than it sent, or no end message: the call counts as failed."""

    code = "stream_cut"


class UnavailableError(FlightquantError, ConnectionError):
    """The client could not reach the server, or lost it."""

    code = "unavailable"


class LayerError(FlightquantError, ValueError):
    """One layer cannot be quantized; ``code`` of the row is in ``status``.

    Inside the service it becomes a row (``on_error: row``) or ends the call (``on_error: abort``).
    """

    code = "invalid_request"

    def __init__(self, status: str, message: str, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.status = status


ERRORS: dict[str, type[FlightquantError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        TooLargeError,
        UnauthenticatedError,
        PermissionDeniedError,
        OverloadedError,
        DrainingError,
        DeadlineError,
        InternalError,
    )
}
"""Code to class, for the codes that travel over the wire."""

ROW_STATUSES = (
    "ok",
    "non_finite",
    "shape_mismatch",
    "null_weights",
    "unsupported",
    "empty_name",
    "too_large",
    "internal",
)
"""What an answer row's ``status`` may say."""


def from_wire(message: str, extra_info: bytes = b"") -> FlightquantError | None:
    """The error that a server sent, from its message and ``extra_info``; None if it is none of ours."""
    try:
        facts = json.loads(extra_info) if extra_info else {}
    except (ValueError, RecursionError):
        facts = {}
    if not isinstance(facts, dict) or not isinstance(facts.get("code"), str | None):
        facts = {}
    code = facts.get("code")
    text = message
    for known in ERRORS:
        position = message.find(f"{known}: ")
        if position >= 0 and code in (None, known):
            code, text = known, message[position + len(known) + 2 :]
            break
    if code not in ERRORS:
        return None
    known_facts = ("field", "got", "expected", "request_id", "retry_after_s")
    return ERRORS[code](text, **{key: facts.get(key) for key in known_facts})
