"""``flightquant serve``: every option also has an environment variable."""

from __future__ import annotations

import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flightquant.cython_core.engine import Limits
from flightquant.server.app import run
from flightquant.server.config import ConfigError, ServerConfig, default_bytes_in_flight
from flightquant.server.heap import tune_heap

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
    max_queued: Annotated[
        int, typer.Option(envvar=f"{_ENV}MAX_QUEUED", help="Calls that may wait to be let in.")
    ] = _DEFAULTS.max_queued,
    queue_timeout_s: Annotated[
        float, typer.Option(envvar=f"{_ENV}QUEUE_TIMEOUT_S", help="Longest wait to be let in, in seconds.")
    ] = _DEFAULTS.queue_timeout_s,
    idle_timeout_s: Annotated[
        float, typer.Option(envvar=f"{_ENV}IDLE_TIMEOUT_S", help="Longest silence of a call's client, in seconds.")
    ] = _DEFAULTS.idle_timeout_s,
    liveness_timeout_s: Annotated[
        float,
        typer.Option(envvar=f"{_ENV}LIVENESS_TIMEOUT_S", help="Not alive if no call comes through for so long."),
    ] = _DEFAULTS.liveness_timeout_s,
    max_name_bytes: Annotated[
        int, typer.Option(envvar=f"{_ENV}MAX_NAME_BYTES", help="Bytes of a layer's name.")
    ] = _LIMITS.max_name_bytes,
    max_metadata_bytes: Annotated[
        int, typer.Option(envvar=f"{_ENV}MAX_METADATA_BYTES", help="Bytes of a schema's or a message's metadata.")
    ] = _LIMITS.max_metadata_bytes,
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
    tls_cert: Annotated[
        Path | None, typer.Option(envvar=f"{_ENV}TLS_CERT", help="PEM certificate chain, for grpc+tls://.")
    ] = _DEFAULTS.tls_cert,
    tls_key: Annotated[
        Path | None, typer.Option(envvar=f"{_ENV}TLS_KEY", help="PEM private key of the certificate.")
    ] = _DEFAULTS.tls_key,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(envvar=f"{_ENV}TLS_CLIENT_CA", help="PEM authorities: every client must show a certificate."),
    ] = _DEFAULTS.tls_client_ca,
    token_file: Annotated[
        Path | None, typer.Option(envvar=f"{_ENV}TOKEN_FILE", help="Hashed bearer tokens; read again when it changes.")
    ] = _DEFAULTS.token_file,
    jwt_jwks: Annotated[
        str | None, typer.Option(envvar=f"{_ENV}JWT_JWKS", help="Key set of JWTs: a file or an https:// address.")
    ] = _DEFAULTS.jwt_jwks,
    jwt_issuer: Annotated[
        str | None, typer.Option(envvar=f"{_ENV}JWT_ISSUER", help="Issuer that a JWT must name.")
    ] = _DEFAULTS.jwt_issuer,
    jwt_audience: Annotated[
        str | None, typer.Option(envvar=f"{_ENV}JWT_AUDIENCE", help="Audience that a JWT must name.")
    ] = _DEFAULTS.jwt_audience,
    jwt_algorithms: Annotated[
        str, typer.Option(envvar=f"{_ENV}JWT_ALGORITHMS", help="Signatures that are allowed, separated by commas.")
    ] = _DEFAULTS.jwt_algorithms,
    jwt_roles_claim: Annotated[
        str, typer.Option(envvar=f"{_ENV}JWT_ROLES_CLAIM", help="Claim of a JWT that lists roles.")
    ] = _DEFAULTS.jwt_roles_claim,
    jwt_ca_file: Annotated[
        Path | None, typer.Option(envvar=f"{_ENV}JWT_CA_FILE", help="PEM authorities of the key set's address.")
    ] = _DEFAULTS.jwt_ca_file,
    jwt_token_file: Annotated[
        Path | None, typer.Option(envvar=f"{_ENV}JWT_TOKEN_FILE", help="Bearer token to ask for the key set with.")
    ] = _DEFAULTS.jwt_token_file,
    default_roles: Annotated[
        str,
        typer.Option(
            envvar=f"{_ENV}DEFAULT_ROLES", help="Roles of an identity that comes without any: quantize, sources."
        ),
    ] = _DEFAULTS.default_roles,
    source_root: Annotated[
        list[Path] | None,
        typer.Option(envvar=f"{_ENV}SOURCE_ROOT", help="Folder that stored sources may be in; may be given again."),
    ] = None,
    sink_root: Annotated[
        list[Path] | None,
        typer.Option(envvar=f"{_ENV}SINK_ROOT", help="Folder that stored sources may be converted into."),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(envvar=f"{_ENV}OTLP_ENDPOINT", help="Where OpenTelemetry spans go, http://host:4318/v1/traces."),
    ] = _DEFAULTS.otlp_endpoint,
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
                max_name_bytes=max_name_bytes,
                max_metadata_bytes=max_metadata_bytes,
            ),
            max_calls=max_calls,
            max_bytes_in_flight=default_bytes_in_flight() if max_bytes_in_flight is None else max_bytes_in_flight,
            max_queued=max_queued,
            queue_timeout_s=queue_timeout_s,
            call_timeout_s=call_timeout_s,
            idle_timeout_s=idle_timeout_s,
            liveness_timeout_s=liveness_timeout_s,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            token_file=token_file,
            jwt_jwks=jwt_jwks,
            jwt_issuer=jwt_issuer,
            jwt_audience=jwt_audience,
            jwt_algorithms=jwt_algorithms,
            jwt_roles_claim=jwt_roles_claim,
            jwt_ca_file=jwt_ca_file,
            jwt_token_file=jwt_token_file,
            source_root=tuple(source_root or ()),
            sink_root=tuple(sink_root or ()),
            default_roles=default_roles,
            otlp_endpoint=otlp_endpoint,
            log_level=log_level.value,
            log_format=log_format.value,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    # What comes while the process starts itself again waits, until a handler is there once more.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    tune_heap()
    try:
        run(config)
    except (OSError, ConfigError) as error:
        typer.echo(f"flightquant serve: {error}", err=True)
        raise typer.Exit(1) from None
