from typing_extensions import CapsuleType

DTYPES: dict[str, int]
FAMILIES: dict[str, int]
PACKINGS: dict[str, int]
KERNELS: dict[str, CapsuleType]

def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def pin_team(cpus: list[int]) -> None: ...
