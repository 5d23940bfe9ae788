from typing import Self

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

RESTORE_FIELDS: tuple[str, ...]

@disjoint_base
class Restorer:
    @property
    def tiles(self) -> int: ...
    def __new__(cls, jobs: npt.NDArray[np.int64], isa: str, owner: object) -> Self: ...
    @property
    def unpack_tiles(self) -> int: ...
    def unpack(self, first: int, last: int, n_threads: int) -> None: ...
    def run(self, first: int, last: int, n_threads: int) -> None: ...
    def finish(
        self,
        sums: npt.NDArray[np.float64],
        first_bad: npt.NDArray[np.int64],
        nanoseconds: npt.NDArray[np.int64],
    ) -> None: ...
