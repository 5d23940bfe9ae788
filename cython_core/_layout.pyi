import numpy as np
import numpy.typing as npt

SPEC_FIELDS: tuple[str, ...]
JOB_WIDTH: int

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
