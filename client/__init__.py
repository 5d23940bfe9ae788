"""The client: weights in, the same answer table as the local call out, over Arrow Flight.

>>> from flightquant.client import QuantClient                                        # doctest: +SKIP
>>> with QuantClient("grpc://127.0.0.1:8815") as client:                              # doctest: +SKIP
...     table = client.quantize(model.state_dict(), scheme="int4", group_size=128)    # doctest: +SKIP
"""

from flightquant.client.client import QuantClient

__all__ = ["QuantClient"]
