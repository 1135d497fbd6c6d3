"""Raspberry Pi 5: the rails that its power chip measures, printed by ``vcgencmd``."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Mapping

from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope

__all__ = ["Raspberry", "parse", "rail_watts"]

_VALUE = re.compile(r"^\s*(\w+)_([AV])(?:\s+\w+\(\d+\))?=(nan|-?[\d.]+)[AV]\s*$", re.MULTILINE)
PATIENCE = 5.0  # seconds


def parse(text: str) -> dict[str, float]:
    """Amperes and volts by name, such as ``VDD_CORE_A``; what is not a number is left out.

    Example:
        >>> parse("     VDD_CORE_A current(7)=5.03652000A\\n     VDD_CORE_V volt(15)=0.89369880V\\nBATT_V volt(25)=nanV\\nVDD_X_V=0.8750V")
        {'VDD_CORE_A': 5.03652, 'VDD_CORE_V': 0.8936988, 'VDD_X_V': 0.875}
    """
    values = {f"{rail}_{unit}": float(value) for rail, unit, value in _VALUE.findall(text)}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def rail_watts(values: Mapping[str, float]) -> dict[str, float]:
    """Watts of each rail whose current and voltage are both known; the input (EXT5V) has no current.

    Example:
        >>> rail_watts({"VDD_CORE_A": 5.0, "VDD_CORE_V": 0.9, "EXT5V_V": 4.92})
        {'VDD_CORE': 4.5}
    """
    return {
        name[:-2]: amperes * values[f"{name[:-2]}_V"] for name, amperes in values.items() if name[-1] == "A" and f"{name[:-2]}_V" in values
    }


class Raspberry:
    """The sum of the measured rails: less than what the board draws, since its input's current is not measured."""

    name = "raspberry"
    quantity: Quantity = "watts"
    scope: Scope = "internal rails"
    period = 0.2  # each reading starts a program, and many would slow what is measured

    def __init__(self, program: str = "vcgencmd") -> None:
        self._program = program
        self._rails: frozenset[str] = frozenset()  # a rail that was there and is missing is not zero

    def probe(self) -> Availability:
        """Read once."""
        if shutil.which(self._program) is None:
            return Availability(self.name, False, f"there is no program '{self._program}'; it comes with Raspberry Pi boards", self.scope)
        try:
            rails = self.read().rails
        except MeterLost as error:
            return Availability(self.name, False, str(error).rstrip("."), self.scope)
        return Availability(self.name, True, f"{len(rails)} rails within the board", self.scope)

    def read(self) -> Reading:
        """The power of every rail, and their sum."""
        try:
            done = subprocess.run([self._program, "pmic_read_adc"], capture_output=True, timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MeterLost(f"{self._program} cannot be run: {error}.") from error
        watts = rail_watts(parse(done.stdout.decode(errors="replace")))
        if not watts:
            said = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
            hint = "a Raspberry Pi 5 would, to users of the group video"
            raise MeterLost(f"{self._program} pmic_read_adc names no rail{f' but says: {said[0]}' if said else ''}; {hint}.")
        if missing := self._rails - watts.keys():
            raise MeterLost(f"{self._program} no longer gives {', '.join(sorted(missing))}.")
        self._rails = frozenset(watts)
        return Reading(sum(watts.values()), watts)

    def close(self) -> None:
        """Nothing runs between readings."""
