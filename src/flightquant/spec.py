"""What can be asked for: the schemes, and the command of one call as a frozen dataclass.

``Command.parse`` is the only place where a command's keys, values and combinations are judged, for the service, the
client and the local call alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from flightquant.errors import InvalidRequestError

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
GRANULARITIES = ("tensor", "channel", "group", "block")
OPERATIONS = ("quantize",)
ON_ERROR = ("row", "abort")
MAX_COMMAND_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Scheme:
    """One format: its names on the wire and what it allows.

    Attributes
    ----------
    bits : int
        Bits of one code, without its share of the scale.
    granularities : tuple of str
        What one scale may cover; the first is the default.
    group_sizes : tuple of int
        Sizes allowed with granularity ``group``; the first is the default. Empty where there is no such choice.
    asymmetric : bool
        Whether ``symmetric: false`` exists.
    scale_dtypes : tuple of str
        Empty where the format fixes its own.
    block_bytes : int
        Bytes of one packed block of ``group_sizes[0]`` weights that holds its own scale; 0 where scales are apart.
    """

    name: str
    bits: int
    packing: str
    granularities: tuple[str, ...]
    group_sizes: tuple[int, ...]
    asymmetric: bool
    scale_dtypes: tuple[str, ...]
    exact_with: str
    summary: str
    block_bytes: int = 0


def _integer(bits: int, packing: str, first: str) -> Scheme:
    granularities = (first, *(name for name in ("tensor", "channel", "group") if name != first))
    return Scheme(
        name=f"int{bits}",
        bits=bits,
        packing=packing,
        granularities=granularities,
        group_sizes=(128, 32, 64, 256),
        asymmetric=True,
        scale_dtypes=SCALE_DTYPES,
        exact_with="compressed-tensors 0.20",
        summary=f"{bits}-bit integers with a float scale, for vLLM and transformers through compressed-tensors",
    )


def _gguf(name: str, bits: int, block_bytes: int) -> Scheme:
    return Scheme(
        name=name,
        bits=bits,
        packing="gguf",
        granularities=("group",),
        group_sizes=(32,),
        asymmetric=False,
        scale_dtypes=(),
        exact_with="ggml 0.25 and gguf 0.19",
        summary=f"ggml's {name.upper()} blocks of 32 weights in {block_bytes} bytes, for llama.cpp",
        block_bytes=block_bytes,
    )


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _integer(8, "ct-int8", "channel"),
        _integer(4, "ct-int32", "group"),
        _gguf("q8_0", 8, 34),
        _gguf("q4_0", 4, 18),
    )
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How one layer is quantized, with every default filled in.

    ``group_size`` is 0 unless the granularity is ``group``; ``scale_dtype`` is None for "the weights' own dtype".
    """

    scheme: Scheme
    granularity: str
    group_size: int
    symmetric: bool
    scale_dtype: str | None

    def scale_dtype_for(self, weight_dtype: str) -> str:
        """The dtype to which the scales are rounded for weights of ``weight_dtype``."""
        if self.scheme.block_bytes:
            return "float16"
        if self.scale_dtype is not None:
            return self.scale_dtype
        return "float32" if weight_dtype == "float64" else weight_dtype

    def arithmetic_for(self, weight_dtype: str) -> str:
        """The dtype in which quotients are rounded: the weights' own only if the scales are of it too (CONTRACT)."""
        if self.scheme.block_bytes or self.scale_dtype_for(weight_dtype) != weight_dtype:
            return "float32"
        return weight_dtype


_KEYS: dict[str, tuple[type, str]] = {
    "op": (str, "a string"),
    "scheme": (str, "a string"),
    "bit_width": (int, "an integer"),
    "granularity": (str, "a string"),
    "group_size": (int, "an integer"),
    "symmetric": (bool, "true or false"),
    "scale_dtype": (str, "a string"),
    "on_error": (str, "a string"),
    "metrics": (bool, "true or false"),
}

OVERRIDE_KEYS = ("scheme", "bit_width", "granularity", "group_size", "symmetric", "scale_dtype")
"""Command keys that a request column of the same name may override row by row."""

BIT_WIDTHS = {2: "int2", 4: "int4", 8: "int8"}


def _refuse(field: str, got: Any, expected: Any, why: str = "") -> InvalidRequestError:
    listed = ", ".join(map(str, expected)) if isinstance(expected, list | tuple) else str(expected)
    reason = f"{why}; " if why else ""
    return InvalidRequestError(
        f'{reason}"{field}" is {_shown(got)}; expected {listed}', field=field, got=got, expected=expected
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f'"{text[:80]}"' if isinstance(value, str) else text[:80]


@dataclass(frozen=True, slots=True)
class Command:
    """The command of one call, exactly the contract's keys (``bit_width`` is turned into ``scheme``).

    Build it with :meth:`parse` (JSON or a mapping, every value untrusted) or :meth:`build` (keyword arguments).
    None means "not given": the default depends on the scheme.
    """

    scheme: str
    op: str = "quantize"
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str | None = None
    on_error: str = "row"
    metrics: bool = True

    @classmethod
    def build(cls, **options: Any) -> Command:
        """A command from keyword arguments; None counts as "not given".

        Raises
        ------
        InvalidRequestError
            An unknown key or value, or a combination that the scheme does not have.
        """
        return cls.parse({key: value for key, value in options.items() if value is not None})

    @classmethod
    def parse(cls, raw: bytes | str | Mapping[str, Any]) -> Command:
        """A command from the descriptor's bytes, from JSON text or from a mapping.

        Raises
        ------
        InvalidRequestError
            Not a JSON object, an unknown key or value, or a combination that the scheme does not have; the message
            names the key, what was got and what is allowed.
        """
        given = dict(raw) if isinstance(raw, Mapping) else _load_object(raw)
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
        for key, allowed in (("op", OPERATIONS), ("on_error", ON_ERROR)):
            if key in given and given[key] not in allowed:
                raise _refuse(key, given[key], allowed, f"unknown {key}")
        command = _apply(cls(scheme=""), given)
        if not command.scheme:
            raise InvalidRequestError(
                'the command has no "scheme"; expected one of ' + ", ".join(SCHEMES),
                field="scheme",
                expected=tuple(SCHEMES),
            )
        command.layer_spec()
        return replace(command, op=given.get("op", "quantize"))

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

    def to_json(self) -> bytes:
        """The descriptor's bytes: every key that is not at its default."""
        defaults = {field.name: field.default for field in fields(self)}
        given = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        return json.dumps({"op": self.op, **given}).encode()


def _load_object(raw: bytes | str) -> dict[str, Any]:
    if len(raw) > MAX_COMMAND_BYTES:
        raise InvalidRequestError(
            f"the command is {len(raw)} bytes long; expected at most {MAX_COMMAND_BYTES}",
            field="command",
            got=len(raw),
            expected=MAX_COMMAND_BYTES,
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise InvalidRequestError("the command names a key twice; expected each key once", field="command")
        return seen

    try:
        parsed = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            "the command is not JSON; expected a UTF-8 JSON object such as "
            '{"op": "quantize", "scheme": "int4", "group_size": 128}',
            field="command",
            expected="a JSON object",
        ) from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError(
            f"the command is a JSON {type(parsed).__name__}; expected a JSON object",
            field="command",
            got=type(parsed).__name__,
            expected="a JSON object",
        )
    return parsed


def _apply(command: Command, given: Mapping[str, Any]) -> Command:
    """``command`` with the values of ``given`` in place; ``bit_width`` becomes ``scheme``, a size implies groups."""
    values = {key: value for key, value in given.items() if key not in ("bit_width", "op")}
    width = given.get("bit_width")
    if width is not None:
        named = BIT_WIDTHS.get(width)
        if named is None or named not in SCHEMES:
            allowed = [bits for bits, name in BIT_WIDTHS.items() if name in SCHEMES]
            raise _refuse("bit_width", width, allowed, "unknown bit width")
        if values.get("scheme", named) != named:
            raise _refuse("bit_width", width, f'no "bit_width", or scheme "{named}"', "scheme and bit_width disagree")
        values["scheme"] = named
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
        if changed.scale_dtype is not None and not scheme.scale_dtypes and given.get("scale_dtype") is None:
            fallback["scale_dtype"] = None
        changed = replace(changed, **fallback)
    changed.layer_spec()
    return changed


@lru_cache(maxsize=1024)
def _layer_spec(command: Command) -> LayerSpec:
    scheme = SCHEMES.get(command.scheme)
    if scheme is None:
        raise InvalidRequestError(
            f"unknown scheme {_shown(command.scheme)}; expected one of {', '.join(SCHEMES)}",
            field="scheme",
            got=command.scheme,
            expected=tuple(SCHEMES),
        )
    granularity = command.granularity
    if granularity is None:
        granularity = "group" if command.group_size is not None else scheme.granularities[0]
    if granularity not in scheme.granularities:
        raise _refuse("granularity", granularity, scheme.granularities, f"{scheme.name} has no such granularity")
    if granularity != "group" and command.group_size is not None:
        raise _refuse("group_size", command.group_size, f'no "group_size" with granularity "{granularity}"')
    group_size = 0
    if granularity == "group":
        group_size = scheme.group_sizes[0] if command.group_size is None else command.group_size
        if group_size not in scheme.group_sizes:
            raise _refuse("group_size", group_size, sorted(scheme.group_sizes), f"{scheme.name} has no such group size")
    if not command.symmetric and not scheme.asymmetric:
        raise _refuse("symmetric", command.symmetric, "true", f"{scheme.name} has no zero points")
    if command.scale_dtype is not None and command.scale_dtype not in scheme.scale_dtypes:
        allowed = scheme.scale_dtypes or "no such key"
        raise _refuse("scale_dtype", command.scale_dtype, allowed, f"{scheme.name} has no such scale dtype")
    return LayerSpec(scheme, granularity, group_size, command.symmetric, command.scale_dtype)
