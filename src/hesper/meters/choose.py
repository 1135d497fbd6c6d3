"""Which meter to read here: every one is asked, and the one that covers most is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hesper.errors import UsageError
from hesper.meters.apple import Apple
from hesper.meters.jetson import Jetson
from hesper.meters.meter import Availability, Meter
from hesper.meters.nvml import Nvml
from hesper.meters.rapl import Rapl
from hesper.meters.raspberry import Raspberry
from hesper.meters.replay import Replay
from hesper.meters.tegrastats import Tegrastats
from hesper.registry import did_you_mean

__all__ = ["METERS", "make", "survey", "usable"]

METERS = {
    "jetson": "Jetson: the module's power sensors",
    "tegrastats": "Jetson: the program tegrastats",
    "nvml": "NVIDIA cards",
    "rapl": "Intel and AMD processors",
    "raspberry": "Raspberry Pi 5",
    "apple": "Apple silicon",
}
"""Every meter of a device, by name."""


def make(name: str, root: Path = Path("/"), card: str | int = 0) -> Meter:
    """The meter that goes by a name; ``replay:FILE`` plays a recorded trace. ``card`` is the graphics card that NVML reads.

    Raises:
        UsageError: there is no such meter, or the record cannot be read.

    Example:
        >>> make("rapl").scope
        'package'
    """
    kind, _, file = name.partition(":")
    if kind == "replay" and file:
        return Replay(Path(file))
    if name not in METERS:
        raise UsageError(f"There is no meter '{name}'; {did_you_mean(name, [*METERS, 'replay:FILE'])}.")
    if name == "jetson":
        return Jetson(root)
    if name == "rapl":
        return Rapl(root)
    if name == "nvml":
        return Nvml(card)
    kinds: dict[str, type[Tegrastats | Raspberry | Apple]] = {
        "tegrastats": Tegrastats,
        "raspberry": Raspberry,
        "apple": Apple,
    }
    return kinds[name]()


def survey(root: Path = Path("/")) -> tuple[Availability, ...]:
    """What every meter says of itself here."""
    found = []
    for name in METERS:
        with contextlib.closing(make(name, root)) as meter:
            found.append(meter.probe())
    return tuple(found)


@contextlib.contextmanager
def usable(name: str, root: Path = Path("/"), card: str | int | None = None) -> Iterator[tuple[Meter | None, str]]:
    """A meter that can be read, and what it reads; or None, and why there is none.

    Args:
        name: a meter's name, ``auto`` or ``none``. auto takes a Jetson's module, then the graphics card
            where the job runs on one, or else what measures processors.
        root: the folder in place of ``/``.
        card: the graphics card that the job runs on, if it does: its UUID, or NVML's number.

    Raises:
        UsageError: there is no such meter.
    """
    if name == "none":
        yield None, "none was asked for"
        return
    reasons = []
    for candidate in _order(card is not None) if name == "auto" else (name,):
        with contextlib.closing(make(candidate, root, 0 if card is None else card)) as meter:
            said = meter.probe()
            if said.usable:
                yield meter, said.reason
                return
        reasons.append(f"{candidate}: {said.reason}")
    yield None, "; ".join(reasons)


def _order(cuda: bool) -> tuple[str, ...]:
    return ("jetson", "tegrastats", "nvml") if cuda else ("jetson", "tegrastats", "rapl", "raspberry", "apple")
