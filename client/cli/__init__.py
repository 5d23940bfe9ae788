"""The console script: what it says when something is wrong, in one sentence and without a traceback."""

from __future__ import annotations

import sys

from flightquant.errors import FlightquantError

_EXTRAS = {"typer": "cli", "rich": "cli", "grpc": "server", "grpc_health": "server", "prometheus_client": "server"}


def main() -> None:
    """Run ``flightquant`` with the process's arguments and exit: 0, 1 for a failure, 2 for wrong usage."""
    try:
        from flightquant.client.cli.commands import app

        app(prog_name="flightquant")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _fail(f'this command needs the package {error.name}; install it with: pip install "flightquant[{extra}]"')
    except FlightquantError as error:
        _fail(error.message)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _fail(sentence: str) -> None:
    print(f"flightquant: {sentence}", file=sys.stderr)  # noqa: T201
    sys.exit(1)
