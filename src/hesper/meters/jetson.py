"""Jetson boards: the power sensors on the module, read from the kernel's files.

Each channel of a TI INA3221 gives millivolts and milliamperes; the carrier's INA238 of a Thor gives microwatts. Which rails make up
the whole is a matter of the board: a rail at the module's input is the total alone, and where there is none the rails that hang on the
input side are added, without those fed by another of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope

__all__ = ["Jetson", "Rail", "parts_of", "rails", "scope_of", "total_watts"]

INPUTS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Rails that carry all that a board (VIN) or its module draws, the outermost first."""

SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin: VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0 (developer guide, r36.4.3)
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier: no document says how they nest; all are added, as jetson_stats does
)
THOR = ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")
"""Rails of Thor's module, whose carrier has an INA238 at its input; other boards have INA238s at other places."""

_UNCONNECTED = ("NC", "sum of shunt")
_CHIPS = (
    "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*",
    "sys/bus/i2c/drivers/ina238*/*/hwmon/hwmon*",
    "sys/bus/i2c/drivers/ina3221*/*/iio:device*",  # JetPack 4 and before
    "sys/bus/i2c/devices/*/hwmon/hwmon*",
    "sys/class/hwmon/hwmon*",
)


@dataclass(frozen=True)
class Rail:
    """A measured wire: its label, and the files whose numbers make its power, by what they count."""

    label: str
    millivolts: Path | None = None
    milliamperes: Path | None = None
    microwatts: Path | None = None

    def watts(self) -> float:
        """Its power now; OSError or ValueError where a file is gone or holds no number."""
        if self.microwatts is not None:
            return _number(self.microwatts) * 1e-6
        assert self.millivolts is not None and self.milliamperes is not None
        return _number(self.millivolts) * _number(self.milliamperes) * 1e-6


def rails(root: Path) -> tuple[Rail, ...]:
    """Every rail that the sensors under ``root`` measure, each sensor once, by label."""
    found: list[Rail] = []
    seen: set[Path] = set()
    for pattern in _CHIPS:
        for folder in sorted(root.glob(pattern)):
            for chip in (folder, *sorted(folder.glob("hwmon*"))):  # JetPack 7 nests one deeper
                if chip.is_dir() and chip.resolve() not in seen:
                    seen.add(chip.resolve())
                    found += _of_chip(chip)
    inputs = [rail for rail in found if rail.microwatts is not None]
    if len(inputs) == 1 and {rail.label for rail in found} >= set(THOR):
        found[found.index(inputs[0])] = replace(inputs[0], label="VIN")
    return tuple(sorted(found, key=lambda rail: rail.label))


def parts_of(labels: Collection[str]) -> tuple[str, ...] | None:
    """The rails that add up to all that is drawn, or None where nobody has said how it is made up.

    Example:
        >>> parts_of({"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}), parts_of({"VDD_CORE"})
        (('VDD_IN',), None)
    """
    for label in INPUTS:
        if label in labels:
            return (label,)
    return next((parts for parts in SUMS if set(parts) <= set(labels)), None)


def total_watts(watts: Mapping[str, float]) -> float | None:
    """All that is drawn, from the power of the rails, or None where it is not known how it is made up.

    Example:
        >>> round(total_watts({"VDD_GPU_SOC": 5.2, "VDD_CPU_CV": 2.7, "VIN_SYS_5V0": 4.7, "VDDQ_VDD2_1V8AO": 0.4}), 3)
        12.6
    """
    parts = parts_of(watts)
    return None if parts is None else sum(watts[label] for label in parts)


def scope_of(labels: Collection[str]) -> Scope:
    """What their total covers: on Thor the carrier too, otherwise the module."""
    return "board" if parts_of(labels) == ("VIN",) else "module"


class Jetson:
    """The sensors of a Jetson (INA3221, on Thor also INA238), by the kernel's files under ``root``."""

    name = "jetson"
    quantity: Quantity = "watts"
    period = 0.05  # a conversion takes some 7 ms and a register 0.5 ms; more often is only read again

    def __init__(self, root: Path = Path("/")) -> None:
        self._rails = rails(root)
        self._needed = parts_of([rail.label for rail in self._rails]) or ()
        self.scope: Scope = scope_of([rail.label for rail in self._rails])

    def probe(self) -> Availability:
        """Read every rail once."""
        if not self._rails:
            return self._no("no INA3221 or INA238 sensor is shown under /sys; on a Jetson, check that its driver is loaded")
        labels = [rail.label for rail in self._rails]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            return self._no(f"several sensors are called {', '.join(twice)}, and which is which is not known")
        try:
            read = self.read()
        except MeterLost as error:
            return self._no(str(error))
        return Availability(self.name, True, f"rails {', '.join(read.rails)}", self.scope)

    def read(self) -> Reading:
        """The power of every rail that can be read, and of all together."""
        if not self._needed:
            labels = ", ".join(rail.label for rail in self._rails) or "(none)"
            raise MeterLost(f"How the rails {labels} make up this board's total is not known.")
        watts = {}
        for rail in self._rails:
            try:
                watts[rail.label] = rail.watts()
            except (OSError, ValueError) as error:
                if rail.label in self._needed:
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else "there is no number"
                    raise MeterLost(f"The power of {rail.label} cannot be read: {reason.lower()}.") from error
        return Reading(sum(watts[label] for label in self._needed), watts)

    def close(self) -> None:
        """Files are opened for each reading; there is nothing to let go of."""

    def _no(self, reason: str) -> Availability:
        return Availability(self.name, False, reason.rstrip("."), self.scope)


def _of_chip(chip: Path) -> Iterator[Rail]:
    name = _text(chip / "name") or ""
    if "ina238" in name and (chip / "power1_input").exists():
        yield Rail(_text(chip / "label") or _text(chip / "in1_label") or f"INA238 {chip.name}", microwatts=chip / "power1_input")
    elif name and "ina3221" not in name:
        return
    for channel in (1, 2, 3):
        rail = Rail(_text(chip / f"in{channel}_label") or "", chip / f"in{channel}_input", chip / f"curr{channel}_input")
        if _text(chip / f"in{channel}_enable") != "0" and _measures(rail):
            yield rail
    for channel in (0, 1, 2):
        rail = Rail(_text(chip / f"rail_name_{channel}") or "", chip / f"in_voltage{channel}_input", chip / f"in_current{channel}_input")
        if _measures(rail):
            yield rail


def _measures(rail: Rail) -> bool:
    files = (rail.millivolts, rail.milliamperes)
    return bool(rail.label) and not rail.label.startswith(_UNCONNECTED) and all(path is not None and path.exists() for path in files)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip("\0\n ") or None
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int:
    words = path.read_text(encoding="utf-8").split()  # some kernels write a unit behind the number
    return int(words[0]) if words else int("")
