"""Memory for the kernels to write answers into, and Arrow columns around it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._memory import MIN_BYTES, OutputMemory
from flightquant.cython_core.answer import with_nulls
from flightquant.errors import TooLargeError

MAX_ANSWER_BYTES = 2**31 - 1


def output_memory(nbytes: int) -> pa.Buffer:
    """Memory that nobody has written to yet."""
    return pa.allocate_buffer(nbytes) if nbytes < MIN_BYTES else pa.py_buffer(OutputMemory(nbytes))


class Buffer:
    """Memory for one output column: values of ``width`` bytes, those of row i from ``offsets[i]`` on.

    Parameters
    ----------
    field, advice : str
        What an error says if a column cannot hold so much: what was too large, and what to send instead.
    """

    def __init__(self, offsets: npt.NDArray[np.int64], width: int, field: str, advice: str) -> None:
        self._offsets = offsets
        self._length = int(offsets[-1])
        nbytes = self._length * width
        if nbytes > MAX_ANSWER_BYTES:
            raise TooLargeError(
                f"the answer to one batch would have {nbytes} bytes; expected at most {MAX_ANSWER_BYTES} ({advice})",
                field=field,
                got=nbytes,
                expected=MAX_ANSWER_BYTES,
            )
        self._buffer = output_memory(nbytes)
        self.address: int = self._buffer.address

    def as_lists(self, kind: pa.DataType, values: pa.DataType | None, valid: npt.NDArray[np.bool_] | None) -> pa.Array:
        """The memory as a column of ``kind``: binary, or a list of ``values``; null where not ``valid``."""
        offsets = pa.py_buffer(self._offsets.astype(np.int32))
        mask, nulls = (None, 0) if valid is None else with_nulls(valid)
        count = len(self._offsets) - 1
        if values is None:
            return pa.Array.from_buffers(kind, count, [mask, offsets, self._buffer], nulls)
        child = pa.Array.from_buffers(values, self._length, [None, self._buffer], 0)
        return pa.Array.from_buffers(kind, count, [mask, offsets], nulls, children=[child])
