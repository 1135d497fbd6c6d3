"""RAPL: the energy counters of Intel and AMD processors, by the kernel's files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope

__all__ = ["Domain", "Rapl", "domains"]

ZONES = "sys/class/powercap"
MENDING = "sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"


@dataclass(frozen=True)
class Domain:
    """A counter of microjoules that begins again at ``wraps``; ``adds`` where no other counter holds its energy."""

    label: str
    counter: Path
    wraps: int
    adds: bool


def domains(root: Path) -> tuple[Domain, ...]:
    """The counters under ``root``, each once.

    Packages and their memory add up to the total. Cores and graphics lie within a package, ``psys`` holds packages, and
    ``intel-rapl-mmio`` shows the packages of ``intel-rapl`` once more.
    """
    found: dict[str, Domain] = {}
    for interface in ("intel-rapl", "intel-rapl-mmio"):
        for folder in sorted((root / ZONES).glob(f"{interface}:*")):
            name, parent = _text(folder / "name"), _parent(root, folder)
            inner = parent is not None
            label = f"{parent}/{name}" if inner else name
            wraps = _text(folder / "max_energy_range_uj")
            if name and wraps.isdigit() and int(wraps) and label not in found:
                adds = name == "dram" if inner else name.startswith("package")
                found[label] = Domain(label, folder / "energy_uj", int(wraps), adds)
    return tuple(found.values())


class Rapl:
    """Joules of all processor packages and their memory since it was opened."""

    name = "rapl"
    quantity: Quantity = "joules"
    scope: Scope = "package"
    period = 0.05  # counters move every millisecond

    def __init__(self, root: Path = Path("/")) -> None:
        # A counter within another may be hidden from everybody but root without harm.
        self._domains = tuple(domain for domain in domains(root) if domain.adds or os.access(domain.counter, os.R_OK))
        self._last: dict[str, int] = {}
        self._microjoules = {domain.label: 0 for domain in self._domains}

    def probe(self) -> Availability:
        """Read every counter once."""
        if not any(domain.adds for domain in self._domains):
            return self._no(f"no package counter under /{ZONES}; it takes an Intel or AMD processor and a kernel that shows its counters")
        try:
            self.read()
        except MeterLost as error:
            return self._no(str(error).rstrip("."))
        return Availability(self.name, True, f"counters {', '.join(domain.label for domain in self._domains)}", self.scope)

    def read(self) -> Reading:
        """The joules since the first reading; a counter that began again in between has its range added once."""
        for domain in self._domains:
            now = self._counted(domain)
            last = self._last.get(domain.label, now)
            self._microjoules[domain.label] += (now - last) % domain.wraps
            self._last[domain.label] = now
        joules = {label: counted * 1e-6 for label, counted in self._microjoules.items()}
        return Reading(sum(joules[domain.label] for domain in self._domains if domain.adds), joules)

    def close(self) -> None:
        """Files are opened for each reading; there is nothing to let go of."""

    def _counted(self, domain: Domain) -> int:
        try:
            return int(domain.counter.read_text(encoding="utf-8"))
        except PermissionError as error:
            raise MeterLost(f"The counters may be read by root only; '{MENDING}' lets everybody, until the next start.") from error
        except (OSError, ValueError) as error:
            raise MeterLost(f"The counter of {domain.label} cannot be read any more.") from error

    def _no(self, reason: str) -> Availability:
        return Availability(self.name, False, reason, self.scope)


def _parent(root: Path, folder: Path) -> str | None:
    """The name of the package that an inner zone such as ``intel-rapl:0:1`` belongs to."""
    interface, *numbers = folder.name.split(":")
    return _text(root / ZONES / f"{interface}:{numbers[0]}" / "name") if len(numbers) > 1 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
