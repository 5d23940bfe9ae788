"""Whether calls still come through: the server calls itself over its own Flight port, as a client would.

A process can answer health checks while its calls do not: its Flight port accepts nobody, its threads are used up, its
handlers wait for each other. A call that goes the whole way, from the socket to a handler and back, notices all of
these. It is let in without a place, so that a server that is merely full is alive.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable

from pyarrow import flight

from flightquant.server.calls import Headers

PULSE_HEADER = "x-flightquant-pulse"
PULSES = 3
"""Calls to itself within the time after which a server without an answer counts as stuck."""

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 -- what to call, not what to listen on


class Liveness:
    """Calls this process's own Flight port again and again, and tells when the answers stop and when they come again.

    Parameters
    ----------
    timeout_s : float
        Seconds without an answer after which the server is stuck.
    on_change : callable
        Told True or False when it changes; alive at the start.
    """

    def __init__(self, timeout_s: float, on_change: Callable[[bool], None]) -> None:
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._secret = secrets.token_hex(16)
        self._stop = threading.Event()
        self._answered = time.monotonic()
        self._threads: list[threading.Thread] = []

    def is_pulse(self, headers: Headers) -> bool:
        """Whether a call's headers are those of a call to itself: nobody else knows the secret."""
        values = headers.get(PULSE_HEADER, ())
        return len(values) == 1 and hmac.compare_digest(str(values[0]).encode(), self._secret.encode())

    def start(self, location: str, certified: bool) -> None:
        """Begin.

        Parameters
        ----------
        location : str
            Where the server listens.
        certified : bool
            Clients need a certificate, which a call to itself has not: that it is turned away is the answer then.
        """
        scheme, _, address = location.partition("://")
        host, _, port = address.rpartition(":")
        target = f"{scheme}://{_ANY_HOST.get(host, host)}:{port}"
        self._answered = time.monotonic()
        # Two threads: a call can outlive its deadline if the library's own timers are what is stuck.
        beat = threading.Thread(target=self._beat, args=(target, certified), name="pulse", daemon=True)
        watch = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._threads = [beat, watch]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more calls, nor news: what the server is found to be now, it stays."""
        self._stop.set()

    def _beat(self, target: str, certified: bool) -> None:
        while not self._stop.wait(self._timeout_s / PULSES):
            if self._is_answered(target, certified):
                self._answered = time.monotonic()

    def _is_answered(self, target: str, certified: bool) -> bool:
        options = flight.FlightCallOptions(
            timeout=self._timeout_s, headers=[(PULSE_HEADER.encode(), self._secret.encode())]
        )
        try:
            with flight.FlightClient(
                target, disable_server_verification=True, generic_options=[("grpc.enable_http_proxy", 0)]
            ) as client:
                return bool(list(client.list_actions(options)))
        except flight.FlightUnavailableError:
            return certified
        except Exception:
            return False

    def _watch(self) -> None:
        alive = True
        while not self._stop.wait(self._timeout_s / (4 * PULSES)):
            # A pulse's own pause is no silence of the server's.
            answered = time.monotonic() - self._answered < self._timeout_s * (1 + 1 / PULSES)
            if answered is not alive and not self._stop.is_set():
                alive = answered
                self._on_change(alive)
