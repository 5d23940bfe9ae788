"""A connection to one server that can be made anew, with the options that gRPC needs for lost ones to be noticed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight

from flightquant.errors import InvalidRequestError

RECONNECT_MS = (("initial", 100), ("min", 5_000), ("max", 2_000))
"""gRPC's own waits between tries to connect, in milliseconds; by its defaults (1 s to 2 minutes) calls would fail for
minutes after a server is back. ``min`` is also what one try may take."""
KEEPALIVE_TIMEOUT_MS = 20_000


@dataclass(frozen=True, slots=True)
class Credentials:
    """How a client proves itself, and by what it knows the server.

    Attributes
    ----------
    token : str or Path, optional
        A bearer token, or the file that holds it, which is read for every call: Kubernetes renews such files.
    ca : Path, optional
        PEM file of the authorities that the server's certificate is checked by; None: those of gRPC.
    certificate, key : Path, optional
        PEM files of the client's own certificate and its key, read for every connection.
    """

    token: str | Path | None = field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def headers(self) -> dict[str, str]:
        """What each call says of its caller.

        Raises
        ------
        OSError
            The token's file cannot be read.
        """
        token = self.token.read_text().strip() if isinstance(self.token, Path) else self.token
        return {} if token is None else {"authorization": f"Bearer {token}"}

    def tls(self) -> dict[str, bytes]:
        """The Flight client's arguments for TLS.

        Raises
        ------
        OSError
            A file cannot be read.
        """
        files = {"tls_root_certs": self.ca, "cert_chain": self.certificate, "private_key": self.key}
        return {name: path.read_bytes() for name, path in files.items() if path is not None}


class Connection:
    """A Flight client for one address.

    Parameters
    ----------
    uri : str
    credentials : Credentials
    keepalive_s : float or None
        Seconds of silence after which the connection is probed; None: never.

    Attributes
    ----------
    flight : FlightClient
        For calls from now on.

    Raises
    ------
    InvalidRequestError
        The address is none.
    """

    def __init__(self, uri: str, credentials: Credentials, keepalive_s: float | None) -> None:
        self._uri = uri
        self._credentials = credentials
        # A new connection, not another handle on the one that calls to this address share in the process.
        self._options: list[tuple[str, int]] = [("grpc.use_local_subchannel_pool", 1)]
        self._options += [(f"grpc.{which}_reconnect_backoff_ms", wait) for which, wait in RECONNECT_MS]
        if keepalive_s is not None:
            self._options += [
                ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ]
        self.flight: flight.FlightClient = self._connect()

    def _connect(self) -> flight.FlightClient:
        try:
            return flight.FlightClient(self._uri, generic_options=self._options, **self._credentials.tls())
        except (flight.FlightError, pa.ArrowException) as error:
            raise InvalidRequestError(
                f'cannot use the address "{self._uri}"; expected one such as grpc://127.0.0.1:8815',
                field="uri",
                got=self._uri,
            ) from error

    def renew(self, lost: flight.FlightClient) -> None:
        """Connect anew for later calls, unless another thread has: behind a load balancer, perhaps to another server.

        Calls that still run over the lost connection go on; it ends with the last of them.
        """
        if self.flight is lost:
            self.flight = self._connect()

    def close(self) -> None:
        """Close the connection."""
        self.flight.close()
