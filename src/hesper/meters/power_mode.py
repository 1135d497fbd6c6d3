"""The power mode of a Jetson board, by name: numbers mean other modes on other boards and releases."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PowerMode", "parse_modes", "parse_query", "parse_status", "power_mode"]

STATUS, MODES = "var/lib/nvpmodel/status", "etc/nvpmodel.conf"
_NAME = re.compile(r"^NV Power Mode[ \t]*:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"^\s*(\d+)\s*$", re.MULTILINE)
_MODE = re.compile(r"^[ \t]*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)\s*>", re.MULTILINE)
_STATUS = re.compile(r"\bpmode:(\d+)")
PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class PowerMode:
    """A mode's name, and its number on this board and release where it is known."""

    name: str
    number: int | None


def parse_query(text: str) -> PowerMode | None:
    """What ``nvpmodel -q`` prints, whatever it warns of before.

    Example:
        >>> parse_query("NVPM WARN: fan mode is not set\\nNV Fan Mode:quiet\\nNV Power Mode: MODE_30W\\n2\\n")
        PowerMode(name='MODE_30W', number=2)
    """
    name = _NAME.search(text)
    if name is None:
        return None
    number = _NUMBER.search(text, name.end())
    return PowerMode(name[1], int(number[1]) if number else None)


def parse_modes(text: str) -> dict[int, str]:
    """The names of a board's modes by number, from ``nvpmodel.conf``.

    Example:
        >>> parse_modes("< POWER_MODEL ID=0 NAME=15W >\\nCPU_ONLINE CORE_0 1\\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >")
        {0: '15W', 2: 'MAXN_SUPER'}
    """
    return {int(number): name for number, name in _MODE.findall(text)}


def parse_status(text: str, modes: Mapping[int, str]) -> PowerMode | None:
    """The mode that nvpmodel's status file names by number.

    Example:
        >>> parse_status("pmode:0002 fmode:fan_mode_quiet", {2: "MAXN_SUPER"})
        PowerMode(name='MAXN_SUPER', number=2)
    """
    found = _STATUS.search(text)
    number = int(found[1]) if found else None
    return PowerMode(modes[number], number) if number is not None and number in modes else None


def power_mode(root: Path = Path("/"), program: str = "nvpmodel") -> PowerMode | None:
    """The mode now: from the files under ``root``, which everybody may read, or else from ``program``; None where neither says."""
    try:
        modes = parse_modes((root / MODES).read_text(encoding="utf-8"))
        found = parse_status((root / STATUS).read_text(encoding="utf-8"), modes)
    except (OSError, UnicodeDecodeError):
        found = None
    if found is not None:
        return found
    try:  # without input it cannot wait for an answer
        done = subprocess.run([program, "-q"], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_query(done.stdout.decode(errors="replace"))
