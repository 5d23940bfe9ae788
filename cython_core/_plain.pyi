from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import disjoint_base

from flightquant.cython_core._memory import MIN_BYTES as MIN_BYTES
from flightquant.cython_core._quantize import JOB_WIDTH as JOB_WIDTH
from flightquant.cython_core._quantize import Plan
from flightquant.cython_core.output import MAX_ANSWER_BYTES as MAX_ANSWER_BYTES

OUTPUT_COLUMNS: tuple[str, ...]
MAX_ROWS: int

@disjoint_base
class Constants:
    def __new__(cls, batch: pa.RecordBatch) -> Self: ...

@disjoint_base
class Room:
    def __new__(cls, spec: npt.NDArray[np.int64], count: int, constants: Constants) -> Self: ...

@disjoint_base
class Held: ...

@disjoint_base
class PlainCall:
    def __init__(
        self,
        answer: pa.Schema,
        scheme: str,
        sources: list[tuple[int, int]],
        places: tuple[int, int, int, int],
        spec: npt.NDArray[np.int64],
        isa: str,
        measure: bool,
        value_bytes: int,
        offset_bytes: int,
        list_size: int,
        divisor: int,
        max_layer_bytes: int,
        max_name_bytes: int,
        max_dims: int,
        constants: Callable[[int], Constants],
    ) -> None: ...
    def read(self, batch: pa.RecordBatch) -> PlainWork | None: ...

@disjoint_base
class PlainWork:
    @property
    def plan(self) -> Plan: ...
    @property
    def sums(self) -> npt.NDArray[np.float64]: ...
    @property
    def weights(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def kernel_ns(self) -> int: ...
    @property
    def layers(self) -> list[tuple[str, str, int, int]]: ...
    def finish(self) -> pa.RecordBatch | None: ...
