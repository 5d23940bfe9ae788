from typing import Self

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

DTYPES: dict[str, int]
FAMILIES: dict[str, int]
TILE: int
JOB_FIELDS: tuple[str, ...]

def available_isas() -> list[str]: ...
def active_isa() -> str: ...

@disjoint_base
class Plan:
    @property
    def tiles(self) -> int: ...
    @property
    def reduce_tiles(self) -> int: ...
    def __new__(cls, jobs: npt.NDArray[np.int64], given_amax: npt.NDArray[np.float32], isa: str) -> Self: ...
    def reduce(self, first: int, last: int, n_threads: int) -> None: ...
    def parameters(self) -> None: ...
    def quantize(self, first: int, last: int, n_threads: int) -> None: ...
    def finish(
        self,
        sums: npt.NDArray[np.float64],
        first_bad: npt.NDArray[np.int64],
        nanoseconds: npt.NDArray[np.int64],
    ) -> None: ...
