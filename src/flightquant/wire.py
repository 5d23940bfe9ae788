"""The contract's bytes: request and answer schemas, the end message, the headers that our client adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from flightquant.errors import InvalidRequestError
from flightquant.spec import OVERRIDE_KEYS

CONTRACT_VERSION = "1"
PASSTHROUGH_PREFIX = "x_"
MAX_COLUMNS = 64
MAX_NAME_BYTES = 1024

SUMS_HEADER = "x-flightquant-sums"
"""A client that sends this header gets, as ``app_metadata`` of every answer batch, the row's quality sums
(:data:`QUALITY_SUMS` float64 values a row), from which it joins the quality of a layer sent in parts."""
QUALITY_SUMS = 4

ANSWER_FIELDS: tuple[pa.Field, ...] = (
    pa.field("layer_name", pa.utf8()),
    pa.field("shape", pa.list_(pa.int64())),
    pa.field("row_offset", pa.int64()),
    pa.field("status", pa.utf8()),
    pa.field("error", pa.utf8()),
    pa.field("scheme", pa.utf8()),
    pa.field("packing", pa.utf8()),
    pa.field("bit_width", pa.uint8()),
    pa.field("group_size", pa.int32()),
    pa.field("quantized_data", pa.binary()),
    pa.field("scales", pa.list_(pa.float32())),
    pa.field("scale_dtype", pa.utf8()),
    pa.field("zero_points", pa.list_(pa.float32())),
    pa.field("sqnr_db", pa.float32()),
    pa.field("cosine", pa.float32()),
    pa.field("max_abs_error", pa.float32()),
    pa.field("kernel_ns", pa.int64()),
    pa.field("bytes_in", pa.int64()),
    pa.field("bytes_out", pa.int64()),
    pa.field("bytes_copied", pa.int64()),
)

_VALUE_DTYPES = {pa.float32(): "float32", pa.float16(): "float16", pa.float64(): "float64"}
_BF16_STORAGE = (pa.uint16(), pa.binary(2))

_COLUMNS = ("layer_name", "weights", "shape", *OVERRIDE_KEYS, "row_offset", "importance", "global_amax")
_STRINGS = (pa.utf8(), pa.large_utf8())
_OVERRIDE_TYPES: dict[str, tuple[pa.DataType, ...]] = {
    "scheme": _STRINGS,
    "packing": _STRINGS,
    "granularity": _STRINGS,
    "scale_dtype": _STRINGS,
    "bit_width": (pa.uint8(), pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    "group_size": (pa.int32(), pa.int64()),
    "symmetric": (pa.bool_(),),
}


def answer_schema(request: pa.Schema) -> pa.Schema:
    """The answer's schema for a checked request schema: the contract's columns, then the ``x_`` ones as they came."""
    return _with_echoes(list(ANSWER_FIELDS), request)


def _with_echoes(fields: list[pa.Field], request: pa.Schema) -> pa.Schema:
    from flightquant import __version__

    echoed = [field for field in request if field.name.startswith(PASSTHROUGH_PREFIX)]
    metadata = {"flightquant.contract": CONTRACT_VERSION, "flightquant.version": __version__}
    return pa.schema([*fields, *echoed], metadata=metadata)


RESTORED_VALUES = {"float32": pa.float32(), "float16": pa.float16()}

_VERIFIED = ("layer_name", "shape", "status", "error", "sqnr_db", "cosine", "max_abs_error")
_BINARIES = (pa.binary(), pa.large_binary())
_NEEDED = ("layer_name", "shape", "quantized_data")


def restored_schema(request: pa.Schema, dtype: str) -> pa.Schema:
    """The answer's schema of ``op: dequantize``, for a checked request schema; ``dtype`` is the weights'."""
    fields = {field.name: field for field in ANSWER_FIELDS}
    weights = pa.field("weights", pa.list_(RESTORED_VALUES[dtype]))
    return _with_echoes([fields["layer_name"], fields["shape"], weights, fields["status"], fields["error"]], request)


def verified_schema(request: pa.Schema) -> pa.Schema:
    """The answer's schema of ``op: verify``, for a checked request schema."""
    return _with_echoes([field for field in ANSWER_FIELDS if field.name in _VERIFIED], request)


def amax_schema(request: pa.Schema) -> pa.Schema:
    """The answer's schema of ``op: amax``, for a checked request schema."""
    fields = {field.name: field for field in ANSWER_FIELDS}
    first = [fields[name] for name in ("layer_name", "shape", "row_offset", "status", "error")]
    last = [fields[name] for name in ("kernel_ns", "bytes_in")]
    return _with_echoes([*first, pa.field("amax", pa.float32()), *last], request)


def weights_dtype(field: pa.Field) -> str:
    """The float dtype that a ``weights`` field carries.

    Raises
    ------
    InvalidRequestError
        It is no list of float32, float16, float64 or (tagged) bfloat16.
    """
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        value = kind.value_type
        if value in _VALUE_DTYPES:
            return _VALUE_DTYPES[value]
        if value in _BF16_STORAGE:
            tag = (field.metadata or {}).get(b"dtype")
            if tag == b"bfloat16":
                return "bfloat16"
            raise _bad_column(
                "weights",
                f"{kind} without field metadata dtype=bfloat16 (found {tag!r})",
                "field metadata dtype=bfloat16 for 16-bit storage",
            )
    raise _bad_column(
        "weights",
        str(kind),
        "list, large_list or fixed_size_list of float32, float16, float64, or of uint16 or fixed_size_binary(2) "
        "with field metadata dtype=bfloat16",
    )


def check_request_schema(schema: pa.Schema) -> str:
    """Check a request's schema, exact columns and exact types, before any row is looked at.

    Returns
    -------
    str
        The dtype of the weights.

    Raises
    ------
    InvalidRequestError
        A column is missing, doubled, unknown or of another type than the contract's.
    """
    return _checked(schema, _check_columns)


def check_quantized_schema(schema: pa.Schema, op: str) -> str | None:
    """Check the schema of quantized rows that come back, for ``op: dequantize`` or ``verify``.

    Returns
    -------
    str or None
        The dtype of the weights to compare with, for ``verify``.

    Raises
    ------
    InvalidRequestError
        A column is missing, doubled, unknown or of another type than the contract's.
    """
    return _checked(schema, lambda schema: _check_quantized_columns(schema, op))


Checked = TypeVar("Checked")


def _checked(schema: pa.Schema, check: Callable[[pa.Schema], Checked]) -> Checked:
    if len(schema) > MAX_COLUMNS:
        raise InvalidRequestError(
            f"the schema has {len(schema)} columns; expected at most {MAX_COLUMNS}",
            field="schema",
            got=len(schema),
            expected=MAX_COLUMNS,
        )
    try:
        return check(schema)
    except UnicodeDecodeError:
        raise InvalidRequestError(
            "a name in the schema is not UTF-8", field="schema", expected="names in UTF-8"
        ) from None


def _check_columns(schema: pa.Schema) -> str:
    _check_names(schema.names, ("layer_name", "weights"))
    dtype = weights_dtype(schema.field("weights"))
    for field in schema:
        _check_field(field)
    return dtype


def _check_names(names: list[str], needed: tuple[str, ...]) -> None:
    for name in needed:
        if name not in names:
            raise InvalidRequestError(f'column "{name}" is missing', field=name, expected="a column of this name")
    if len(set(names)) != len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise InvalidRequestError(f'column "{doubled[:80]}" stands twice', field=doubled, expected="one such column")


def _check_quantized_columns(schema: pa.Schema, op: str) -> str | None:
    verified = op == "verify"
    _check_names(schema.names, (*_NEEDED, "weights") if verified else _NEEDED)
    dtype = weights_dtype(schema.field("weights")) if verified else None
    known = {field.name: field.type for field in ANSWER_FIELDS}
    for field in schema:
        name, kind = field.name, field.type
        if name in ("layer_name", "shape", "row_offset") or name.startswith(PASSTHROUGH_PREFIX):
            _check_field(field)
        elif _is_tagged(field):
            raise _bad_column(name, f"extension<{kind}>", "no extension type")
        elif name in known:
            _check_quantized_type(name, kind, known[name])
        elif not (verified and name == "weights"):
            expected = (*known, "weights") if verified else tuple(known)
            raise InvalidRequestError(
                f'unknown column "{name[:80]}"; expected the columns of a quantized answer'
                f"{', weights' if verified else ''} or a name that begins with x_",
                field=name,
                got=name,
                expected=expected,
            )
    return dtype


def _check_quantized_type(name: str, kind: pa.DataType, own: pa.DataType) -> None:
    """A column of a quantized answer is of its own type, or of that with 64-bit offsets."""
    if pa.types.is_list(own):
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        good = listed and kind.value_type == own.value_type
    elif own == pa.binary():
        good = kind in _BINARIES
    elif own == pa.utf8():
        good = kind in _STRINGS
    elif name == "group_size":
        good = kind in _OVERRIDE_TYPES[name]
    else:
        good = kind == own
    if not good:
        raise _bad_column(name, str(kind), f"{own}, with offsets of 32 or 64 bits if it has any")


def _is_tagged(field: pa.Field) -> bool:
    """Whether a field or a child of it is marked as an extension, which pyarrow overlooks in types it does not know."""
    children = (field.type.field(i) for i in range(field.type.num_fields))
    return b"ARROW:extension:name" in (field.metadata or {}) or any(map(_is_tagged, children))


def _check_field(field: pa.Field) -> None:
    name, kind = field.name, field.type
    if _is_tagged(field):
        raise _bad_column(name, f"extension<{kind}>", "no extension type")
    if name == "weights":
        return
    if name == "layer_name":
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if plain not in _STRINGS:
            raise _bad_column(name, str(kind), "utf8, large_utf8 or a dictionary of these")
    elif name == "shape":
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (listed and kind.value_type == pa.int64()):
            raise _bad_column(name, str(kind), "list<int64> or large_list<int64>")
    elif name in OVERRIDE_KEYS:
        if kind not in _OVERRIDE_TYPES[name]:
            raise _bad_column(name, str(kind), " or ".join(map(str, _OVERRIDE_TYPES[name])))
    elif name == "row_offset":
        if kind != pa.int64():
            raise _bad_column(name, str(kind), "int64")
    elif name == "importance":
        if not (pa.types.is_list(kind) and kind.value_type == pa.float32()):
            raise _bad_column(name, str(kind), "list<float32>")
    elif name == "global_amax":
        if kind != pa.float32():
            raise _bad_column(name, str(kind), "float32")
    elif name.startswith(PASSTHROUGH_PREFIX):
        _check_passthrough(name, kind)
    else:
        raise InvalidRequestError(
            f'unknown column "{name[:80]}"; expected one of {", ".join(_COLUMNS)}, or a name that begins with x_',
            field=name,
            got=name,
            expected=_COLUMNS,
        )


_VIEW_IDS = (pa.lib.Type_LIST_VIEW, pa.lib.Type_LARGE_LIST_VIEW, pa.lib.Type_STRING_VIEW, pa.lib.Type_BINARY_VIEW)


def _check_passthrough(name: str, kind: pa.DataType, depth: int = 0) -> None:
    """Echoed columns may be of any plain or nested type; those whose content cannot be checked cheaply are refused."""
    nested = [kind.field(i).type for i in range(kind.num_fields)] if depth < 8 else []
    refused = (
        pa.types.is_dictionary(kind)
        or pa.types.is_run_end_encoded(kind)
        or pa.types.is_union(kind)
        or isinstance(kind, pa.BaseExtensionType)
        or kind.id in _VIEW_IDS
        or depth >= 8
    )
    if refused:
        raise _bad_column(name, str(kind)[:80], "no extension, dictionary, union, view or run-end type")
    for child in nested:
        _check_passthrough(name, child, depth + 1)


def _bad_column(name: str, got: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError(
        f'column "{name[:80]}" has type {got[:200]}; expected {expected}', field=name, got=got, expected=expected
    )


@dataclass(slots=True)
class EndMessage:
    """The totals that end a stream; ``rows`` is what the server received, so that a cut stream is noticed."""

    rows: int = 0
    batches: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_copied: int = 0
    kernel_ns: int = 0
    failed_rows: int = 0

    def add(self, batch: EndMessage) -> None:
        """Add the totals of a batch."""
        self.rows += batch.rows
        self.batches += batch.batches
        self.bytes_in += batch.bytes_in
        self.bytes_out += batch.bytes_out
        self.bytes_copied += batch.bytes_copied
        self.kernel_ns += batch.kernel_ns
        self.failed_rows += batch.failed_rows

    def to_json(self) -> bytes:
        """The message's bytes, ``complete`` first."""
        totals = {name: getattr(self, name) for name in self.__dataclass_fields__}  # asdict() copies each, for 20 us
        return json.dumps({"complete": True, **totals}).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> EndMessage | None:
        """The end message in ``raw``, or None if it is none."""
        try:
            parsed: Any = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        if not isinstance(parsed, dict) or parsed.pop("complete", None) is not True:
            return None
        try:
            return cls(**{key: int(parsed[key]) for key in cls.__dataclass_fields__})
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
