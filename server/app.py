"""The server's life: startup, wait, shutdown; as a process (:func:`run`) or inside one (:func:`running_server`)."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from flightquant.cython_core.engine import Engine
from flightquant.layers import as_layer, layers_batch
from flightquant.schemes import SCHEMES
from flightquant.server import actions, logs
from flightquant.server.admission import Admission
from flightquant.server.auth import Gate, TokenFile, Verifier
from flightquant.server.calls import Call
from flightquant.server.config import TLS_SCHEME, ConfigError, ServerConfig
from flightquant.server.exchange import Exchange
from flightquant.server.health import Health
from flightquant.server.liveness import Liveness
from flightquant.server.metrics import Metrics
from flightquant.server.middleware import CallMiddlewareFactory
from flightquant.server.service import QuantService, build_labels
from flightquant.server.stored import Places, Stored
from flightquant.spec import Command

if TYPE_CHECKING:
    from flightquant.server.tracing import Tracing

log = logging.getLogger("flightquant.server")

INLINE_TILES = 32
"""Batches of up to 8 MiB of float32 are computed on the call's own thread: the other cores are busy with transport."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

LAST_WORD_S = 2.0
"""Of the grace period, the share at its end in which calls that still run are told ``draining``: at most half of it."""


LAST_RESORT_S = 10.0
"""Seconds after the grace period at which the process ends whatever it does: a library that hangs at its end, since its
own log is a pipe that nobody reads for instance, must not keep it."""


class Server:
    """One server with its health and metrics ports: :meth:`startup`, then :meth:`shutdown`.

    Parameters
    ----------
    config : ServerConfig
    engine : Engine, optional
        Made from the configuration if not given.

    Attributes
    ----------
    location, metrics_url, health_address : str
        Where it listens, known after :meth:`startup`.
    """

    location: str
    metrics_url: str
    health_address: str

    def __init__(self, config: ServerConfig, engine: Engine | None = None) -> None:
        self.config = config
        self.engine = engine or Engine(config.threads, inline_tiles=INLINE_TILES)
        self._owns_engine = engine is None
        self.admission = Admission(
            config.max_calls,
            config.max_bytes_in_flight,
            config.max_queued,
            config.queue_timeout_s,
            config.idle_timeout_s,
        )
        self.registry = CollectorRegistry()
        build = build_labels(actions.version(self.engine.n_threads))
        self.metrics = Metrics(self.registry, self.admission, build, self.engine.n_threads)
        self._gate = make_gate(config)
        self._tracing = make_tracing(config)
        self._liveness = Liveness(config.liveness_timeout_s, self._tell_alive)
        self._closing = ExitStack()
        self._health: Health | None = None
        self._service: QuantService | None = None

    def startup(self) -> None:
        """Listen on all three ports; ready once the kernels are warm.

        Raises
        ------
        OSError
            A port cannot be had; nothing listens then.
        """
        config = self.config
        with ExitStack() as undo:
            self._health = Health(config.host, config.health_port)
            undo.callback(self._health.close)
            self.health_address = self._health.address
            self._listen_for_metrics(undo)
            warm(self.engine)
            exchange = Exchange(self.engine, config.limits, self.admission, self.metrics, config.call_timeout_s)
            places = Places(config.source_root, config.sink_root)
            stored = Stored(places, self.engine, config.limits, self.admission, self.metrics, config.call_timeout_s)
            middleware = CallMiddlewareFactory(
                self._gate, self.admission, self._end_call, self._begin_call, self._liveness.is_pulse
            )
            try:
                self._service = QuantService(
                    config.location, middleware, exchange, stored, self.engine.n_threads, tls_arguments(config)
                )
            except (OSError, pa.ArrowException):
                raise OSError(f"cannot listen on {config.location}") from None
            scheme = TLS_SCHEME if config.tls else "grpc"
            self.location = f"{scheme}://{config.host}:{self._service.port}"
            self._liveness.start(self.location, certified=config.tls_client_ca is not None)
            self._health.ready()
            self._closing = undo.pop_all()

    def _listen_for_metrics(self, undo: ExitStack) -> None:
        host, port = self.config.host, self.config.metrics_port
        try:
            httpd, thread = start_http_server(port, host.strip("[]"), self.registry)
        except OSError:
            raise OSError(f"cannot listen on {host}:{port} for metrics") from None
        undo.callback(thread.join)
        undo.callback(httpd.server_close)
        undo.callback(httpd.shutdown)
        self.metrics_url = f"http://{host}:{httpd.server_port}/metrics"

    def _tell_alive(self, alive: bool) -> None:
        if self._health is not None:
            self._health.alive(alive)
        if alive:
            log.info("calls come through again")
        else:
            log.error("no call comes through", extra={"fields": {"calls": self.admission.calls}})

    def _begin_call(self, call: Call) -> None:
        if self._tracing is not None:
            self._tracing.begin(call)

    def _end_call(self, call: Call) -> None:
        self.metrics.observe_end(call)
        self.admission.leave(call)
        logs.log_call(call)
        if self._tracing is not None:
            self._tracing.end(call)

    def ready_line(self) -> str:
        """The JSON object that says where to find the server."""
        return json.dumps(
            {
                "event": "ready",
                "flight": self.location,
                "metrics": self.metrics_url,
                "health": self.health_address,
            }
        )

    def shutdown(self) -> int:
        """Stop: not ready, the drain delay, no new calls, running ones end within the grace period.

        Returns
        -------
        int
            Calls that did not end in time; only the end of the process ends them.
        """
        if self._service is None or self._health is None:
            return 0
        self._liveness.stop()
        self._health.drain()
        log.info("draining", extra={"fields": {"calls": self.admission.calls}})
        time.sleep(self.config.drain_delay_s)
        self.admission.drain()
        # It returns when the last call has ended, which an idle client can put off for ever.
        stopper = threading.Thread(target=self._service.shutdown, name="flight-shutdown", daemon=True)
        stopper.start()
        grace_s = self.config.grace_s
        last_word_s = min(LAST_WORD_S, grace_s / 2)
        stopper.join(grace_s - last_word_s)
        if stopper.is_alive():
            self.admission.end_calls()
            stopper.join(last_word_s)
        # Silent calls, which gave their place away, are open all the same.
        cut = self.admission.calls + self.admission.silent if stopper.is_alive() else 0
        log.info("stopped", extra={"fields": {"cut_calls": cut}})
        self._service = None
        self._closing.close()
        if self._tracing is not None:
            self._tracing.close()
        if self._owns_engine and not cut:
            self.engine.close()
        return cut


def make_gate(config: ServerConfig) -> Gate:
    """What decides who calls.

    Raises
    ------
    ConfigError
        Tokens or keys cannot be read.
    """
    verifiers: list[Verifier] = []
    try:
        if config.token_file is not None:
            verifiers.append(TokenFile(config.token_file, config.roles, log_unread))
        if config.jwt_jwks and config.jwt_issuer and config.jwt_audience:
            # Needs the jwt extra; who does not use it does without.
            from flightquant.server.jwks import JwtRules, JwtVerifier

            rules = JwtRules(
                config.jwt_jwks,
                config.jwt_issuer,
                config.jwt_audience,
                tuple(config.jwt_algorithms.split(",")),
                config.jwt_roles_claim,
                config.jwt_ca_file,
                config.jwt_token_file,
            )
            verifiers.append(JwtVerifier(rules, config.roles))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not verifiers and config.tls_client_ca is None and config.host not in LOOPBACK:
        log.warning("open to everyone", extra={"fields": {"location": config.location}})
    return Gate(verifiers, config.tls_client_ca is not None, config.roles)


def make_tracing(config: ServerConfig) -> Tracing | None:
    """What sends spans, if they are asked for.

    Raises
    ------
    ConfigError
        The ``otel`` extra is not installed.
    """
    if config.otlp_endpoint is None:
        return None
    try:
        from flightquant.server.tracing import Tracing
    except ImportError as error:
        raise ConfigError(f"otlp_endpoint needs what `pip install 'flightquant[otel]'` installs ({error})") from None
    return Tracing.to(config.otlp_endpoint, version("flightquant"))


def log_unread(sentence: str) -> None:
    """A file that changed and cannot be read: what it said before goes on."""
    log.error("tokens not read again", extra={"fields": {"error": sentence}})


def tls_arguments(config: ServerConfig) -> dict[str, Any]:
    """The Flight server's arguments for TLS: empty without it."""
    if config.tls_cert is None or config.tls_key is None:
        return {}
    given: dict[str, Any] = {"tls_certificates": [(config.tls_cert.read_bytes(), config.tls_key.read_bytes())]}
    if config.tls_client_ca is not None:
        given |= {"verify_client": True, "root_certificates": config.tls_client_ca.read_bytes()}
    return given


def warm(engine: Engine) -> None:
    """Run every scheme once, so that no client waits for the first use of anything."""
    layer = as_layer("warm", pa.array([1.0] * 256, pa.float32()))
    batch = layers_batch([layer])
    for scheme in SCHEMES:
        engine.session(batch.schema, Command.build(scheme=scheme)).quantize(batch)


@contextmanager
def running_server(config: ServerConfig | None = None, engine: Engine | None = None) -> Iterator[Server]:
    """A server inside this process, for demonstrations, tests and benchmarks.

    Parameters
    ----------
    config : ServerConfig, optional
        By default free ports of the loopback interface and a short grace period. Close clients before the end: a call
        that outlives the grace period lives as long as the process.

    Yields
    ------
    Server
        Listening; ``location`` says where.
    """
    server = Server(
        config or ServerConfig(location="grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=5.0), engine
    )
    server.startup()
    try:
        yield server
    finally:
        server.shutdown()


def run(config: ServerConfig) -> None:
    """Run the server as this process, until SIGTERM or SIGINT; a second signal ends it at once. Does not return.

    Raises
    ------
    OSError
        A port cannot be had.
    ConfigError
        Tokens or keys cannot be read.
    """
    logs.configure(config.log_level, config.log_format)
    # A switch of the whole process: these series would double the number of all.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    stop = threading.Event()
    watch_signals(stop)
    server = Server(config)
    server.startup()
    print(server.ready_line(), flush=True)  # noqa: T201 -- the ready line is the process's one line of output
    log.info("ready", extra={"fields": actions.version(server.engine.n_threads)})
    stop.wait()
    last_resort = threading.Timer(config.drain_delay_s + config.grace_s + LAST_RESORT_S, os._exit, (0,))
    last_resort.daemon = True
    last_resort.start()
    server.shutdown()
    logging.shutdown()
    sys.stdout.flush()
    # An idle client's call would keep the interpreter from ending.
    os._exit(0)


def watch_signals(stop: threading.Event) -> None:
    """Set ``stop`` at the first SIGTERM or SIGINT; end the process at the second.

    Python runs its handlers on the main thread, which a signal that the kernel gives to one of gRPC's threads does not
    wake. The wakeup descriptor is written to on whichever thread the signal meets.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def watch() -> None:
        with sender:  # held open as long as the process
            receiver.recv(1)
            stop.set()
            os._exit(128 + receiver.recv(1)[0])

    threading.Thread(target=watch, name="signals", daemon=True).start()
