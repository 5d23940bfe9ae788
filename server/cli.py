"""``flightquant serve``: every option also has an environment variable."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flightquant.cython_core.engine import Limits
from flightquant.server.app import run
from flightquant.server.config import ConfigError, ServerConfig, default_bytes_in_flight
from flightquant.server.heap import use_one_heap

# Kubernetes sets NAME_PORT, NAME_SERVICE_HOST, NAME_SERVICE_PORT_... and NAME_PORT_<number>_... for every Service:
# none of the names below can be one of these, whatever a Service is called (tests/server/test_cli.py).
_ENV = "FLIGHTQUANT_SERVE_"
_DEFAULTS = ServerConfig(max_bytes_in_flight=1)
_LIMITS = Limits()


class LogLevel(StrEnum):
    """What is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(StrEnum):
    """How it is logged."""

    json = "json"
    text = "text"


def serve(
    location: Annotated[
        str, typer.Option(envvar=f"{_ENV}LOCATION", help="Where to listen; port 0 picks a free one.")
    ] = _DEFAULTS.location,
    metrics_port: Annotated[
        int, typer.Option(envvar=f"{_ENV}METRICS_PORT_NUMBER", help="Port of Prometheus' /metrics; 0: a free one.")
    ] = _DEFAULTS.metrics_port,
    health_port: Annotated[
        int, typer.Option(envvar=f"{_ENV}HEALTH_PORT_NUMBER", help="Port of grpc.health.v1; 0: a free one.")
    ] = _DEFAULTS.health_port,
    threads: Annotated[
        int | None, typer.Option(envvar=f"{_ENV}THREADS", help="Compute threads; default: what the cgroup allows.")
    ] = _DEFAULTS.threads,
    grace_s: Annotated[
        float, typer.Option(envvar=f"{_ENV}GRACE_S", help="Seconds that running calls have to end after SIGTERM.")
    ] = _DEFAULTS.grace_s,
    drain_delay_s: Annotated[
        float,
        typer.Option(envvar=f"{_ENV}DRAIN_DELAY_S", help="Seconds of being not ready before new calls are refused."),
    ] = _DEFAULTS.drain_delay_s,
    max_calls: Annotated[int, typer.Option(envvar=f"{_ENV}MAX_CALLS", help="Calls at once.")] = _DEFAULTS.max_calls,
    max_bytes_in_flight: Annotated[
        int | None,
        typer.Option(envvar=f"{_ENV}MAX_BYTES_IN_FLIGHT", help="Bytes of batches; default: 1/4 of the memory limit."),
    ] = None,
    call_timeout_s: Annotated[
        float, typer.Option(envvar=f"{_ENV}CALL_TIMEOUT_S", help="Longest time of one call, in seconds.")
    ] = _DEFAULTS.call_timeout_s,
    max_rows: Annotated[int, typer.Option(envvar=f"{_ENV}MAX_ROWS", help="Layers in one batch.")] = _LIMITS.max_rows,
    max_layer_bytes: Annotated[
        int, typer.Option(envvar=f"{_ENV}MAX_LAYER_BYTES", help="Bytes of one layer.")
    ] = _LIMITS.max_layer_bytes,
    max_batch_bytes: Annotated[
        int, typer.Option(envvar=f"{_ENV}MAX_BATCH_BYTES", help="Bytes of one batch.")
    ] = _LIMITS.max_batch_bytes,
    max_call_bytes: Annotated[
        int | None, typer.Option(envvar=f"{_ENV}MAX_CALL_BYTES", help="Bytes of one call; default: no limit.")
    ] = _LIMITS.max_call_bytes,
    log_level: Annotated[LogLevel, typer.Option(envvar=f"{_ENV}LOG_LEVEL", help="What is logged.")] = LogLevel.info,
    log_format: Annotated[
        LogFormat, typer.Option(envvar=f"{_ENV}LOG_FORMAT", help="How it is logged.")
    ] = LogFormat.json,
) -> None:
    """Run the quantization service.

    Prints one line of JSON on standard output when it is ready; logs go to standard error. SIGTERM or SIGINT drains,
    a second one ends it at once.
    """
    try:
        config = ServerConfig(
            location=location,
            metrics_port=metrics_port,
            health_port=health_port,
            threads=threads,
            grace_s=grace_s,
            drain_delay_s=drain_delay_s,
            limits=Limits(
                max_rows=max_rows,
                max_layer_bytes=max_layer_bytes,
                max_batch_bytes=max_batch_bytes,
                max_call_bytes=max_call_bytes,
            ),
            max_calls=max_calls,
            max_bytes_in_flight=default_bytes_in_flight() if max_bytes_in_flight is None else max_bytes_in_flight,
            call_timeout_s=call_timeout_s,
            log_level=log_level.value,
            log_format=log_format.value,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    use_one_heap()
    try:
        run(config)
    except OSError as error:
        typer.echo(f"flightquant serve: {error}", err=True)
        raise typer.Exit(1) from None
