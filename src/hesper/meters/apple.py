"""Apple silicon: the power of its processors, printed by ``powermetrics``."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence

from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope
from hesper.meters.stream import Lines

__all__ = ["Apple", "parse"]

_POWER = re.compile(r"^(CPU|GPU|ANE|Combined) Power(?: \([^)]*\))?: (\d+) mW$")
INTERVAL = 100  # milliseconds


def parse(line: str) -> tuple[str, float] | None:
    """The processor that a line is about, and its watts; None for every other line.

    Example:
        >>> parse("Combined Power (CPU + GPU + ANE): 1350 mW"), parse("GPU idle residency: 97 %")
        (('Combined', 1.35), None)
    """
    found = _POWER.match(line.strip())
    return (found[1], int(found[2]) / 1000) if found else None


class Apple:
    """The combined power of processor, graphics and neural engine, every 0.1 s; ``command`` starts the program, which needs root."""

    name = "apple"
    quantity: Quantity = "watts"
    scope: Scope = "processors"
    period = 0.0

    def __init__(self, command: Sequence[str] = ("powermetrics",)) -> None:
        self._command = tuple(command)
        self._lines: Lines | None = None

    def probe(self) -> Availability:
        """Start it and read once."""
        if shutil.which(self._command[0]) is None:
            return Availability(self.name, False, f"there is no program '{self._command[0]}'; it comes with macOS", self.scope)
        try:
            self.read()
        except MeterLost as error:
            self.close()
            reason = f"{str(error).rstrip('.')}; it takes Apple silicon and root (sudo hesper ...)"
            return Availability(self.name, False, reason, self.scope)
        return Availability(self.name, True, "powermetrics", self.scope)

    def read(self) -> Reading:
        """The next sample: a mean over the tenth of a second before it was printed, and of its middle therefore."""
        if self._lines is None:
            self._lines = Lines([*self._command, "--samplers", "cpu_power,gpu_power", "-i", str(INTERVAL), "-b", "1"])
        watts: dict[str, float] = {}
        for arrived, line in self._lines.since(time.monotonic()):
            name, power = parse(line) or ("", 0.0)
            if name == "Combined":  # ends a sample's list
                return Reading(power, watts, arrived - INTERVAL / 2000)
            if name:
                watts[name] = power
        raise AssertionError("lines end with an exception")

    def close(self) -> None:
        """End the program."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
