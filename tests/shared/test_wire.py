"""The contract's schemas, column by column, and the end message."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flightquant import __version__
from flightquant.errors import InvalidRequestError
from flightquant.wire import EndMessage, answer_schema, check_request_schema

BF16 = {"dtype": "bfloat16"}
NAME = pa.field("layer_name", pa.utf8())
WEIGHTS = pa.field("weights", pa.list_(pa.float32()))


def schema_with(*fields: pa.Field, name: pa.Field = NAME, weights: pa.Field = WEIGHTS) -> pa.Schema:
    return pa.schema([name, weights, *fields])


def refusal(schema: pa.Schema) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_request_schema(schema)
    assert len(caught.value.wire_message().encode()) < 1024
    return caught.value


@pytest.mark.parametrize(
    ("field", "dtype"),
    [
        *(
            (pa.field("weights", kind(value)), name)
            for value, name in ((pa.float32(), "float32"), (pa.float16(), "float16"), (pa.float64(), "float64"))
            for kind in (pa.list_, pa.large_list, lambda v: pa.list_(v, 16))
        ),
        *(
            (pa.field("weights", kind(value), metadata=BF16), "bfloat16")
            for value in (pa.uint16(), pa.binary(2))
            for kind in (pa.list_, pa.large_list, lambda v: pa.list_(v, 16))
        ),
        (pa.field("weights", pa.list_(pa.field("element", pa.float32(), nullable=False))), "float32"),
    ],
    ids=lambda value: str(value),
)
def test_every_weights_type_of_the_contract(field: pa.Field, dtype: str) -> None:
    assert check_request_schema(schema_with(weights=field)) == dtype


@pytest.mark.parametrize(
    "kind",
    [
        pa.float32(),
        pa.binary(),
        pa.list_(pa.int8()),
        pa.list_(pa.uint16()),
        pa.list_(pa.binary(2)),
        pa.list_(pa.binary(3)),
        pa.list_(pa.int16()),
        pa.list_(pa.list_(pa.float32())),
        pa.list_(pa.dictionary(pa.int32(), pa.float32())),
        pa.list_view(pa.float32()),
        pa.large_list_view(pa.float32()),
        pa.dictionary(pa.int32(), pa.utf8()),
        pa.run_end_encoded(pa.int32(), pa.float32()),
        pa.map_(pa.utf8(), pa.float32()),
        pa.struct([("w", pa.float32())]),
        pa.fixed_shape_tensor(pa.float32(), (2, 2)),
        pa.list_(pa.bool8()),
        pa.null(),
    ],
    ids=str,
)
def test_every_other_weights_type_is_refused(kind: pa.DataType) -> None:
    error = refusal(schema_with(weights=pa.field("weights", kind)))
    assert error.field == "weights"
    assert "expected" in error.message


@pytest.mark.parametrize("tag", [None, {"dtype": "float16"}, {"dtype": "BF16"}, {"type": "bfloat16"}, {"dtype": ""}])
def test_16_bit_storage_needs_its_tag(tag: dict[str, str] | None) -> None:
    error = refusal(schema_with(weights=pa.field("weights", pa.list_(pa.uint16()), metadata=tag)))
    assert "dtype=bfloat16" in error.message


@pytest.mark.parametrize(
    "kind",
    [
        pa.utf8(),
        pa.large_utf8(),
        pa.dictionary(pa.int8(), pa.utf8()),
        pa.dictionary(pa.int32(), pa.large_utf8()),
        pa.dictionary(pa.uint64(), pa.utf8()),
    ],
    ids=str,
)
def test_every_name_type_of_the_contract(kind: pa.DataType) -> None:
    check_request_schema(schema_with(name=pa.field("layer_name", kind)))


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.string_view(),
        pa.int32(),
        pa.null(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int32(), pa.int64()),
        pa.run_end_encoded(pa.int32(), pa.utf8()),
        pa.json_(pa.utf8()),
        pa.list_(pa.utf8()),
    ],
    ids=str,
)
def test_every_other_name_type_is_refused(kind: pa.DataType) -> None:
    assert refusal(schema_with(name=pa.field("layer_name", kind))).field == "layer_name"


ALLOWED: dict[str, tuple[pa.DataType, ...]] = {
    "shape": (pa.list_(pa.int64()), pa.large_list(pa.int64())),
    "scheme": (pa.utf8(), pa.large_utf8()),
    "packing": (pa.utf8(), pa.large_utf8()),
    "granularity": (pa.utf8(),),
    "scale_dtype": (pa.utf8(),),
    "bit_width": (pa.uint8(), pa.int32(), pa.int64()),
    "group_size": (pa.int32(), pa.int64()),
    "symmetric": (pa.bool_(),),
    "row_offset": (pa.int64(),),
    "importance": (pa.list_(pa.float32()),),
    "global_amax": (pa.float32(),),
    "x_any": (
        pa.int8(),
        pa.utf8(),
        pa.binary(),
        pa.list_(pa.float64()),
        pa.struct([("a", pa.utf8()), ("b", pa.list_(pa.int8()))]),
        pa.timestamp("ns"),
        pa.decimal128(10, 2),
        pa.null(),
        pa.map_(pa.utf8(), pa.int64()),
        pa.list_(pa.int8(), 0),
    ),
    "x_": (pa.int64(),),
}
REFUSED: dict[str, tuple[pa.DataType, ...]] = {
    "shape": (
        pa.list_(pa.int32()),
        pa.list_(pa.int64(), 2),
        pa.list_(pa.float64()),
        pa.int64(),
        pa.list_view(pa.int64()),
    ),
    "scheme": (pa.string_view(), pa.dictionary(pa.int32(), pa.utf8()), pa.int32(), pa.binary()),
    "packing": (pa.int8(),),
    "granularity": (pa.int32(),),
    "scale_dtype": (pa.bool_(),),
    "bit_width": (pa.float32(), pa.utf8(), pa.bool_()),
    "group_size": (pa.float64(), pa.utf8()),
    "symmetric": (pa.int8(), pa.utf8()),
    "row_offset": (pa.int32(), pa.uint64(), pa.utf8()),
    "importance": (pa.list_(pa.float64()), pa.float32(), pa.large_list(pa.int32())),
    "global_amax": (pa.float64(), pa.float16(), pa.utf8()),
    "x_any": (
        pa.dictionary(pa.int32(), pa.utf8()),
        pa.run_end_encoded(pa.int32(), pa.utf8()),
        pa.string_view(),
        pa.binary_view(),
        pa.list_view(pa.int8()),
        pa.dense_union([pa.field("a", pa.int8())]),
        pa.list_(pa.dictionary(pa.int32(), pa.utf8())),
        pa.struct([("a", pa.string_view())]),
        pa.uuid(),
        pa.list_(pa.bool8()),
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in ALLOWED.items() for kind in kinds], ids=lambda value: str(value)
)
def test_every_optional_column_of_the_contract(name: str, kind: pa.DataType) -> None:
    assert check_request_schema(schema_with(pa.field(name, kind))) == "float32"


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in REFUSED.items() for kind in kinds], ids=lambda value: str(value)
)
def test_every_other_type_of_an_optional_column_is_refused(name: str, kind: pa.DataType) -> None:
    error = refusal(schema_with(pa.field(name, kind)))
    assert error.field == name
    assert f'"{name}"' in error.message


TAG = {"ARROW:extension:name": "someone.elses"}


@pytest.mark.parametrize(
    "field",
    [
        pa.field("layer_name", pa.utf8(), metadata=TAG),
        pa.field("weights", pa.list_(pa.float32()), metadata=TAG),
        pa.field("weights", pa.list_(pa.field("item", pa.float32(), metadata=TAG))),
        pa.field("shape", pa.list_(pa.int64()), metadata=TAG),
        pa.field("shape", pa.list_(pa.field("item", pa.int64(), metadata=TAG))),
        pa.field("x_note", pa.int8(), metadata=TAG),
        pa.field("x_note", pa.struct([pa.field("a", pa.list_(pa.field("item", pa.int8(), metadata=TAG)))])),
    ],
    ids=str,
)
def test_a_column_marked_as_an_unknown_extension_is_refused(field: pa.Field) -> None:
    given = {"layer_name": NAME, "weights": WEIGHTS, field.name: field}
    assert refusal(pa.schema(list(given.values()))).field == field.name


def test_other_metadata_of_a_column_is_no_extension() -> None:
    check_request_schema(schema_with(pa.field("x_note", pa.int8(), metadata={"unit": "s"})))


def test_a_deeply_nested_echo_is_refused() -> None:
    kind: pa.DataType = pa.int8()
    for _ in range(60):
        kind = pa.list_(kind)
    assert refusal(schema_with(pa.field("x_deep", kind))).field == "x_deep"


def test_an_echo_with_view_in_a_childs_name_is_no_view() -> None:
    check_request_schema(schema_with(pa.field("x_viewed", pa.struct([("view", pa.utf8())]))))


@pytest.mark.parametrize(
    "name", ["y_note", "X_note", "weight", "", "layer_name ", "status", "quantized_data", "n" * 5000]
)
def test_an_unknown_column_is_refused_with_the_known_ones(name: str) -> None:
    error = refusal(schema_with(pa.field(name, pa.int8())))
    assert error.field == name
    assert "x_" in error.message
    assert "row_offset" in error.message


@pytest.mark.parametrize("missing", ["layer_name", "weights"])
def test_a_missing_column_is_named(missing: str) -> None:
    error = refusal(pa.schema([field for field in (NAME, WEIGHTS) if field.name != missing]))
    assert error.field == missing


@pytest.mark.parametrize("doubled", [NAME, WEIGHTS, pa.field("x_a", pa.int8())])
def test_a_doubled_column_is_refused(doubled: pa.Field) -> None:
    error = refusal(schema_with(doubled, pa.field("x_a", pa.int8())))
    assert "twice" in error.message


def test_a_schema_of_very_many_columns_is_refused() -> None:
    error = refusal(schema_with(*(pa.field(f"x_{i}", pa.int8()) for i in range(100_000))))
    assert error.expected == 64
    assert refusal(pa.schema([])).field == "layer_name"


@pytest.mark.parametrize("name", ["x_aaaa", "layer_name", "x_in"])
def test_names_that_are_not_utf8_are_refused(name: str) -> None:
    schema = schema_with(pa.field("x_aaaa", pa.int8()), pa.field("x_s", pa.struct([("x_in", pa.string_view())])))
    raw = schema.serialize().to_pybytes().replace(name.encode(), b"\xff\xfe" + name.encode()[2:])
    refusal(pa.ipc.read_schema(pa.py_buffer(raw)))


def test_the_answer_schema_is_the_contracts() -> None:
    echoed = pa.field("x_note", pa.list_(pa.int16()), metadata={"a": "b"})
    schema = answer_schema(schema_with(echoed, pa.field("row_offset", pa.int64())))
    expected = {
        "layer_name": pa.utf8(),
        "shape": pa.list_(pa.int64()),
        "row_offset": pa.int64(),
        "status": pa.utf8(),
        "error": pa.utf8(),
        "scheme": pa.utf8(),
        "packing": pa.utf8(),
        "bit_width": pa.uint8(),
        "group_size": pa.int32(),
        "quantized_data": pa.binary(),
        "scales": pa.list_(pa.float32()),
        "scale_dtype": pa.utf8(),
        "zero_points": pa.list_(pa.float32()),
        "sqnr_db": pa.float32(),
        "cosine": pa.float32(),
        "max_abs_error": pa.float32(),
        "kernel_ns": pa.int64(),
        "bytes_in": pa.int64(),
        "bytes_out": pa.int64(),
        "bytes_copied": pa.int64(),
        "x_note": pa.list_(pa.int16()),
    }
    assert dict(zip(schema.names, schema.types, strict=True)) == expected
    assert schema.metadata == {b"flightquant.contract": b"1", b"flightquant.version": __version__.encode()}
    assert schema.field("x_note").metadata == {b"a": b"b"}


@given(st.lists(st.integers(0, 2**62), min_size=7, max_size=7))
def test_the_end_message_survives_its_own_json(values: list[int]) -> None:
    message = EndMessage(*values)
    assert EndMessage.from_json(message.to_json()) == message
    assert json.loads(message.to_json())["complete"] is True


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"complete": true}',
        b'{"complete": false, "rows": 0, "batches": 0, "bytes_in": 0, "bytes_out": 0, "bytes_copied": 0, '
        b'"kernel_ns": 0, "failed_rows": 0}',
        b'{"complete": 1, "rows": 0, "batches": 0, "bytes_in": 0, "bytes_out": 0, "bytes_copied": 0, '
        b'"kernel_ns": 0, "failed_rows": 0}',
        EndMessage().to_json().replace(b'"rows": 0', b'"rows": null'),
        EndMessage().to_json().replace(b'"rows": 0', b'"rows": "many"'),
        EndMessage().to_json().replace(b'"rows": 0', b'"rows": Infinity'),
        b"1" * 5000,
        b"[" * 100000,
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_is_no_end_message_is_none(raw: bytes) -> None:
    assert EndMessage.from_json(raw) is None


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_no_end_message(raw: bytes) -> None:
    assert EndMessage.from_json(raw) is None


def test_the_end_message_has_exactly_the_contracts_keys() -> None:
    keys: set[Any] = set(json.loads(EndMessage().to_json()))
    assert keys == {
        "complete", "rows", "batches", "bytes_in", "bytes_out", "bytes_copied", "kernel_ns", "failed_rows"
    }  # fmt: skip
