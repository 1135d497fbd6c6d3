"""What NVIDIA's own tool says of the graphics cards: driver, limits, clocks, temperature, and what holds the clocks back."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Graphics", "graphics", "held_back", "parse_graphics"]

FIELDS = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "temperature.gpu", "clocks_throttle_reasons.active")
COMMAND = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
_PATIENCE = 10.0  # seconds; without its daemon the tool wakes the driver first
# Bits of NVML's clock event reasons that slow a card against its will; idling and clocks that were asked for do not.
_REASONS = {
    0x04: "its power limit",
    0x08: "a hardware slowdown",
    0x20: "its temperature, by the driver",
    0x40: "its temperature, by the hardware",
    0x80: "the power supply's brake",
}


@dataclass(frozen=True)
class Graphics:
    """All cards together: ``fixed`` is alike whenever two measurements are comparable, the rest is of one moment.

    ``megahertz`` and ``celsius`` are of the slowest and hottest card, ``reasons`` the bits of everything that holds a clock back.
    """

    fixed: str
    megahertz: float | None
    celsius: float | None
    reasons: int | None


def graphics(command: Sequence[str] = COMMAND) -> Graphics | None:
    """The cards that the tool knows; None where there is no tool or it says nothing of use."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return None
    return parse_graphics(done.stdout) if done.returncode == 0 else None


def parse_graphics(text: str) -> Graphics | None:
    """The cards in a table without a head, one a line; what a card does not tell is left out.

    Example:
        >>> parse_graphics("NVIDIA H100 80GB HBM3, 570.86, 700.00, 1980, 345, 31, 0x0000000000000001")
        Graphics(fixed='NVIDIA H100 80GB HBM3, driver 570.86, at most 700.00 W and 1980 MHz', megahertz=345.0, celsius=31.0, reasons=0)
    """
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.strip()]
    rows = [row for row in rows if len(row) == len(FIELDS)]
    if not rows:
        return None
    fixed = "; ".join(f"{row[0]}, driver {row[1]}, at most {row[2]} W and {row[3]} MHz" for row in rows)
    clocks, heats = ([value for row in rows if (value := _number(row[place])) is not None] for place in (4, 5))
    bits = [int(row[6], 16) for row in rows if re.fullmatch(r"0x[0-9a-fA-F]+", row[6])]
    reasons = None
    for value in bits:
        reasons = (reasons or 0) | (value & sum(_REASONS))
    return Graphics(fixed, min(clocks, default=None), max(heats, default=None), reasons)


def held_back(reasons: int) -> str:
    """What holds clocks back, in words.

    Example:
        >>> held_back(0x24)
        'its power limit and its temperature, by the driver'
    """
    return " and ".join(words for bit, words in _REASONS.items() if reasons & bit)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:  # "[N/A]", "[Not Supported]"
        return None
