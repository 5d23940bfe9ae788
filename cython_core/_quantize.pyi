from typing import Self

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

SPEC_FIELDS: tuple[str, ...]
JOB_WIDTH: int
STREAM_FROM: int

def lay_out(
    specs: npt.NDArray[np.int64],
    spec_of_row: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    importance: npt.NDArray[np.int64],
    matrix: npt.NDArray[np.int64],
    failed: npt.NDArray[np.uint8],
    jobs: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    bytes_out: npt.NDArray[np.int64],
) -> tuple[int, int, int]: ...
def quality_columns(
    sums: npt.NDArray[np.float64],
    sqnr_db: npt.NDArray[np.float32],
    cosine: npt.NDArray[np.float32],
    max_abs_error: npt.NDArray[np.float32],
) -> None: ...

@disjoint_base
class Layout:
    def __new__(
        cls,
        specs: npt.NDArray[np.int64],
        spec_of_row: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        importance: npt.NDArray[np.int64],
        matrix: npt.NDArray[np.int64],
        failed: npt.NDArray[np.uint8],
        jobs: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        bytes_out: npt.NDArray[np.int64],
        given_amax: npt.NDArray[np.float32],
    ) -> Self: ...
    def lay_out(self) -> tuple[int, int]: ...
    def plan(
        self, isa: str, measure: bool, data: int, scales: int, zeros: int, scratch: int, owner: object
    ) -> Plan: ...

@disjoint_base
class Plan:
    @property
    def tiles(self) -> int: ...
    @property
    def reduce_tiles(self) -> int: ...
    @property
    def search_tiles(self) -> int: ...
    @property
    def repack_tiles(self) -> int: ...
    @property
    def nested(self) -> int: ...
    @property
    def compared(self) -> int: ...
    def __init__(
        self,
        jobs: npt.NDArray[np.int64],
        given_amax: npt.NDArray[np.float32],
        isa: str,
        measure: bool,
        data: int,
        scales: int,
        zeros: int,
        scratch: int,
        owner: object,
    ) -> None: ...
    def reduce(self, first: int, last: int, n_threads: int) -> None: ...
    def search(self, first: int, last: int, n_threads: int) -> None: ...
    def magnitudes(
        self, amax: npt.NDArray[np.float32], first_bad: npt.NDArray[np.int64], nanoseconds: npt.NDArray[np.int64]
    ) -> None: ...
    def parameters(self) -> None: ...
    def quantize(self, first: int, last: int, n_threads: int) -> None: ...
    def repack(self, first: int, last: int, n_threads: int) -> None: ...
    def nest(self, first: int, last: int, n_threads: int) -> None: ...
    def compare(self, first: int, last: int, n_threads: int) -> None: ...
    def finish(
        self,
        sums: npt.NDArray[np.float64],
        first_bad: npt.NDArray[np.int64],
        unheld: npt.NDArray[np.int64],
        nanoseconds: npt.NDArray[np.int64],
    ) -> tuple[int, int]: ...
