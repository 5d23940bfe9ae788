"""One server or several: which addresses stand behind a URI, and where a call's exchanges go."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address
from itertools import count
from threading import Lock
from urllib.parse import urlsplit

from flightquant.client.batching import Request
from flightquant.client.calls import Attempts, Call, Cancellation, Placed, Progress, Settings
from flightquant.client.connection import Connection
from flightquant.client.joining import Answer, join
from flightquant.client.retry import answers as retried
from flightquant.client.spread import Spread
from flightquant.errors import InvalidRequestError

_PLAIN = ("grpc", "grpc+tcp")


def addresses(uri: str) -> list[str]:
    """Every server that a URI names: its parts between commas, and all addresses of a name that has several.

    Only names of plain ``grpc://`` URIs are looked up: a certificate is checked against the name. IPv6 addresses count
    where there are no others, since a name often has both for one server.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in uri.split(","))):
        found += _resolved(part)
    return list(dict.fromkeys(found)) or [uri]


def _resolved(uri: str) -> list[str]:
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        return [uri]
    if parts.scheme not in _PLAIN or not host or not port or _is_address(host):
        return [uri]
    try:
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return [uri]  # gRPC says that it cannot be reached, and tries again
    families = socket.AF_INET, socket.AF_INET6
    by_family = [sorted({str(entry[4][0]) for entry in known if entry[0] == family}) for family in families]
    hosts = by_family[0] or [f"[{address}]" for address in by_family[1]]
    return [f"{parts.scheme}://{address}:{port}" for address in hosts] if len(hosts) > 1 else [uri]


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class Servers:
    """The connections of a client.

    Parameters
    ----------
    uri : str
        One URI, or several between commas. A name is looked up for every call, so that servers may come and go.

    Raises
    ------
    InvalidRequestError
        It is no URI.
    """

    def __init__(self, uri: str, keepalive_s: float | None, settings: Settings) -> None:
        self._uri = uri
        self._keepalive_s = keepalive_s
        self._settings = settings
        self._connections: dict[str, Connection] = {}
        self._closed = False
        self._lock = Lock()
        # A call of one message goes to the server that asks first: not the same one for each call, nor for each client.
        self._firsts = count(random.randrange(1 << 16))  # noqa: S311 - spreads load, guards nothing
        for address in addresses(uri):
            self._connection(address)

    def _connection(self, address: str) -> Connection:
        with self._lock:
            if address not in self._connections:
                self._connections[address] = Connection(address, self._settings.credentials, self._keepalive_s)
            return self._connections[address]

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._closed = True
            for connection in self._connections.values():
                connection.close()

    def answers(self, requests: Iterator[Request], call: Call, number: int) -> Iterator[Placed]:
        """The answers of one stream of requests: from one server in their order, from several as they come."""
        if self._closed:
            raise InvalidRequestError("the client is closed; make a new one for further calls", field="client")
        connections = [self._connection(address) for address in addresses(self._uri)]
        if len(connections) == 1:
            attempts = Attempts(connections[0], call.command, self._settings, call.cancellation)
            got = retried(attempts, requests, self._settings.retry, call.deadline, call.cancellation.pause)
            try:
                told = _told(got, call.progress) if call.progress else got
                yield from (((number, place), batch) for place, batch in enumerate(join(told)))
            finally:
                got.close()  # type: ignore[attr-defined]
            return
        shared = self._settings.shared_by(len(connections))

        def lane(connection: Connection, cancellation: Cancellation) -> Attempts:
            return Attempts(connection, call.command, shared, cancellation)

        first = next(self._firsts) % len(connections)
        lanes = [partial(lane, connection) for connection in connections[first:] + connections[:first]]
        for place, batch in Spread(lanes, requests, self._settings.retry, call.deadline, call.cancellation):
            if call.progress:
                for name in batch.column("layer_name").to_pylist():
                    call.progress(name, 1.0)
            yield (number, place), batch


def _told(answers: Iterator[Answer], progress: Progress) -> Iterator[Answer]:
    """The answers, each layer's progress told before its answer is given on."""
    for answer in answers:
        part = answer.request.part
        fraction = part.last / part.shape[0] if part else 1.0
        for name in answer.request.names:
            progress(name, fraction)
        yield answer
