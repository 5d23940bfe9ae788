"""arrow_quant_v2's calls, with their names, arguments and result columns, and with results that can be dequantized.

Programs written for arrow_quant_v2 change their import line:

>>> from flightquant.compat import ArrowQuantV2
>>> import numpy as np
>>> result = ArrowQuantV2(mode="diffusion").quantize_batch({"w": np.ones((2, 128), np.float32)}, bit_width=4)
>>> len(result["w"]["quantized_data"]), result["w"]["bit_width"]
(128, 4)

``quantized_data`` is packed as compressed-tensors packs it, ``bit_width`` bits a weight (arrow_quant_v2 took a byte
whatever was asked for), with a scale and a zero point for every group of 128 weights of a row.
:func:`dequantize` gives the weights back. What had no sound meaning raises an error that names what to use.
"""

from flightquant.compat.asynchronous import AsyncArrowQuantV2
from flightquant.compat.config import DiffusionQuantConfig
from flightquant.compat.quantizer import ArrowQuantV2, Results
from flightquant.compat.tables import dequantize, numpy_to_arrow_table

__all__ = ["ArrowQuantV2", "AsyncArrowQuantV2", "DiffusionQuantConfig", "Results", "dequantize", "numpy_to_arrow_table"]
