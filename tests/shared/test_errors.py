"""Errors: what travels over the wire, and what comes back from it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flightquant import errors
from flightquant.errors import ERRORS, FlightquantError, InvalidRequestError, LayerError, clip_text, from_wire

WIRE_CODES = {
    "invalid_request": ValueError,
    "too_large": ValueError,
    "unauthenticated": PermissionError,
    "permission_denied": PermissionError,
    "overloaded": ConnectionError,
    "draining": ConnectionError,
    "deadline": TimeoutError,
    "internal": RuntimeError,
}


def test_the_wire_knows_exactly_the_contracts_codes() -> None:
    assert set(ERRORS) == set(WIRE_CODES)


@pytest.mark.parametrize(("code", "builtin"), WIRE_CODES.items())
def test_every_error_is_ours_and_a_builtin(code: str, builtin: type[Exception]) -> None:
    assert issubclass(ERRORS[code], FlightquantError)
    assert issubclass(ERRORS[code], builtin)
    assert ERRORS[code]("text").code == code


@pytest.mark.parametrize("code", WIRE_CODES)
def test_an_error_comes_back_as_it_was_sent(code: str) -> None:
    sent = ERRORS[code](
        "the sentence", field="scheme", got="int5x", expected=("int4", "int8"), request_id="r-1", retry_after_s=1.5
    )
    facts = sent.to_json()
    assert set(facts) == {"code", "field", "got", "expected", "request_id", "retry_after_s"}
    back = from_wire(sent.wire_message(), json.dumps(facts).encode())
    assert type(back) is ERRORS[code]
    assert back.message == "the sentence"
    assert (back.field, back.got, back.expected) == ("scheme", "int5x", ["int4", "int8"])
    assert (back.request_id, back.retry_after_s) == ("r-1", 1.5)


@pytest.mark.parametrize("code", WIRE_CODES)
def test_the_message_alone_is_enough(code: str) -> None:
    for text in (f"{code}: the sentence", f"Flight error: {code}: the sentence. gRPC client debug context"):
        back = from_wire(text)
        assert type(back) is ERRORS[code]
        assert back.message.startswith("the sentence")


@pytest.mark.parametrize(
    ("message", "extra"),
    [
        ("connection refused", b""),
        ("", b""),
        ("something", b"not json"),
        ("something", b"[1, 2]"),
        ("something", b'{"code": "teapot"}'),
        ("something", b'{"code": ["internal"]}'),
        ("something", b"\xff\xfe"),
        ("something", b"[" * 100_000),
    ],
)
def test_foreign_errors_are_none_of_ours(message: str, extra: bytes) -> None:
    assert from_wire(message, extra) is None


@given(st.text(max_size=60), st.binary(max_size=60))
def test_from_wire_never_fails(message: str, extra: bytes) -> None:
    back = from_wire(message, extra)
    assert back is None or isinstance(back, FlightquantError)


@given(st.text(max_size=3000), st.integers(10, 1200))
def test_clipped_text_fits_and_begins_alike(text: str, limit: int) -> None:
    clipped = clip_text(text, limit)
    assert len(clipped.encode()) <= limit
    plain = text.encode("utf-8", "replace").decode()
    assert clipped == plain or plain.startswith(clipped.removesuffix("..."))


def test_a_long_message_and_long_facts_are_cut() -> None:
    error = InvalidRequestError("x" * 20_000, field="y" * 5000, got=b"z" * 5000, expected=["w" * 5000] * 500)
    assert len(error.wire_message().encode()) < 1024
    assert len(json.dumps(error.to_json())) < 16_000
    surrogate = InvalidRequestError("bad \ud800 text", got="\udfff")
    json.dumps(surrogate.to_json()).encode()
    surrogate.wire_message().encode()


def test_a_layer_error_carries_its_rows_status() -> None:
    error = LayerError("non_finite", "weight 3 is NaN", field="weights")
    assert (error.status, error.code) == ("non_finite", "invalid_request")
    assert error.status in errors.ROW_STATUSES
    assert isinstance(error, ValueError)
