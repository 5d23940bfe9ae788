"""The client: weights in, the same answer table as the local call out, over Arrow Flight.

>>> from flightquant.client import QuantClient                                        # doctest: +SKIP
>>> with QuantClient("grpc://127.0.0.1:8815") as client:                              # doctest: +SKIP
...     table = client.quantize(model.state_dict(), scheme="int4", group_size=128)    # doctest: +SKIP
"""

from flightquant.client.aio import AsyncQuantClient
from flightquant.client.client import QuantClient
from flightquant.client.connection import Credentials
from flightquant.client.retry import Retry
from flightquant.client.sources import Source, open_source

__all__ = ["AsyncQuantClient", "Credentials", "QuantClient", "Retry", "Source", "open_source"]
