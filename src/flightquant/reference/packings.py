"""Integer codes in other layouts than compressed-tensors': GPTQ's (v1 and v2) and AWQ's, the codes themselves the same.

Both hold ``code + 2^(bits-1)`` in int32 words of a matrix that is the weights' transpose, and behind it the zero
points of all groups, packed likewise. The rules are those of ``QuantLinear.pack`` (auto-gptq) and
``WQLinear_GEMM.from_linear`` (autoawq).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flightquant.errors import LayerError
from flightquant.reference import integer
from flightquant.reference.numeric import F32
from flightquant.schemes import LayerSpec

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output column, of eight, in each four bits of a word, from the lowest ones up."""

Words = npt.NDArray[np.uint32]


def _stream(values: npt.NDArray[np.uint8], bits: int) -> Words:
    """Values of shape (rows, n) as a dense stream in each row, the least significant bit first; n in whole words."""
    planes = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(planes.reshape(len(values), -1), axis=1, bitorder="little").view("<u4")


def _values(words: Words, bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`_stream`."""
    planes = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    weights = np.uint8(1) << np.arange(bits, dtype=np.uint8)
    values: npt.NDArray[np.uint8] = (planes.reshape(len(words), -1, bits) * weights).sum(axis=-1, dtype=np.uint8)
    return values


def _interleaved(values: npt.NDArray[np.uint8]) -> Words:
    """AWQ's words of shape (rows, n / 8)."""
    eights = values.reshape(len(values), -1, 8)[..., AWQ_ORDER]
    return _stream(eights.reshape(len(values), -1), 4)


def pack(signed: integer.Codes, zeros: F32, spec: LayerSpec) -> npt.NDArray[np.uint8]:
    """Signed codes of shape (rows, cols) and zero points of shape (rows, groups), 0 where symmetric, as bytes.

    Raises
    ------
    LayerError
        GPTQ v1 stores a zero point less 1, and one of them is 0.
    """
    bits = spec.scheme.bits
    middle = 1 << (bits - 1)
    unsigned = (signed.astype(np.int16) + middle).astype(np.uint8)
    points = (zeros.astype(np.int16) + middle).T.astype(np.uint8)
    if spec.scheme.packing == "awq":
        words, point_words = _interleaved(unsigned.T), _interleaved(points)
    else:
        if spec.scheme.packing == "gptq":
            if points.min() == 0:
                raise LayerError("unsupported", "a zero point is 0, which GPTQ's first version cannot hold")
            points = points - np.uint8(1)
        words, point_words = _stream(unsigned, bits).T, _stream(points, bits)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in (words, point_words)])


def unpack(packed: npt.NDArray[np.uint8], spec: LayerSpec, rows: int, cols: int) -> integer.Codes:
    """Signed codes of shape (rows, cols)."""
    bits = spec.scheme.bits
    words = packed[: rows * cols * bits // 8].view("<u4")
    if spec.scheme.packing == "awq":
        eights = _values(words.reshape(cols, -1), 4).reshape(cols, -1, 8)
        ordered = np.empty_like(eights)
        ordered[..., AWQ_ORDER] = eights
        unsigned = ordered.reshape(cols, rows).T
    else:
        unsigned = _values(words.reshape(-1, rows).T, bits)
    return (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def join(parts: Sequence[Any], rows: list[int], spec: LayerSpec, cols: int) -> bytes:
    """The bytes of a layer from those (any buffers) of its parts, each of so many rows, a multiple of 32."""
    bits = spec.scheme.bits
    # Behind each other stand lines of words, each of so many weights of one part: its columns of the transpose.
    words = [
        np.frombuffer(part, "<u4", count * cols * bits // 32).reshape(
            (cols, -1) if spec.scheme.packing == "awq" else (-1, count)
        )
        for part, count in zip(parts, rows, strict=True)
    ]
    points = [
        np.frombuffer(part, "<u4", offset=count * cols * bits // 8).reshape(-1, count * bits // 32)
        for part, count in zip(parts, rows, strict=True)
    ]
    return b"".join(np.concatenate(each, axis=1).tobytes() for each in (words, points))
