"""What every energy meter is: something to ask whether it can be read here, and to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from hesper.errors import JobError

__all__ = ["Availability", "Meter", "MeterLost", "Quantity", "Reading", "Scope"]

Quantity = Literal["watts", "joules"]
"""What a meter reads: the power of a moment, or the energy since it was opened."""

Scope = Literal["board", "module", "gpu", "package", "internal rails", "processors", "as recorded"]
"""What a total covers: all that a board draws, a compute module, a graphics card, processor packages and their memory, the rails that
a board measures, processors."""


class MeterLost(JobError):
    """A meter that could be read can be read no more."""


@dataclass(frozen=True)
class Reading:
    """What a meter shows, in watts or joules: the total of its scope, and every rail it knows, those inside others too.

    ``seconds`` is the moment it is of, on the monotonic clock, where the meter knows that better than who reads it.
    """

    total: float
    rails: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Availability:
    """Whether a meter can be read here, proven by reading it, and what is read or why nothing can be."""

    meter: str
    usable: bool
    reason: str
    scope: Scope


class Meter(Protocol):
    """A source of power or energy readings.

    ``period`` is the number of seconds between two readings worth taking; 0 where :meth:`read` itself waits for the next one.
    Meters of files and programs take a ``root`` folder in place of ``/``, or the program's name.
    """

    @property
    def name(self) -> str:
        """By which it is asked for."""

    @property
    def quantity(self) -> Quantity:
        """What its readings are."""

    @property
    def scope(self) -> Scope:
        """What its total covers."""

    @property
    def period(self) -> float:
        """Seconds between readings worth taking."""

    def probe(self) -> Availability:
        """Read once and say whether that worked."""

    def read(self) -> Reading:
        """What it shows now.

        Raises:
            MeterLost: it cannot be read.
        """

    def close(self) -> None:
        """Let go of what was opened; a program that runs is ended."""
