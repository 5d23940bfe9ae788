"""What a batch asks for, row by row, as the kernels' jobs, and the memory that they write into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flightquant.cython_core._kernels import DTYPES, FAMILIES, PACKINGS
from flightquant.cython_core._quantize import JOB_WIDTH, Plan, lay_out
from flightquant.cython_core.output import Buffer, output_memory
from flightquant.cython_core.validate import CheckedBatch, Request, read_global_amax, read_importance, read_overrides
from flightquant.errors import InvalidRequestError
from flightquant.reference import fits_transpose, whole_words
from flightquant.schemes import LayerSpec
from flightquant.spec import Command


class Work:
    """One batch's jobs: what every row asks for, the output memory, the results.

    The jobs are the rows that can be quantized; ``rows`` holds their row indices. Every output buffer is one piece of
    memory for the whole batch, in row order, so that it becomes an Arrow column as it is.
    """

    def __init__(self, batch: pa.RecordBatch, checked: CheckedBatch, command: Command, request: Request) -> None:
        self.checked = checked
        self.request = request
        self.specs: list[LayerSpec] = [command.layer_spec()]
        self._numbers = {self.specs[0]: 0}
        self.spec_of_row = self._resolve(read_overrides(batch, request), command)
        self._fall_back()
        amax = read_global_amax(batch, request, checked)
        importance, self._importance_holder = read_importance(batch, request, checked)
        self._refuse_uneven()
        count = batch.num_rows
        failed = np.zeros(count, np.uint8)
        if checked.failures:
            failed[list(checked.failures)] = 1
        jobs = np.empty((count, JOB_WIDTH), np.int64)
        rows = np.empty(count, np.int64)
        offsets = np.empty((3, count + 1), np.int64)
        self.bytes_out = np.empty(count, np.int64)
        made, scratch, self.total_out = lay_out(
            spec_table(tuple(self.specs), request.dtype),
            self.spec_of_row,
            checked.starts,
            checked.lengths,
            importance,
            checked.matrix,
            failed,
            jobs,
            rows,
            offsets,
            self.bytes_out,
        )
        self._jobs, self.rows = jobs[:made], rows[:made]
        self._given_amax = amax[self.rows]
        self.data, self.scales, self.zeros = (
            Buffer(column, width, "weights", "send fewer layers at a time, or a layer in parts with row_offset")
            for column, width in zip(offsets, (1, 4, 4), strict=True)
        )
        self.sums = np.zeros((made, 4))
        self.first_bad = np.empty(made, np.int64)
        self.unheld = np.empty(made, np.int64)
        self.nanoseconds = np.empty(made, np.int64)
        self.kernel_ns = 0
        self._scratch = output_memory(scratch)

    def plan(self, isa: str, measure: bool) -> Plan:
        """The kernels' plan of all jobs."""
        outputs = (self.data.address, self.scales.address, self.zeros.address, self._scratch.address)
        return Plan(self._jobs, self._given_amax, isa, measure, *outputs, self)

    def _resolve(self, overrides: Sequence[Mapping[str, Any]] | None, command: Command) -> npt.NDArray[np.int64]:
        """Index into ``specs`` of every row; a row that asks for what does not exist fails."""
        chosen = np.zeros(len(self.checked.lengths), np.int64)
        if overrides is None:
            return chosen
        for i, given in enumerate(overrides):
            if not given:
                continue
            try:
                spec = command.override(given).layer_spec()
            except InvalidRequestError as error:
                self.checked.failures.setdefault(i, ("unsupported", error.message))
                continue
            chosen[i] = self._number(spec)
        return chosen

    def _number(self, spec: LayerSpec) -> int:
        """Index of a spec in the list, to which it is added."""
        number = self._numbers.setdefault(spec, len(self.specs))
        if number == len(self.specs):
            self.specs.append(spec)
        return number

    def _fall_back(self) -> None:
        """Give rows that no block divides the scheme that takes the place of theirs, where that is asked for."""
        cols = self.checked.matrix[:, 1]
        for number in [k for k, spec in enumerate(self.specs) if spec.fallback]:
            spec = self.specs[number]
            for i in np.flatnonzero((self.spec_of_row == number) & (cols > 0) & (cols % spec.group_size != 0)):
                self.spec_of_row[i] = self._number(spec.fitting(int(cols[i])))

    def _refuse_uneven(self) -> None:
        """A group never crosses a row, so it must divide it, unless groups run over the flat tensor."""
        self._refuse_part_words()
        divisors = [row_divisor(spec) for spec in self.specs]
        if divisors == [1]:
            return
        sizes = np.array(divisors)[self.spec_of_row]
        cols = self.checked.matrix[:, 1]
        for i in np.flatnonzero((cols > 0) & (cols % sizes != 0)):
            spec = self.specs[self.spec_of_row[i]]
            text = (
                f"a row of {cols[i]} weights is no multiple of {spec.scheme.name}'s group size {sizes[i]}; expected "
                f"a last axis that {sizes[i]} divides, or another granularity or scheme"
            )
            self.checked.failures.setdefault(int(i), ("unsupported", text))

    def _refuse_part_words(self) -> None:
        """Words over several rows need multiples of 32 in both axes, folded bytes as many groups in each part."""
        joining = [spec.scheme.transposed or spec.scheme.fold > 1 for spec in self.specs]
        if not any(joining):
            return
        for i in np.flatnonzero(np.array(joining)[self.spec_of_row]):
            rows, cols = map(int, self.checked.matrix[i])
            spec = self.specs[self.spec_of_row[i]]
            if not fits_transpose(spec, rows, cols):
                text = (
                    f"a matrix of {rows} x {cols} does not fill whole words of {spec.scheme.packing}; expected "
                    f"{whole_words(spec)}"
                )
                self.checked.failures.setdefault(int(i), ("unsupported", text))

    def note_failures(self) -> None:
        """Turn rows in which the kernels met NaN or infinity, or a zero point without a place, into failures."""
        for k in np.flatnonzero(self.first_bad >= 0):
            text = f"weight {self.first_bad[k]} is NaN or infinite as float32; expected finite weights"
            self.checked.failures.setdefault(int(self.rows[k]), ("non_finite", text))
        for k in np.flatnonzero(self.unheld >= 0):
            text = (
                f"zero point {self.unheld[k]} is 0, which GPTQ's first version cannot hold; expected packing "
                '"gptq-v2", symmetric codes, or weights below 0 in every group'
            )
            self.checked.failures.setdefault(int(self.rows[k]), ("unsupported", text))
        for k in np.flatnonzero((self.first_bad >= 0) | (self.unheld >= 0)):
            self.sums[k] = 0
            self.total_out -= int(self.bytes_out[self.rows[k]])
            self.bytes_out[self.rows[k]] = 0

    @cached_property
    def row_sums(self) -> npt.NDArray[np.float64]:
        """Quality sums of every row of the batch, of shape (rows, 4)."""
        if len(self.rows) == len(self.checked.lengths):
            return self.sums
        sums = np.zeros((len(self.checked.lengths), 4))
        sums[self.rows] = self.sums
        return sums


def row_divisor(spec: LayerSpec) -> int:
    """What a row's length must be a multiple of."""
    if spec.scheme.row_tail:
        return 8 // spec.scheme.bits
    return spec.group_size if spec.granularity == "group" and not spec.scheme.flat else 1


@lru_cache(maxsize=256)
def spec_table(specs: tuple[LayerSpec, ...], dtype: str) -> npt.NDArray[np.int64]:
    """The specs as ``lay_out`` takes them, one row of SPEC_FIELDS each."""
    return np.array(
        [
            (
                FAMILIES[spec.scheme.family],
                DTYPES[dtype],
                DTYPES[spec.arithmetic_for(dtype)],
                DTYPES.get(spec.scale_dtype_for(dtype), DTYPES["float32"]),
                spec.scheme.bits,
                spec.symmetric,
                spec.granularity == "tensor",
                spec.group_size if spec.granularity == "group" else 0,
                spec.scheme.block_bytes,
                spec.scheme.flat,
                spec.granularity == "block",
                spec.scheme.stored_bits or spec.scheme.bits,
                0 if spec.scheme.stored_bits == spec.scheme.bits else PACKINGS.get(spec.scheme.packing, 0),
                spec.scheme.row_tail,
                spec.calibration != "absmax",
            )
            for spec in specs
        ],
        np.int64,
    )
