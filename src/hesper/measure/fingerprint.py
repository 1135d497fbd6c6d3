"""The state of a machine that times depend on: what must be alike for two measurements to be compared, and what changes meanwhile."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hesper.measure.graphics import graphics, held_back
from hesper.meters.power_mode import power_mode
from hesper.runs.environment import environment

__all__ = ["Fingerprint", "differences", "fingerprint", "warnings_between"]

Value = str | int | float | None

_CPU = "sys/devices/system/cpu"
_PATIENCE = 5.0  # seconds
_LOOK = 0.5  # seconds over which it is watched how busy the processor is
_BUSY = 0.1
_PI_NOW = 0b1111  # under-voltage, capped, throttled, soft temperature limit, at this moment


@dataclass(frozen=True)
class Fingerprint:
    """A machine as it was when something was measured on it.

    ``fixed``: hardware, versions and settings, which two comparable measurements share. ``state``: the share of the processor's time
    in use, its hottest temperature in degrees Celsius, and counts of throttling events since it started; a count that grew tells of one
    in between. Of graphics cards their clock, temperature and what holds the clock back at this moment.
    """

    fixed: Mapping[str, Value]
    state: Mapping[str, Value]


def fingerprint(root: Path = Path("/")) -> Fingerprint:
    """This machine now; ``root`` stands in for ``/`` in what is read from system files."""
    mode, cards = power_mode(root), graphics()
    own = {name: value for name, value in environment().items() if name != "governor"}  # that of the first core alone
    fixed: dict[str, Value] = {
        **own,
        "governors": _alike(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_governor"),
        "highest_khz": _alike(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_max_freq"),
        "turbo_off": _alike(root, f"{_CPU}/intel_pstate/no_turbo"),
        "power_mode": mode.name if mode else None,
        "graphics": cards.fixed if cards else None,
    }
    state: dict[str, Value] = {
        "busy": _busy(root),
        "celsius": _hottest(root),
        "throttled": _throttled(root),
        "over_current": _sum(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")),
        "pi_throttled": _pi_throttled(),
        "graphics_megahertz": cards.megahertz if cards else None,
        "graphics_celsius": cards.celsius if cards else None,
        "graphics_held_back": cards.reasons if cards else None,
    }
    return Fingerprint(fixed, state)


def differences(a: Fingerprint, b: Fingerprint) -> tuple[str, ...]:
    """In words, what keeps two measurements from being compared; nothing where all is alike.

    Example:
        >>> differences(Fingerprint({"cpu": "A57", "torch": "2.6"}, {}), Fingerprint({"cpu": "A78", "torch": "2.6"}, {}))
        ('cpu: A57 and A78',)
    """
    names = [name for name in {**a.fixed, **b.fixed} if a.fixed.get(name) != b.fixed.get(name)]
    return tuple(f"{name}: {_shown(a.fixed.get(name))} and {_shown(b.fixed.get(name))}" for name in names)


def warnings_between(before: Fingerprint, after: Fingerprint) -> tuple[str, ...]:
    """In words, what happened between two looks at one machine that makes times doubtful.

    Example:
        >>> warnings_between(Fingerprint({}, {"busy": 0.02, "throttled": 3}), Fingerprint({}, {"busy": 0.9, "throttled": 5}))
        ('the processor was throttled 2 times',)
    """
    said = []
    busy = before.state.get("busy")
    if isinstance(busy, float) and busy > _BUSY:
        said.append(f"other jobs took {100 * busy:.0f} % of the processor at the start")
    for name, what in (("throttled", "the processor was throttled"), ("over_current", "an over-current limit was hit")):
        first, last = before.state.get(name), after.state.get(name)
        if isinstance(first, int) and isinstance(last, int) and last > first:
            said.append(f"{what} {last - first} times")
    bits = after.state.get("pi_throttled")
    if isinstance(bits, int) and bits & _PI_NOW:
        said.append(f"the board limits itself (vcgencmd get_throttled: {bits:#x})")
    cards = after.state.get("graphics_held_back")
    if isinstance(cards, int) and cards:
        said.append(f"the graphics card's clock was held back by {held_back(cards)}")
    return tuple([*said, *differences(before, after)])


def _busy(root: Path) -> float | None:
    """The share of all cores' time that something ran, over half a second of watching; not the load average, which remembers minutes."""
    first = _ticks(root)
    time.sleep(_LOOK)
    second = _ticks(root)
    if first is None or second is None or second[1] <= first[1]:
        return None
    return round((second[0] - first[0]) / (second[1] - first[1]), 3)


def _ticks(root: Path) -> tuple[int, int] | None:
    """Ticks in use and all ticks of all cores since the start: user, nice, system, idle, iowait, irq, softirq, steal."""
    words = (_text(root / "proc/stat") or "").partition("\n")[0].split()[1:9]
    if len(words) < 8 or not all(word.isdigit() for word in words):
        return None
    ticks = [int(word) for word in words]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _alike(root: Path, pattern: str) -> str | None:
    """The values of all files, each once."""
    values = {text for path in root.glob(pattern) if (text := _text(path))}
    return ", ".join(sorted(values)) or None


def _throttled(root: Path) -> int | None:
    """Throttling events of all cores; a package's count stands in the files of each of its cores and is left out."""
    return _sum(root.glob(f"{_CPU}/cpu[0-9]*/thermal_throttle/core_throttle_count"))


def _sum(paths: Iterable[Path]) -> int | None:
    counts = [int(text) for path in paths if (text := _text(path)) and text.isdigit()]
    return sum(counts) if counts else None


def _hottest(root: Path) -> float | None:
    texts = [_text(path) for path in root.glob("sys/class/thermal/thermal_zone*/temp")]
    degrees = [int(text) / 1000 for text in texts if text and text.lstrip("-").isdigit()]
    return max((value for value in degrees if -100 < value < 200), default=None)


def _pi_throttled(program: str = "vcgencmd") -> int | None:
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=_PATIENCE, check=False)
        return int(done.stdout.strip().removeprefix("throttled="), 16)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip("\0\n ") or None
    except (OSError, UnicodeDecodeError):  # a zone that is switched off says EAGAIN
        return None


def _shown(value: Value) -> str:
    return "unknown" if value is None else str(value)
