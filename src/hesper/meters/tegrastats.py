"""``tegrastats``: what a Jetson prints about itself, for boards whose sensors' files cannot be read."""

from __future__ import annotations

import re
import shutil
import time

from hesper.meters.jetson import scope_of, total_watts
from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope
from hesper.meters.stream import Lines

__all__ = ["Tegrastats", "parse"]

# The first number is the moment's, the second the mean since the program started, a third the highest.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*)\s+(-?\d+)(?:mW)?/-?\d+(?:mW)?(?:/-?\d+(?:mW)?)?(?!\S)")
INTERVAL = 100  # milliseconds


def parse(line: str) -> dict[str, int]:
    """Milliwatts of each rail in a line of ``tegrastats``, of any release: with or without units, and a third number.

    Example:
        >>> parse("RAM 1488/7620MB (lfb 105x4MB) GR3D_FREQ 62%@612 cpu@47.875C VDD_IN 4654mW/4600mW  VDD_SOC   1484/1484 NC 0mW/0mW")
        {'VDD_IN': 4654, 'VDD_SOC': 1484}
    """
    return {label: int(now) for label, now in _RAIL.findall(line) if label != "NC"}


class Tegrastats:
    """The rails that ``program`` prints every 0.1 s."""

    name = "tegrastats"
    quantity: Quantity = "watts"
    period = 0.0

    def __init__(self, program: str = "tegrastats") -> None:
        self._program = program
        self._lines: Lines | None = None
        self.scope: Scope = "module"

    def probe(self) -> Availability:
        """Start it and read one line."""
        if shutil.which(self._program) is None:
            return Availability(self.name, False, f"there is no program '{self._program}'; it comes with Jetson boards", self.scope)
        try:
            rails = ", ".join(self.read().rails)
        except MeterLost as error:
            self.close()
            return Availability(self.name, False, str(error).rstrip("."), self.scope)
        return Availability(self.name, True, f"rails {rails}", self.scope)

    def read(self) -> Reading:
        """The next line's power, of every rail and of the whole; lines without rails are passed over."""
        asked = time.monotonic()  # before the program starts, which may print while this thread waits for its turn
        if self._lines is None:
            self._lines = Lines([self._program, "--interval", str(INTERVAL)])
        arrived, watts = next(
            (at, {label: value / 1000 for label, value in found.items()}) for at, line in self._lines.since(asked) if (found := parse(line))
        )
        whole = total_watts(watts)
        if whole is None:
            raise MeterLost(f"{self._program} names the rails {', '.join(watts)}, whose total is not known.")
        self.scope = scope_of(watts)
        return Reading(whole, watts, arrived)

    def close(self) -> None:
        """End the program."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
