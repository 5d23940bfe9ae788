from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyarrow import flight

from flightquant.server.app import Server, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for all tests that do not change it."""
    with running_server() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[flight.FlightClient]:
    with flight.connect(server.location) as connected:
        yield connected
