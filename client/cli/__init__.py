"""The console script: what it says when something is wrong, in one sentence and without a traceback.

Exit codes: 0; 1 for a failure; 2 for wrong usage; 3 where ``verify`` found layers beyond a threshold; 130 after Ctrl-C,
143 after SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

from flightquant import interrupts
from flightquant.errors import FlightquantError

_EXTRAS = {
    "typer": "cli",
    "click": "cli",
    "rich": "cli",
    "yaml": "cli",
    "gguf": "files",
    "fsspec": "files",
    "grpc": "server",
    "jwt": "jwt",
    "grpc_health": "server",
    "prometheus_client": "server",
}
_NO_MEMORY = "there is not enough memory; some layers and their answers must fit into it"


class InterruptedCommandError(Exception):
    """Ctrl-C or SIGTERM came while a command ran; its arguments are what else there is to say."""


def main() -> None:
    """Run ``flightquant`` with the process's arguments and exit."""
    try:
        from flightquant.client.cli.commands import app, usage_sentence

        interrupts.loaded()
        with usage_sentence():
            code = app(prog_name="flightquant", standalone_mode=False) or 0
        if code == 128 + signal.SIGINT:  # what typer, by its version, makes of Ctrl-C while it reads the arguments
            raise KeyboardInterrupt
        sys.exit(code)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        fail(f'this command needs the package {error.name}; install it with: pip install "flightquant[{extra}]"')
    except FlightquantError as error:
        fail(_with_notes(error.message, error))
    except BrokenPipeError:
        # Whoever read our output, such as head, has enough; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            fail(_with_notes(_NO_MEMORY, error))
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror
        fail(_with_notes(text or str(error), error))
    except MemoryError as error:
        fail(_with_notes(_NO_MEMORY, error))
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        fail(
            _with_notes(
                "the system starts no more threads for this process; raise its limits, or give --threads 1", error
            )
        )
    except SystemExit:
        if interrupts.heard():  # a command with a command line of its own has made this of it
            interrupts.end(interrupts.taken())
        raise
    except (InterruptedCommandError, KeyboardInterrupt) as error:
        interrupts.end(interrupts.taken(), *map(str, error.args))


def _with_notes(text: str, error: BaseException) -> str:
    return "; ".join([text, *getattr(error, "__notes__", ())])


def fail(sentence: str, code: int = 1) -> None:
    """Say a sentence on standard error and exit."""
    print(f"flightquant: {' '.join(sentence.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(code)
