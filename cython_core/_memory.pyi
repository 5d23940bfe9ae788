from typing import Self

from typing_extensions import Buffer, disjoint_base

MIN_BYTES: int
MAX_KEPT_BYTES: int

def bytes_kept() -> int: ...

@disjoint_base
class OutputMemory(Buffer):
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __new__(cls, nbytes: int) -> Self: ...
