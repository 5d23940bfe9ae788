from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

@disjoint_base
class ListColumn:
    @property
    def address(self) -> int: ...
    @property
    def value_bytes(self) -> int: ...
    @property
    def offsets(self) -> npt.NDArray[np.int64]: ...
    def __init__(self, column: Any) -> None: ...

def read_shapes(
    column: ListColumn, lengths: npt.NDArray[np.int64], max_dims: int, matrix: npt.NDArray[np.int64]
) -> None: ...
