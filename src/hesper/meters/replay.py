"""Meters without a device: a recorded trace played back, and a signal of which the energy is known."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hesper.errors import UsageError
from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope

__all__ = ["Replay", "Synthetic"]

COLUMNS = ["seconds", "watts"]


class Synthetic:
    """The power that a function gives for the seconds since the first reading.

    Example:
        >>> Synthetic(lambda seconds: 7.0).read().total
        7.0
    """

    name = "synthetic"
    quantity: Quantity = "watts"
    scope: Scope = "as recorded"

    def __init__(self, watts: Callable[[float], float], period: float = 0.01, clock: Callable[[], float] = time.monotonic) -> None:
        self.period = period
        self._watts, self._clock = watts, clock
        self._started: float | None = None

    def probe(self) -> Availability:
        """It can always be read."""
        return Availability(self.name, True, "a function of time", self.scope)

    def read(self) -> Reading:
        """The function's power now."""
        now = self._clock()
        if self._started is None:
            self._started = now
        return Reading(float(self._watts(now - self._started)))

    def close(self) -> None:
        """There is nothing to let go of."""


class Replay(Synthetic):
    """The power recorded in a CSV file of two columns, ``seconds,watts``, from the first reading on; between rows it is interpolated.

    Raises:
        UsageError: the file cannot be read, has other columns, fewer than two rows, or times that do not grow.
    """

    name = "replay"

    def __init__(self, file: Path, period: float = 0.02, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._times, self._values = _rows(file)
        super().__init__(self._recorded, period, clock)

    def probe(self) -> Availability:
        """Say how much was recorded."""
        return Availability(self.name, True, f"{self._times[-1] - self._times[0]:.4g} s recorded in {self._file.name}", self.scope)

    def _recorded(self, seconds: float) -> float:
        at = self._times[0] + seconds
        if at > self._times[-1]:
            raise MeterLost(f"The record in {self._file.name} ends after {self._times[-1] - self._times[0]:.4g} s.")
        return float(np.interp(at, self._times, self._values))


def _rows(file: Path) -> tuple[list[float], list[float]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            header, *rows = [row for row in csv.reader(opened) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"The power record {file} cannot be read; give a CSV file of the columns seconds,watts.") from error
    try:
        pairs = [(float(seconds), float(watts)) for seconds, watts in rows]
    except ValueError:
        pairs = []
    times = [seconds for seconds, _ in pairs]
    grows = len(pairs) > 1 and bool(np.isfinite(pairs).all()) and all(a < b for a, b in zip(times, times[1:], strict=False))
    if [name.strip() for name in header] != COLUMNS or not grows:
        raise UsageError(
            f"{file} is no power record; give a CSV file of the columns seconds,watts with two rows or more and times that grow."
        )
    return times, [watts for _, watts in pairs]
