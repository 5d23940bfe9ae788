"""The command ``flightquant``, also as ``python -m flightquant``."""

from __future__ import annotations

import os
import signal
import sys

from flightquant import interrupts


def main() -> None:
    """Run the command with the process's arguments and exit."""
    if sys.argv[1:2] == ["serve"]:
        # As process 1 of a container that has no init, a process does not hear a signal without a handler: a SIGTERM
        # while it loads would be lost for good. Held back is one that came while it started itself again.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    else:
        interrupts.watch()
    from flightquant.client.cli import main

    main()


if __name__ == "__main__":
    main()
