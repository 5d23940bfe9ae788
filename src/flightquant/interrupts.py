"""Ctrl-C and SIGTERM end a command: at once while it loads, tidily while it works, and soon where it is held up."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any, NoReturn

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
HELD_UP_S = 1.0
"""How long the main thread may take to hear of a signal: a call of a library that waits for a network or a disk hears
nothing until it returns. Outputs appear whole or not at all, also where the process just ends."""
TIDYING_S = 10.0
"""How long it may take to end after that."""

_loading = True
_taken: list[signal.Signals] = []
"""The signal that the main thread has heard of."""


def taken() -> signal.Signals:
    """What the command was ended by: Ctrl-C, unless SIGTERM came."""
    return _taken[0] if _taken else signal.SIGINT


def heard() -> bool:
    """Whether the main thread has heard of a signal."""
    return bool(_taken)


def watch() -> None:
    """Have SIGINT and SIGTERM end this process; of the main thread, before anything that takes time is loaded.

    Python runs handlers on the main thread, between two of its own instructions. The wakeup descriptor is written to at
    once, on whichever thread the signal meets.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # so does a shell start what runs in its background
            signal.signal(number, _interrupt)

    def wait() -> None:
        with sender:  # held open as long as the process
            number = _next(receiver, None) or signal.SIGTERM
            if _next(receiver, HELD_UP_S) is None and _taken:
                _next(receiver, TIDYING_S)
            end(number)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def loaded() -> None:
    """From now on a signal raises KeyboardInterrupt in the main thread, where until now it ended the process."""
    global _loading
    _loading = False


def _interrupt(number: int, frame: Any) -> None:
    if _loading:
        end(number)
    if not _taken:  # what ends already is not interrupted in that
        _taken.append(signal.Signals(number))
        raise KeyboardInterrupt


def _next(receiver: socket.socket, seconds: float | None) -> int | None:
    receiver.settimeout(seconds)
    while True:
        try:
            (number,) = receiver.recv(1)
        except TimeoutError:
            return None
        if number in WORDS:
            return number


def end(number: int, *notes: str) -> NoReturn:
    """End the process at once, in words, and with the cursor that a progress bar may have hidden.

    Not by ``sys.exit``: Python may wait for threads that wait for a network, and reports any signal as Ctrl-C if one
    came while it compiled.
    """
    shown = "\x1b[?25h" if os.isatty(2) else ""
    sentence = "; ".join([WORDS[signal.Signals(number)], *notes])
    try:
        os.write(2, f"{shown}flightquant: {sentence}\n".encode())
    finally:
        os._exit(128 + number)
