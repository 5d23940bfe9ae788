"""``python -m flightquant.server.probe [HOST:PORT [SERVICE]]``: is a server ready? For containers without gRPC probes.

Ends with 0 if it is, with 1 if it is not or does not answer. With ``liveness`` as the service: is it alive?
"""

from __future__ import annotations

import os
import sys

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

TIMEOUT_S = 5.0
PORT = 8816


def main() -> None:
    """Ask once, print the status, end with it."""
    port = os.environ.get("FLIGHTQUANT_SERVE_HEALTH_PORT_NUMBER", str(PORT))
    service = sys.argv[2] if len(sys.argv) > 2 else ""
    address = sys.argv[1] if len(sys.argv) > 1 else f"127.0.0.1:{port}"
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            sys.exit(f"{address}: {error.code().name}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{address}: {status}")  # noqa: T201 -- what a person who runs it by hand wants to see
    sys.exit(status != "SERVING")


if __name__ == "__main__":
    main()
