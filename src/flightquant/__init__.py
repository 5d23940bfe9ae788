"""flightquant: exact neural-network weight quantization at memory speed, in-process or over Arrow Flight.

>>> import numpy as np, flightquant
>>> table = flightquant.quantize({"w": np.ones((2, 128), np.float32)}, scheme="int4", group_size=128)
>>> table.column("status").to_pylist()
['ok']
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flightquant.errors import FlightquantError

if TYPE_CHECKING:
    from flightquant.cython_core.local import amax, dequantize, quantize, verify

__version__ = version("flightquant")
__all__ = ["FlightquantError", "__version__", "amax", "dequantize", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    # The extension loads at first use, so that a client machine never needs it (docs/adr/0001).
    if name == "dequantize" and find_spec("flightquant.cython_core") is None:
        # Without the extension the reference still gives weights back, slowly.
        from flightquant.reference import dequantize

        return dequantize
    if name in ("amax", "dequantize", "quantize", "verify"):
        from flightquant.cython_core import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
