"""What can be asked for: the schemes, and the command of one call as a frozen dataclass.

``Command.parse`` is the only place where a command's keys, values and combinations are judged, for the service, the
client and the local call alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from flightquant.errors import InvalidRequestError

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
GRANULARITIES = ("tensor", "channel", "group", "block")
OPERATIONS = ("quantize", "dequantize", "verify", "amax")
RESTORED_DTYPES = ("float32", "float16")
CALIBRATIONS = ("absmax", "mse")
ON_ERROR = ("row", "abort")
MAX_COMMAND_BYTES = 64 * 1024
BLOCK_EDGE = 128
"""Rows and columns of one block of granularity ``block``."""

GPTQ = ("gptq", "gptq-v2")
TRANSPOSED = (*GPTQ, "awq")
"""Packings of the weights' transpose."""
NESTED = "bnb-nested"
"""The packing of codes behind which their scales stand, quantized too."""

Size = TypeVar("Size", int, npt.NDArray[np.int64])


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
    always_zero_points : bool
        Whether there are zero points whatever ``symmetric`` says.
    stored_bits : int
        Bits that one code takes up; 0 for ``bits``.
    rule : str
        What makes the codes, where a packing comes with a rule of its own.
    row_tail : int
        Bytes behind each row, which hold its scale and bias.
    variants : tuple of Scheme
        The same scheme in other bit widths or packings, to be had by ``bit_width`` or ``packing``.
    flat : bool
        Whether groups run over the flat tensor, so that they may cross rows and the last one may be short.
    asymmetric : bool
        Whether ``symmetric: false`` exists.
    scale_dtypes : tuple of str
        Empty where the format fixes its own; the only one, where there is one, is the default.
    block_bytes : int
        Bytes of one packed block of ``group_sizes[0]`` weights that holds its own scale; 0 where scales are apart.
    fixed_scales : str
        The dtype of scales apart where the format fixes one that weights cannot have: ``e8m0`` (powers of two) or
        ``e4m3`` (and one float32 scale of the whole tensor after the groups').
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
    flat: bool = False
    fixed_scales: str = ""
    always_zero_points: bool = False
    stored_bits: int = 0
    rule: str = ""
    row_tail: int = 0
    variants: tuple[Scheme, ...] = ()

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """What ``bit_width`` may say, the default first; empty where the name says it all."""
        widths = tuple(dict.fromkeys((self.bits, *(variant.bits for variant in self.variants))))
        return widths if len(widths) > 1 else ()

    @property
    def packings(self) -> tuple[str, ...]:
        """What ``packing`` may say, the default first."""
        return tuple(dict.fromkeys((self.packing, *(variant.packing for variant in self.variants))))

    @property
    def transposed(self) -> bool:
        """Whether words run over several rows, zero points behind them: rows and columns are multiples of 32."""
        return self.packing in TRANSPOSED

    @property
    def family(self) -> str:
        """What makes the codes."""
        return self.rule or self.name

    @property
    def scales_inside(self) -> bool:
        """Whether scales stand among the packed bytes."""
        return self.block_bytes > 0 or self.row_tail > 0

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too: their codes stand behind the weights'."""
        return self.packing == NESTED

    @property
    def calibrates(self) -> bool:
        """Whether the range of a scale may be searched."""
        return self.name.startswith("int")

    @property
    def whole_scale(self) -> bool:
        """Whether the groups' scales are followed by one of the whole tensor."""
        return self.fixed_scales == "e4m3"

    def row_bytes(self, cols: Size) -> Size:
        """Packed bytes of a row of ``cols`` weights, where rows are packed one by one."""
        bits = self.stored_bits or self.bits
        if self.row_tail:
            return cols * bits // 8 + self.row_tail
        return cols if bits == 8 else -(-cols * bits // 32) * 4


def _integer(bits: int, packing: str = "ct-int32", first: str = "group", others: tuple[str, ...] = ()) -> Scheme:
    granularities = (first, *(name for name in ("tensor", "channel", "group") if name != first))
    scheme = Scheme(
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
    variants = [_transposed(scheme, name) for name in others]
    if bits in (2, 4, 8):
        variants += [_onnx(scheme), _fbgemm(scheme)]
    return replace(scheme, variants=tuple(variants))


def _onnx(scheme: Scheme) -> Scheme:
    """An integer scheme's name for what ONNX Runtime makes by its own rule."""
    return replace(
        scheme,
        packing="onnx",
        rule="onnx",
        granularities=("group",),
        exact_with="onnxruntime 1.31.1",
        summary=f"{scheme.bits}-bit integers with a float scale of either sign, for ONNX Runtime's MatMulNBits",
    )


def _fbgemm(scheme: Scheme) -> Scheme:
    """An integer scheme's name for FBGEMM's rows."""
    return replace(
        scheme,
        packing="fbgemm",
        rule="fbgemm",
        granularities=("channel",),
        group_sizes=(),
        asymmetric=False,
        scale_dtypes=(),
        exact_with="FBGEMM in torch 2.13, but for the sign of a bias of 0",
        summary=f"{scheme.bits}-bit integers with scale and bias behind each row, for FBGEMM's embedding tables",
        row_tail=8 if scheme.bits == 8 else 4,
    )


def _transposed(scheme: Scheme, packing: str) -> Scheme:
    """An integer scheme's codes in GPTQ's or AWQ's layout."""
    library = "autoawq 0.2" if packing == "awq" else "auto-gptq 0.7"
    return replace(
        scheme,
        packing=packing,
        granularities=tuple(name for name in scheme.granularities if name != "tensor"),
        exact_with=f"{scheme.exact_with}'s codes, packed by {library}",
        summary=f"{scheme.bits}-bit integers with a float scale in {library}'s layout, for vLLM and transformers",
    )


def _float8(name: str, exact_with: str, largest: int) -> Scheme:
    return Scheme(
        name=f"fp8_{name}",
        bits=8,
        packing="fp8",
        granularities=("channel", "tensor", "block"),
        group_sizes=(),
        asymmetric=False,
        scale_dtypes=SCALE_DTYPES,
        exact_with=exact_with,
        summary=f"8-bit floats ({name}, up to {largest}) with a float scale, for vLLM and PyTorch",
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


def _searched(name: str, bits: int, block: int, block_bytes: int) -> Scheme:
    return Scheme(
        name=name,
        bits=bits,
        packing="gguf",
        granularities=("group",),
        group_sizes=(block,),
        asymmetric=False,
        scale_dtypes=(),
        exact_with="ggml 0.25.3, plain x86-64 build",
        summary=f"ggml's {name.upper()} blocks of {block} weights in {block_bytes} bytes, with searched scales, for "
        "llama.cpp",
        block_bytes=block_bytes,
    )


def _codebook(name: str, summary: str) -> Scheme:
    scheme = Scheme(
        name=name,
        bits=4,
        packing="bnb-hi-first",
        granularities=("group",),
        group_sizes=(64, 32, 128, 256, 512, 1024, 2048, 4096),
        asymmetric=False,
        scale_dtypes=("float32",),
        exact_with="bitsandbytes 0.50.2 on a CPU",
        summary=f"{summary} with a float32 scale for each block of the flat tensor, for transformers and QLoRA",
        flat=True,
    )
    nested = replace(
        scheme,
        packing=NESTED,
        exact_with="bitsandbytes 0.50.2 with compress_statistics on a CPU of x86-64, one thread of torch 2.13",
        summary=f"{summary} with an 8-bit scale for each block of the flat tensor, for transformers and QLoRA",
    )
    return replace(scheme, variants=(nested,))


def _blockwise8() -> Scheme:
    return Scheme(
        name="bnb8",
        bits=8,
        packing="bnb-8bit",
        granularities=("group",),
        group_sizes=(4096, 64, 128, 256, 512, 1024, 2048),
        asymmetric=False,
        scale_dtypes=("float32",),
        exact_with="bitsandbytes 0.50.2 on a CPU",
        summary="256 values of seven decades with a float32 scale for each block of the flat tensor, for bitsandbytes",
        flat=True,
    )


def _with_ggml(scheme: Scheme) -> Scheme:
    """``mxfp4`` with ggml's rule and blocks as a variant."""
    ggml = replace(
        scheme,
        packing="gguf",
        rule="mxfp4-ggml",
        exact_with="ggml 0.25 and gguf 0.19",
        summary="ggml's MXFP4 blocks of 32 weights in 17 bytes, for llama.cpp",
        block_bytes=17,
        fixed_scales="",
    )
    return replace(scheme, variants=(ggml,))


def _micro(name: str, bits: int, packing: str, group: int, scales: str, readers: str) -> Scheme:
    kind = {"e8m0": "a power of two", "e4m3": "an 8-bit float"}[scales]
    return Scheme(
        name=name,
        bits=bits,
        packing=packing,
        granularities=("group",),
        group_sizes=(group,),
        asymmetric=False,
        scale_dtypes=(),
        exact_with="compressed-tensors 0.20",
        summary=f"{bits}-bit floats with {kind} for each {group} weights, for {readers}",
        fixed_scales=scales,
    )


def _arrowquant(bits: int, variants: tuple[Scheme, ...] = ()) -> Scheme:
    return Scheme(
        name="arrowquant",
        bits=bits,
        packing="bytes",
        granularities=("channel", "tensor", "group"),
        group_sizes=(128, 32, 64, 256),
        asymmetric=True,
        scale_dtypes=("float32",),
        exact_with="arrow_quant_v2's source of 2026-02",
        summary="2, 4 or 8-bit codes in a byte each with a float scale and zero point, for arrow_quant_v2's readers",
        always_zero_points=True,
        stored_bits=8,
        variants=variants,
    )


def _mlx(bits: int, variants: tuple[Scheme, ...] = ()) -> Scheme:
    return Scheme(
        name="mlx",
        bits=bits,
        packing="mlx",
        granularities=("group",),
        group_sizes=(64, 32, 128),
        asymmetric=True,
        scale_dtypes=SCALE_DTYPES,
        exact_with="mlx 0.32.4 on a CPU",
        summary="MLX's affine codes of 2 to 8 bits with a scale and a bias for each group, for mlx-lm on Apple silicon",
        always_zero_points=True,
        variants=variants,
    )


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _integer(8, "ct-int8", "channel", others=GPTQ),
        *(_integer(bits) for bits in (7, 6, 5)),
        _integer(4, others=(*GPTQ, "awq")),
        *(_integer(bits, others=GPTQ) for bits in (3, 2)),
        _float8("e4m3", "compressed-tensors 0.20", 448),
        _float8("e5m2", "torch 2.13", 57344),
        _gguf("q8_0", 8, 34),
        _gguf("q4_0", 4, 18),
        _codebook("nf4", "16 values, quantiles of the normal distribution,"),
        _codebook("fp4", "4-bit floats"),
        _blockwise8(),
        _gguf("q4_1", 4, 20),
        _gguf("q5_0", 5, 22),
        _gguf("q5_1", 5, 24),
        _searched("q6_k", 6, 256, 210),
        _searched("q5_k", 5, 256, 176),
        _searched("q4_k", 4, 256, 144),
        _searched("q3_k", 3, 256, 110),
        _searched("q2_k", 2, 256, 84),
        _searched("iq4_nl", 4, 32, 18),
        _with_ggml(_micro("mxfp4", 4, "mx-lo-first", 32, "e8m0", "vLLM")),
        _micro("mxfp8", 8, "mx-fp8", 32, "e8m0", "vLLM"),
        _micro("nvfp4", 4, "nvfp4-lo-first", 16, "e4m3", "vLLM on NVIDIA's Blackwell"),
        _mlx(4, variants=tuple(_mlx(bits) for bits in (2, 3, 5, 6, 8))),
        _arrowquant(4, variants=(_arrowquant(2), _arrowquant(8))),
    )
}


FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama.cpp takes for rows that are no multiple of 256, but of 32."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How one layer is quantized, with every default filled in.

    ``scheme`` is the variant asked for. ``group_size`` is 128, the edge of a block, with granularity ``block``, and 0
    unless the granularity is that or ``group``; ``scale_dtype`` is None for "the weights' own dtype".
    ``fallback``: another scheme is taken for rows that no block divides. ``calibration``: how a scale's range is found.
    """

    scheme: Scheme
    granularity: str
    group_size: int
    symmetric: bool
    scale_dtype: str | None
    fallback: bool = False
    calibration: str = "absmax"

    def fitting(self, cols: int) -> LayerSpec:
        """These options, or with ``fallback`` those of the scheme in their place for rows of ``cols`` weights."""
        name = FALLBACKS.get(self.scheme.name)
        if not self.fallback or name is None or cols % self.group_size == 0:
            return self
        scheme = SCHEMES[name]
        if cols % scheme.group_sizes[0]:
            return self
        return LayerSpec(scheme, "group", scheme.group_sizes[0], True, None)

    @property
    def takes_magnitude(self) -> bool:
        """Whether parts of a tensor can be told its largest magnitude (``global_amax``), and need it to be alike."""
        return (self.granularity == "tensor" and self.symmetric) or self.scheme.whole_scale

    def scale_dtype_for(self, weight_dtype: str) -> str:
        """The dtype to which the scales are rounded for weights of ``weight_dtype``."""
        if self.scheme.rule == "mxfp4-ggml":
            return "e8m0"
        if self.scheme.scales_inside:
            return "float32" if self.scheme.row_tail == 8 else "float16"
        if self.scheme.fixed_scales:
            return self.scheme.fixed_scales
        if self.scale_dtype is not None:
            return self.scale_dtype
        if len(self.scheme.scale_dtypes) == 1:
            return self.scheme.scale_dtypes[0]
        return "float32" if weight_dtype == "float64" else weight_dtype

    def arithmetic_for(self, weight_dtype: str) -> str:
        """The dtype in which quotients are rounded: the weights' own only if the scales are of it too (CONTRACT)."""
        if self.scheme.fixed_scales:
            return "float32" if weight_dtype == "float64" else weight_dtype
        if self.scheme.scales_inside or self.scale_dtype_for(weight_dtype) != weight_dtype:
            return "float32"
        return weight_dtype


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
        f'{reason}"{field}" is {_shown(got)}; expected {listed}', field=field, got=got, expected=expected
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f'"{text[:80]}"' if isinstance(value, str) else text[:80]


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
        if not scheme.calibrates:
            fallback["calibration"] = "absmax"
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
    if command.calibration != "absmax" and not scheme.calibrates:
        raise _refuse("calibration", command.calibration, "absmax", f"{scheme.name} has no such calibration")
    return LayerSpec(
        scheme, granularity, group_size, symmetric, command.scale_dtype, command.fallback, command.calibration
    )
