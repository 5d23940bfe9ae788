"""The command: every key, value and combination of the contract, and how rows override it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flightquant.errors import InvalidRequestError
from flightquant.schemes import SCHEMES
from flightquant.spec import MAX_COMMAND_BYTES, Command

KEYS = (
    "op",
    "scheme",
    "bit_width",
    "packing",
    "granularity",
    "group_size",
    "symmetric",
    "scale_dtype",
    "on_error",
    "metrics",
    "double_quant",
)
CODEBOOKS = ("nf4", "fp4")
INTEGERS = ("int8", "int4", "int2", "int3", "int5", "int6", "int7")
FLOATS = ("fp8_e4m3", "fp8_e5m2")
MICRO = ("mxfp4", "mxfp8", "nvfp4")
GGUF = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
WIDE_BLOCKS = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
BYTES = ("arrowquant",)
HQQ = ("hqq8", "hqq4", "hqq3", "hqq2")


def refusal(raw: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        Command.parse(raw)
    assert len(caught.value.wire_message().encode()) < 1024
    return caught.value


def test_defaults_are_the_contracts() -> None:
    command = Command.parse(b'{"scheme": "int4"}')
    assert (command.op, command.on_error, command.metrics, command.symmetric) == ("quantize", "row", True, True)
    spec = command.layer_spec()
    assert (spec.granularity, spec.group_size, spec.symmetric, spec.scale_dtype) == ("group", 128, True, None)
    assert Command.parse(b'{"scheme": "int8"}').layer_spec().granularity == "channel"
    for name in GGUF:
        assert Command.parse({"scheme": name}).layer_spec().group_size == 32
    for name in WIDE_BLOCKS:
        assert Command.parse({"scheme": name}).layer_spec().group_size == 256


@pytest.mark.parametrize(("width", "scheme"), [(2, "int2"), (4, "int4"), (8, "int8")])
def test_bit_width_is_short_for_a_scheme(width: int, scheme: str) -> None:
    assert Command.parse({"bit_width": width}) == Command.parse({"scheme": scheme})
    assert Command.parse({"bit_width": width, "scheme": scheme}) == Command.parse({"scheme": scheme})


@pytest.mark.parametrize("width", [0, 1, 3, 5, 16, -4, 10**30])
def test_unknown_bit_width_is_refused(width: int) -> None:
    error = refusal({"bit_width": width})
    assert error.field == "bit_width"
    assert "2, 4, 8" in error.message


def test_bit_width_and_scheme_that_disagree_are_refused() -> None:
    error = refusal({"bit_width": 8, "scheme": "int4"})
    assert error.field == "bit_width"
    assert "disagree" in error.message


def test_bit_width_chooses_among_the_widths_of_a_scheme() -> None:
    for width in (2, 4, 8):
        spec = Command.parse({"scheme": "arrowquant", "bit_width": width}).layer_spec()
        assert (spec.scheme.name, spec.scheme.bits, spec.symmetric) == ("arrowquant", width, False)
    assert Command.parse({"scheme": "arrowquant"}).layer_spec().scheme.bits == 4
    error = refusal({"scheme": "arrowquant", "bit_width": 3})
    assert (error.field, error.expected) == ("bit_width", (4, 2, 8))
    wide = Command.parse({"scheme": "arrowquant", "bit_width": 8})
    assert wide.override({"scheme": "int4"}).layer_spec().scheme.name == "int4"
    assert wide.override({"bit_width": 2}).layer_spec().scheme.bits == 2
    assert Command.parse({"scheme": "int8"}).override({"scheme": "arrowquant", "bit_width": 2}).bit_width == 2
    assert Command.parse({"scheme": "int8"}).override({"bit_width": 2}).scheme == "int2"


def test_double_quant_is_short_for_a_packing() -> None:
    nested = Command.parse({"scheme": "nf4", "packing": "bnb-nested"})
    assert Command.parse({"scheme": "nf4", "double_quant": True}) == nested
    assert Command.parse({"scheme": "nf4", "double_quant": True, "packing": "bnb-nested"}) == nested
    assert Command.parse({"scheme": "nf4", "double_quant": False}) == Command.parse({"scheme": "nf4"})
    assert nested.layer_spec().scheme.nested
    for options in ({"scheme": "nf4", "packing": "bnb-hi-first"}, {"scheme": "int4"}):
        error = refusal({**options, "double_quant": True})
        assert error.field == "packing"


def test_packing_chooses_among_the_layouts_of_a_scheme() -> None:
    assert Command.parse({"scheme": "int4"}).layer_spec().scheme.packing == "ct-int32"
    gptq = Command.parse({"scheme": "int4", "packing": "gptq", "symmetric": False})
    spec = gptq.layer_spec()
    assert (spec.scheme.name, spec.scheme.packing, spec.group_size, spec.symmetric) == ("int4", "gptq", 128, False)
    assert gptq.override({"packing": "awq"}).layer_spec().scheme.packing == "awq"
    assert gptq.override({"scheme": "int8"}).layer_spec().scheme.packing == "gptq"
    assert gptq.override({"scheme": "int6"}).layer_spec().scheme.packing == "ct-int32"
    for options, field in (
        ({"scheme": "int4", "packing": "gguf"}, "packing"),
        ({"scheme": "int8", "packing": "awq"}, "packing"),
        ({"scheme": "q4_0", "packing": "gptq"}, "packing"),
        ({"scheme": "int4", "packing": "awq", "granularity": "tensor"}, "granularity"),
    ):
        error = refusal(options)
        assert error.field == field
        assert options[field] in error.message


def expected_spec(
    scheme: str, granularity: str | None, group_size: int | None, symmetric: bool | None, scale_dtype: str | None
) -> tuple[Any, ...] | None:
    """The contract's table, written down a second time: the filled-in options, or None where it has no such thing."""
    if scheme in HQQ:
        chosen = granularity or "group"
        if chosen != "group" or group_size not in (None, 32, 64, 128) or scale_dtype not in (None, "float32"):
            return None
        return (scheme, chosen, group_size or 64, False, scale_dtype)
    if scheme == "mlx":
        chosen = granularity or "group"
        if chosen != "group" or group_size not in (None, 32, 64, 128) or scale_dtype in ("float64", ""):
            return None
        return (scheme, chosen, group_size or 64, False, scale_dtype)
    sizes = (32, 64, 128, 256) if scheme in (*INTEGERS, *BYTES) else () if scheme in FLOATS else (32,)
    if scheme in CODEBOOKS:
        sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    allowed = ("tensor", "channel", "group") if scheme in (*INTEGERS, *BYTES) else ("group",)
    if scheme == "nvfp4":
        sizes = (16,)
    if scheme in FLOATS:
        allowed = ("tensor", "channel", "block")
    by_row = scheme in ("int8", *FLOATS, *BYTES)
    chosen = granularity or ("group" if group_size is not None or not by_row else "channel")
    if chosen not in allowed or (group_size is not None and (chosen != "group" or group_size not in sizes)):
        return None
    if scheme not in (*INTEGERS, *BYTES) and symmetric is False:
        return None
    if scheme in (*GGUF, *MICRO) and scale_dtype is not None:
        return None
    if scale_dtype not in (None, "float32", *(() if scheme in (*CODEBOOKS, *BYTES) else ("float16", "bfloat16"))):
        return None
    default = 128 if scheme in (*INTEGERS, *BYTES) else 64 if scheme in CODEBOOKS else sizes[0] if sizes else 0
    size = (group_size or default) if chosen == "group" else 128 if chosen == "block" else 0
    return (scheme, chosen, size, symmetric is not False and scheme not in BYTES, scale_dtype)


@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS, *GGUF, *CODEBOOKS, *BYTES, *MICRO, *HQQ, "mlx"])
def test_every_combination_of_options(scheme: str) -> None:
    tried = allowed = 0
    for granularity, size, symmetric, scale_dtype in itertools.product(
        (None, "tensor", "channel", "group", "block"),
        (None, 32, 64, 128, 256, 1, 0, -1, 2**40),
        (None, True, False),
        (None, "float32", "float16", "bfloat16", "float64", ""),
    ):
        given_options = {
            "granularity": granularity,
            "group_size": size,
            "symmetric": symmetric,
            "scale_dtype": scale_dtype,
        }
        options = {key: value for key, value in given_options.items() if value is not None}
        raw = json.dumps({"scheme": scheme, **options})
        expected = expected_spec(scheme, granularity, size, symmetric, scale_dtype)
        tried += 1
        if expected is None:
            error = refusal(raw)
            assert error.field in options, raw
            assert f'"{error.field}"' in error.message, raw
            shown = options[error.field]
            assert (shown if isinstance(shown, str) else json.dumps(shown)) in error.message, raw
            assert "expected" in error.message
            assert error.expected, raw
        else:
            allowed += 1
            spec = Command.parse(raw).layer_spec()
            got = (spec.scheme.name, spec.granularity, spec.group_size, spec.symmetric, spec.scale_dtype)
            assert got == expected, raw
    assert tried == 5 * 9 * 3 * 6
    combinations = {
        INTEGERS: 144,
        FLOATS: 32,
        CODEBOOKS: 40,
        BYTES: 72,
        ("nvfp4",): 4,
        ("mlx",): 96,
        HQQ: 48,
        (*GGUF, *MICRO): 8,
    }
    wanted = next(count for names, count in combinations.items() if scheme in names)
    assert allowed == wanted, allowed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(("op", "scheme", "granularity", "scale_dtype", "on_error"), (None, 1, True, [], {}, 1.5)),
        *itertools.product(("bit_width", "group_size"), (None, "128", True, 128.0, [128], {})),
        *itertools.product(("symmetric", "metrics"), (None, 0, 1, "true", [], {})),
    ],
)
def test_a_value_of_another_type_is_refused_and_named(key: str, value: Any) -> None:
    error = refusal({"scheme": "int4", key: value})
    assert error.field == key
    assert f'"{key}"' in error.message
    assert error.code == "invalid_request"


@pytest.mark.parametrize(
    ("key", "value"), [("op", "quantise"), ("on_error", "ignore"), ("scheme", "int5x"), ("scheme", ""), ("op", "")]
)
def test_an_unknown_value_is_refused_with_what_is_allowed(key: str, value: str) -> None:
    error = refusal({"scheme": "int4", key: value})
    assert error.field == key
    allowed = {"op": ["quantize"], "on_error": ["row", "abort"], "scheme": list(SCHEMES)}[key]
    assert all(word in error.message for word in allowed)


@pytest.mark.parametrize("key", ["Scheme", "groupsize", "", "bits", "x_note", "layer_name", "\N{SNOWMAN}", "k" * 5000])
def test_an_unknown_key_is_refused_with_the_known_ones(key: str) -> None:
    error = refusal({"scheme": "int4", key: 1})
    assert all(known in error.message for known in KEYS)
    assert key[:80] in error.message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"int4"',
        b"null",
        b"4",
        b'{"scheme": "int4"} x',
        b'{"scheme": "int4", "scheme": "int8"}',
        b"[" * 30000,
        b'{"a":' * 9000,
        b'{"scheme": "int4", "group_size": NaN}',
        b'{"scheme": "int4", "group_size": 1e2}',
        b'{"bit_width": ' + b"9" * 5000 + b"}",
        b" " * (MAX_COMMAND_BYTES + 1),
        "{}",
        '{"scheme": "int4"}'.encode("utf-16"),
        '{"scheme": "int4"}'.encode("utf-32-le"),
        b'\xef\xbb\xbf{"scheme": "int4"}',
        b'{"scheme": "int4", "\xed\xa0\x80": 1}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_what_is_no_json_object_of_the_contract_is_refused(raw: bytes) -> None:
    refusal(raw)


def test_a_key_given_twice_is_named_as_that() -> None:
    assert "names a key twice" in refusal(b'{"scheme": "int4", "scheme": "int8"}').message


@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_a_value_that_json_can_hardly_hold_is_refused(brackets: str) -> None:
    """Whatever depth was parsed, the value has to be shown from a deeper place of the program."""
    for depth in (*range(900, 1000, 3), 5000):
        value: Any = []
        for _ in range(depth):
            value = [value] if brackets == "[]" else {"a": value}
        error = refusal({"scheme": value})
        json.dumps(error.to_json())


def test_a_missing_scheme_is_named_with_the_schemes() -> None:
    error = refusal({})
    assert error.field == "scheme"
    assert all(name in error.message for name in SCHEMES)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_arbitrary_bytes_are_a_command_or_a_typed_refusal(raw: bytes | str) -> None:
    try:
        Command.parse(raw)
    except InvalidRequestError as error:
        assert len(error.wire_message().encode()) < 1024


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["int4", "group"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=10), JSON, max_size=6))
@settings(max_examples=300)
def test_arbitrary_json_is_a_command_or_a_typed_refusal(raw: dict[str, Any]) -> None:
    text = json.dumps(raw)
    try:
        command = Command.parse(text)
    except InvalidRequestError as error:
        assert len(error.wire_message().encode()) < 1024
        json.dumps(error.to_json())
    else:
        assert Command.parse(command.to_json()) == command
        assert Command.build(op=command.op, **command.options()) == command


@given(
    st.fixed_dictionaries(
        {"scheme": st.sampled_from(list(SCHEMES))},
        optional={
            "bit_width": st.sampled_from([2, 4, 8]),
            "packing": st.sampled_from(["ct-int32", "gptq", "awq"]),
            "granularity": st.sampled_from(["tensor", "channel", "group"]),
            "group_size": st.sampled_from([32, 64, 128, 256]),
            "symmetric": st.booleans(),
            "scale_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "on_error": st.sampled_from(["row", "abort"]),
            "metrics": st.booleans(),
        },
    )
)
def test_a_command_survives_its_own_json(options: dict[str, Any]) -> None:
    try:
        command = Command.parse(options)
    except InvalidRequestError:
        return
    assert Command.parse(command.to_json()) == command
    assert set(json.loads(command.to_json())) <= set(KEYS)


@pytest.mark.parametrize(
    ("base", "row", "expected"),
    [
        ({"scheme": "int4"}, {}, ("int4", "group", 128, True, None)),
        ({"scheme": "int4"}, {"scheme": "int8"}, ("int8", "channel", 0, True, None)),
        ({"scheme": "int4"}, {"bit_width": 8}, ("int8", "channel", 0, True, None)),
        ({"scheme": "int4", "group_size": 64}, {"scheme": "int8"}, ("int8", "group", 64, True, None)),
        ({"scheme": "int4", "group_size": 128}, {"granularity": "channel"}, ("int4", "channel", 0, True, None)),
        ({"scheme": "int8"}, {"group_size": 32}, ("int8", "group", 32, True, None)),
        ({"scheme": "int8", "granularity": "tensor"}, {"group_size": 32}, ("int8", "group", 32, True, None)),
        ({"scheme": "int8"}, {"granularity": "group"}, ("int8", "group", 128, True, None)),
        ({"scheme": "int4", "symmetric": False}, {"symmetric": True}, ("int4", "group", 128, True, None)),
        ({"scheme": "int4"}, {"scale_dtype": "float16"}, ("int4", "group", 128, True, "float16")),
        ({"scheme": "int4", "group_size": 128}, {"scheme": "q8_0"}, ("q8_0", "group", 32, True, None)),
        ({"scheme": "int4", "group_size": 64}, {"scheme": "fp8_e4m3"}, ("fp8_e4m3", "channel", 0, True, None)),
        ({"scheme": "fp8_e4m3", "granularity": "tensor"}, {"bit_width": 2}, ("int2", "tensor", 0, True, None)),
        ({"scheme": "int4", "scale_dtype": "float16"}, {"scheme": "nf4"}, ("nf4", "group", 64, True, None)),
        ({"scheme": "nf4", "group_size": 2048}, {"scheme": "int4"}, ("int4", "group", 128, True, None)),
        ({"scheme": "int4", "group_size": 128}, {"scheme": "nvfp4"}, ("nvfp4", "group", 16, True, None)),
        ({"scheme": "int8", "granularity": "tensor"}, {"scheme": "q4_0"}, ("q4_0", "group", 32, True, None)),
        (
            {"scheme": "int4", "symmetric": False, "scale_dtype": "float16"},
            {"scheme": "q4_0"},
            ("q4_0", "group", 32, True, None),
        ),
        ({"scheme": "q8_0"}, {"scheme": "int4", "symmetric": False}, ("int4", "group", 128, False, None)),
    ],
)
def test_a_rows_values_stand_in_place_of_the_calls(
    base: dict[str, Any], row: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    spec = Command.parse(base).override(row).layer_spec()
    assert (spec.scheme.name, spec.granularity, spec.group_size, spec.symmetric, spec.scale_dtype) == expected


@pytest.mark.parametrize(
    ("base", "row", "field"),
    [
        ({"scheme": "int4"}, {"scheme": "int5x"}, "scheme"),
        ({"scheme": "int4"}, {"scheme": ""}, "scheme"),
        ({"scheme": "int4"}, {"bit_width": 5}, "bit_width"),
        ({"scheme": "int4"}, {"bit_width": 8, "scheme": "int4"}, "bit_width"),
        ({"scheme": "int4"}, {"granularity": "row"}, "granularity"),
        ({"scheme": "int4"}, {"group_size": 0}, "group_size"),
        ({"scheme": "int4"}, {"group_size": 100}, "group_size"),
        ({"scheme": "int4"}, {"granularity": "channel", "group_size": 128}, "group_size"),
        ({"scheme": "int4"}, {"scale_dtype": "float64"}, "scale_dtype"),
        ({"scheme": "int4"}, {"scheme": "q8_0", "group_size": 64}, "group_size"),
        ({"scheme": "int4"}, {"scheme": "fp8_e5m2", "group_size": 64}, "group_size"),
        ({"scheme": "int4"}, {"scheme": "q8_0", "symmetric": False}, "symmetric"),
        ({"scheme": "int4"}, {"scheme": "nf4", "scale_dtype": "float16"}, "scale_dtype"),
        ({"scheme": "int4"}, {"scheme": "q8_0", "granularity": "channel"}, "granularity"),
        ({"scheme": "int4"}, {"scheme": "q8_0", "scale_dtype": "float16"}, "scale_dtype"),
    ],
)
def test_a_row_that_asks_for_what_does_not_exist_is_refused(
    base: dict[str, Any], row: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Command.parse(base).override(row)
    assert caught.value.field == field


def test_scale_and_arithmetic_dtypes_follow_the_contract() -> None:
    own = Command.build(scheme="int8").layer_spec()
    for dtype, scales in (("float32",) * 2, ("float16",) * 2, ("bfloat16",) * 2, ("float64", "float32")):
        assert own.scale_dtype_for(dtype) == scales
        assert own.arithmetic_for(dtype) == scales
    half = Command.build(scheme="int8", scale_dtype="float16").layer_spec()
    assert half.arithmetic_for("float16") == "float16"
    assert [half.arithmetic_for(dtype) for dtype in ("float32", "bfloat16", "float64")] == ["float32"] * 3
    assert {half.scale_dtype_for(dtype) for dtype in ("float32", "float16", "bfloat16")} == {"float16"}
    block = Command.build(scheme="q8_0").layer_spec()
    assert (block.scale_dtype_for("bfloat16"), block.arithmetic_for("bfloat16")) == ("float16", "float32")
    for name, scales in (("mxfp4", "e8m0"), ("mxfp8", "e8m0"), ("nvfp4", "e4m3")):
        micro = Command.build(scheme=name).layer_spec()
        for dtype, arithmetic in (("bfloat16", "bfloat16"), ("float64", "float32")):
            assert (micro.scale_dtype_for(dtype), micro.arithmetic_for(dtype)) == (scales, arithmetic)
    flat = Command.build(scheme="nf4").layer_spec()
    assert (flat.scale_dtype_for("bfloat16"), flat.arithmetic_for("bfloat16")) == ("float32", "float32")


def test_build_takes_none_for_not_given() -> None:
    assert Command.build(scheme="int4", group_size=None, granularity=None) == Command.parse({"scheme": "int4"})
    with pytest.raises(InvalidRequestError, match="unknown key"):
        Command.build(scheme="int4", groups=3)
