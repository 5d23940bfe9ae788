"""flightquant: exact neural-network weight quantization at memory speed, in-process or over Arrow Flight.

>>> import numpy as np, flightquant
>>> table = flightquant.quantize({"w": np.ones((2, 128), np.float32)}, scheme="int4", group_size=128)
>>> table.column("status").to_pylist()
['ok']
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flightquant.errors import FlightquantError
from flightquant.reference import dequantize

if TYPE_CHECKING:
    from flightquant.cython_core.local import quantize

__version__ = version("flightquant")
__all__ = ["FlightquantError", "__version__", "dequantize", "quantize"]


def __getattr__(name: str) -> Any:
    # The extension loads at first use, so that a client machine never needs it (docs/adr/0001).
    if name == "quantize":
        from flightquant.cython_core.local import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
