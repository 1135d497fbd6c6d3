"""Programs that print a reading every so often: started, read line by line with a time limit, ended."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

from hesper.meters.meter import MeterLost

__all__ = ["PATIENCE", "Lines"]

PATIENCE = 5.0
"""Seconds without what is waited for, after which a program counts as lost."""

_LOOK = 0.1  # seconds between two looks at whether to stop
_CHUNK = 1 << 16


class Lines:
    """The lines that a program prints, each with the time of its arrival on the monotonic clock.

    Args:
        command: program and arguments; it starts at once.

    Raises:
        MeterLost: it cannot be started.

    Example:
        >>> lines = Lines(["echo", "VDD_IN 4654mW/4654mW"])
        >>> next(line for _, line in lines.since(0.0))
        'VDD_IN 4654mW/4654mW'
        >>> lines.close()
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._name = command[0]
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise MeterLost(f"{self._name} cannot be started: {(error.strerror or str(error)).lower()}.") from error
        self._lines: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._pump, daemon=True)  # a blocking read has no time limit of its own
        self._reader.start()

    def since(self, moment: float) -> Iterator[tuple[float, str]]:
        """The lines that arrive after a moment, as they come; older ones are left out.

        Raises:
            MeterLost: the program ended, or 5 s passed.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise MeterLost(f"{self._name} has printed nothing of use for {PATIENCE:g} s.") from None
            if found is None:
                self._lines.put(None)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)
                raise MeterLost(f"{self._name} has ended (exit code {self._process.returncode}).")
            if found[0] >= moment:
                yield found
            if time.monotonic() > deadline:
                raise MeterLost(f"{self._name} has printed nothing of use for {PATIENCE:g} s.")

    def close(self) -> None:
        """End the program; one that may not be ended, as under sudo, ends when it next prints, because nobody reads on."""
        with contextlib.suppress(OSError):
            self._process.terminate()
        self._closed.set()
        self._reader.join(10 * _LOOK)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
            return
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(1.0)

    def _pump(self) -> None:
        assert self._process.stdout is not None
        pipe, rest = self._process.stdout.fileno(), b""
        with contextlib.suppress(OSError, ValueError):
            while not self._closed.is_set():
                if not select.select([pipe], [], [], _LOOK)[0]:
                    continue
                chunk = os.read(pipe, _CHUNK)
                if not chunk:
                    break
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    self._lines.put((time.monotonic(), line.decode(errors="replace").rstrip("\r")))
        self._lines.put(None)
        self._process.stdout.close()
