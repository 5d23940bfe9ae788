"""The command of one call as a frozen dataclass.

``Command.parse`` is the only place where a command's keys, values and combinations are judged, for the service, the
client and the local call alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from flightquant.errors import InvalidRequestError, shown
from flightquant.schemes import BLOCK_EDGE, NESTED, SCHEMES, LayerSpec

OPERATIONS = ("quantize", "dequantize", "verify", "amax")
RESTORED_DTYPES = ("float32", "float16")
CALIBRATIONS = ("absmax", "mse", "proximal")
ON_ERROR = ("row", "abort")
MAX_COMMAND_BYTES = 64 * 1024
MAX_KNOWN_BYTES = 4096
"""Of a command that is remembered from call to call."""

_KEYS: dict[str, tuple[type, str]] = {
    "op": (str, "a string"),
    "scheme": (str, "a string"),
    "bit_width": (int, "an integer"),
    "packing": (str, "a string"),
    "granularity": (str, "a string"),
    "group_size": (int, "an integer"),
    "symmetric": (bool, "true or false"),
    "scale_dtype": (str, "a string"),
    "calibration": (str, "a string"),
    "fallback": (bool, "true or false"),
    "on_error": (str, "a string"),
    "metrics": (bool, "true or false"),
    "double_quant": (bool, "true or false"),
    "dtype": (str, "a string"),
}
_KEYS_OF: dict[str, tuple[str, ...]] = {
    "quantize": tuple(key for key in _KEYS if key != "dtype"),
    "dequantize": ("op", "scheme", "bit_width", "group_size", "dtype", "on_error"),
    "verify": ("op", "scheme", "bit_width", "group_size", "on_error"),
    "amax": ("op", "on_error"),
}

OVERRIDE_KEYS = ("scheme", "bit_width", "packing", "granularity", "group_size", "symmetric", "scale_dtype")
"""Command keys that a request column of the same name may override row by row."""

BIT_WIDTHS = {2: "int2", 4: "int4", 8: "int8"}


def _refuse(field: str, got: Any, expected: Any, why: str = "") -> InvalidRequestError:
    listed = ", ".join(map(str, expected)) if isinstance(expected, list | tuple) else str(expected)
    reason = f"{why}; " if why else ""
    return InvalidRequestError(
        f'{reason}"{field}" is {shown(got)}; expected {listed}', field=field, got=got, expected=expected
    )


_VALUES = {"op": OPERATIONS, "on_error": ON_ERROR, "dtype": RESTORED_DTYPES, "calibration": CALIBRATIONS}


@dataclass(frozen=True, slots=True)
class Command:
    """The command of one call, exactly the contract's keys.

    ``bit_width`` is turned into ``scheme`` where it is short for one, ``double_quant`` into the packing that it is.

    Build it with :meth:`parse` (JSON or a mapping, every value untrusted) or :meth:`build` (keyword arguments).
    None means "not given": the default depends on the scheme. What ``dequantize`` and ``verify`` are given is already
    quantized, each row by its own scheme: there ``scheme`` and ``group_size`` stand for rows that do not name theirs,
    and ``scheme`` may be empty.
    """

    scheme: str = ""
    op: str = "quantize"
    bit_width: int | None = None
    packing: str | None = None
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str | None = None
    calibration: str = "absmax"
    fallback: bool = False
    on_error: str = "row"
    metrics: bool = True
    dtype: str = "float32"

    @classmethod
    def build(cls, **options: Any) -> Command:
        """A command from keyword arguments; None counts as "not given".

        Raises
        ------
        InvalidRequestError
            An unknown key or value, or a combination that the scheme does not have.
        """
        given = {key: value for key, value in options.items() if value is not None}
        try:
            return _built(**given)
        except TypeError:  # a value that is no key of a cache, and none of a command either
            return cls.parse(given)

    @classmethod
    def parse(cls, raw: bytes | str | Mapping[str, Any]) -> Command:
        """A command from the descriptor's bytes, from JSON text or from a mapping.

        Raises
        ------
        InvalidRequestError
            Not a JSON object, an unknown key or value, or a combination that the scheme does not have; the message
            names the key, what was got and what is allowed.
        """
        if isinstance(raw, bytes) and len(raw) <= MAX_KNOWN_BYTES:
            return _parsed(raw)
        return cls._read(dict(raw) if isinstance(raw, Mapping) else load_object(raw))

    @classmethod
    def _read(cls, given: Mapping[str, Any]) -> Command:
        for key, value in given.items():
            if key not in _KEYS:
                raise InvalidRequestError(
                    f'unknown key "{str(key)[:80]}" in the command; expected one of {", ".join(_KEYS)}',
                    field=str(key),
                    got=key,
                    expected=tuple(_KEYS),
                )
            kind, words = _KEYS[key]
            if type(value) is not kind:
                raise _refuse(key, value, words)
        for key, allowed in _VALUES.items():
            if key in given and given[key] not in allowed:
                raise _refuse(key, given[key], allowed, f"unknown {key}")
        op = given.get("op", "quantize")
        for key in given:
            if key not in _KEYS_OF[op]:
                raise _refuse(key, given[key], f'no "{key}"', f"{op} has no such key")
        command = _apply(cls(), given)
        if not command.scheme and (op == "quantize" or "scheme" in given):
            raise InvalidRequestError(
                'the command has no "scheme"; expected one of ' + ", ".join(SCHEMES),
                field="scheme",
                expected=tuple(SCHEMES),
            )
        if command.scheme:
            command.layer_spec()
        return replace(command, op=op)

    def override(self, overrides: Mapping[str, Any]) -> Command:
        """This command with one row's non-null values in place of its own.

        A value of the call that the row's own scheme does not have (the call's ``group_size: 128`` for a ``q8_0``
        row) falls back to that scheme's default; a value of the row itself never does.

        Raises
        ------
        InvalidRequestError
            The row asks for what does not exist.
        """
        return _override(self, tuple(sorted(overrides.items())))

    def layer_spec(self) -> LayerSpec:
        """The scheme and its options with every default filled in.

        Raises
        ------
        InvalidRequestError
            An unknown value, or a combination that the scheme does not have.
        """
        return _layer_spec(self)

    def options(self) -> dict[str, Any]:
        """Keys that are not at their defaults, without ``op``: what ``quantize`` takes beside the weights."""
        defaults = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in asdict(self).items() if key != "op" and value != defaults[key]}

    def to_json(self) -> bytes:
        """The descriptor's bytes: ``op`` and every key that is not at its default."""
        return json.dumps({"op": self.op, **self.options()}).encode()


@lru_cache(maxsize=256, typed=True)
def _built(**given: Any) -> Command:
    return Command.parse(given)


@lru_cache(maxsize=256)
def _parsed(raw: bytes) -> Command:
    """A command of one of the last calls: most calls say the same."""
    return Command._read(load_object(raw))


_EXAMPLE = '{"op": "quantize", "scheme": "int4", "group_size": 128}'


def load_object(
    raw: bytes | str, field: str = "command", example: str = _EXAMPLE, limit: int = MAX_COMMAND_BYTES
) -> dict[str, Any]:
    """What a caller sent as ``field``: a JSON object in UTF-8, in which no object names a key twice.

    Raises
    ------
    InvalidRequestError
        It is none, or longer than ``limit`` bytes.
    """
    if len(raw) > limit:
        raise InvalidRequestError(
            f"the {field} is {len(raw)} bytes long; expected at most {limit}", field=field, got=len(raw), expected=limit
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise InvalidRequestError(f"the {field} names a key twice; expected each key once", field=field)
        return seen

    try:
        # Not the bytes themselves: of these UTF-16, UTF-32 and lone surrogates would pass.
        text = raw.decode() if isinstance(raw, bytes) else raw
        parsed = json.loads(text, object_pairs_hook=unique)
    except InvalidRequestError:
        raise
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            f"the {field} is not JSON; expected a UTF-8 JSON object such as {example}",
            field=field,
            expected="a JSON object",
        ) from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError(
            f"the {field} is a JSON {type(parsed).__name__}; expected a JSON object such as {example}",
            field=field,
            got=type(parsed).__name__,
            expected="a JSON object",
        )
    return parsed


def _apply(command: Command, given: Mapping[str, Any]) -> Command:
    """``command`` with the values of ``given`` in place; ``bit_width`` becomes ``scheme``, a size implies groups."""
    values = {key: value for key, value in given.items() if key not in ("bit_width", "op", "double_quant")}
    if given.get("double_quant") and values.setdefault("packing", NESTED) != NESTED:
        raise _refuse("packing", values["packing"], f'no "packing", or "{NESTED}"', "packing and double_quant disagree")
    width = given.get("bit_width")
    if "scheme" in values and values["scheme"] != command.scheme:
        values["bit_width"] = None
    scheme = SCHEMES.get(values.get("scheme", ""))
    if width is not None and scheme is not None and scheme.bit_widths:
        values["bit_width"] = width
    elif width is not None:
        named = BIT_WIDTHS.get(width)
        if named is None or named not in SCHEMES:
            allowed = [bits for bits, name in BIT_WIDTHS.items() if name in SCHEMES]
            raise _refuse("bit_width", width, allowed, "unknown bit width")
        if values.get("scheme", named) != named:
            raise _refuse("bit_width", width, f'no "bit_width", or scheme "{named}"', "scheme and bit_width disagree")
        values |= {"scheme": named, "bit_width": None}
    if values.get("group_size") is not None and values.get("granularity") is None:
        values["granularity"] = "group"
    elif values.get("granularity") not in (None, "group"):
        values.setdefault("group_size", None)
    return replace(command, **values)


@lru_cache(maxsize=1024)
def _override(command: Command, overrides: tuple[tuple[str, Any], ...]) -> Command:
    given = dict(overrides)
    changed = _apply(command, given)
    scheme = SCHEMES.get(changed.scheme)
    if scheme is not None and changed.scheme != command.scheme:
        fallback: dict[str, Any] = {}
        if changed.granularity is not None and changed.granularity not in scheme.granularities:
            if given.get("granularity") is None and given.get("group_size") is None:
                fallback.update(granularity=None, group_size=None)
        elif changed.group_size not in (None, *scheme.group_sizes) and given.get("group_size") is None:
            fallback["group_size"] = None
        if not changed.symmetric and not scheme.asymmetric and given.get("symmetric") is None:
            fallback["symmetric"] = True
        if changed.scale_dtype not in (None, *scheme.scale_dtypes) and given.get("scale_dtype") is None:
            fallback["scale_dtype"] = None
        if changed.packing not in (None, *scheme.packings) and given.get("packing") is None:
            fallback["packing"] = None
        if changed.fallback and scheme.packing != "gguf":
            fallback["fallback"] = False
        if changed.calibration not in scheme.calibrations:
            fallback["calibration"] = "absmax"
        changed = replace(changed, **fallback)
    changed.layer_spec()
    return changed


@lru_cache(maxsize=1024)
def _layer_spec(command: Command) -> LayerSpec:
    scheme = SCHEMES.get(command.scheme)
    if scheme is None:
        raise InvalidRequestError(
            f"unknown scheme {shown(command.scheme)}; expected one of {', '.join(SCHEMES)}",
            field="scheme",
            got=command.scheme,
            expected=tuple(SCHEMES),
        )
    if command.bit_width not in (None, *scheme.bit_widths):
        raise _refuse("bit_width", command.bit_width, scheme.bit_widths, f"{scheme.name} has no such bit width")
    wanted = command.bit_width or scheme.bits, command.packing or scheme.packing
    if command.packing not in (None, *scheme.packings):
        raise _refuse("packing", command.packing, scheme.packings, f"{scheme.name} has no such packing")
    scheme = next(each for each in (scheme, *scheme.variants) if (each.bits, each.packing) == wanted)
    granularity = command.granularity
    if command.group_size is not None and not scheme.group_sizes:
        raise _refuse("group_size", command.group_size, 'no "group_size"', f"{scheme.name} has no groups")
    if granularity is None:
        granularity = "group" if command.group_size is not None else scheme.granularities[0]
    if granularity not in scheme.granularities:
        raise _refuse("granularity", granularity, scheme.granularities, f"{scheme.name} has no such granularity")
    if granularity != "group" and command.group_size is not None:
        raise _refuse("group_size", command.group_size, f'no "group_size" with granularity "{granularity}"')
    group_size = BLOCK_EDGE if granularity == "block" else 0
    if granularity == "group":
        group_size = scheme.group_sizes[0] if command.group_size is None else command.group_size
        if group_size not in scheme.group_sizes:
            raise _refuse("group_size", group_size, sorted(scheme.group_sizes), f"{scheme.name} has no such group size")
    if not command.symmetric and not scheme.asymmetric:
        raise _refuse("symmetric", command.symmetric, "true", f"{scheme.name} has no zero points")
    if command.scale_dtype is not None and command.scale_dtype not in scheme.scale_dtypes:
        allowed = scheme.scale_dtypes or "no such key"
        raise _refuse("scale_dtype", command.scale_dtype, allowed, f"{scheme.name} has no such scale dtype")
    symmetric = command.symmetric and not scheme.always_zero_points
    if command.fallback and scheme.packing != "gguf":
        raise _refuse("fallback", command.fallback, "false", f"{scheme.name} has no scheme to fall back to")
    if command.calibration not in scheme.calibrations:
        raise _refuse("calibration", command.calibration, scheme.calibrations, f"{scheme.name} has no such calibration")
    return LayerSpec(
        scheme, granularity, group_size, symmetric, command.scale_dtype, command.fallback, command.calibration
    )
