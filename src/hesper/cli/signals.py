"""Ctrl-C, ``kill`` and a closed terminal: all end the job the same way, once, so that its temporary files can be removed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interruptible"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this context the first of these signals raises KeyboardInterrupt, and later ones are ignored while things are put away.

    A signal that the parent process asked to ignore (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    former = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not signal.SIG_IGN}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in former:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in former:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
