"""The schemes: what each stores, in which packings and granularities, and how one layer is quantized with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
GRANULARITIES = ("tensor", "channel", "group", "block")
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
    def calibrations(self) -> tuple[str, ...]:
        """How scales and zero points may be found, the default first."""
        if self.packing == "hqq":
            return ("absmax", "proximal")
        return ("absmax", "mse") if self.name.startswith("int") and not self.rule else ("absmax",)

    @property
    def fold(self) -> int:
        """Codes of as many groups, far apart, in each packed byte or word."""
        return {4: 2, 3: 10, 2: 4}.get(self.bits, 1) if self.packing == "hqq" else 1

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
        group_sizes=(*scheme.group_sizes, 16),
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


def _hqq(bits: int) -> Scheme:
    return Scheme(
        name=f"hqq{bits}",
        bits=bits,
        packing="hqq",
        granularities=("group",),
        group_sizes=(64, 32, 128),
        asymmetric=True,
        scale_dtypes=("float32",),
        exact_with="hqq 0.2.8 with axis=1 on a CPU, optimize=False (True: calibration proximal, see its page)",
        summary=f"HQQ's {bits}-bit codes with a float scale and zero point for each group, for hqq and transformers",
        always_zero_points=True,
        stored_bits=8,
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
        *(_hqq(bits) for bits in (8, 4, 3, 2)),
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
    ``fallback``: another scheme is taken for rows that no block divides. ``calibration``: how a scale's range or a
    zero point is found.
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
