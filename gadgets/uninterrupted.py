"""What is done as a whole or not at all, even where somebody stops the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals by which people and batch systems stop a process."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the end of the block; what they do is done then.

    Python handles signals in its main thread: in any other, blocks are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    holding = True
    came: list[signal.Signals] = []
    before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        handler = before.get(which)
        if holding:
            came.append(which)
        elif callable(handler):  # one that came while the handlers were given back
            handler(number, frame)

    try:
        for number in STOPPING:
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:  # None: not set from Python
                before[number] = handler
                signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)
