"""What a meter showed over a while, and the energy of a stretch of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hesper.meters.meter import Quantity, Scope

__all__ = ["FEWEST", "LARGEST_GAP", "LONGEST_PAUSE", "STEPS", "Energy", "Trace", "energy"]

FEWEST = 10
"""Readings that a stretch of time must hold."""

LARGEST_GAP = 0.2
"""Share of a stretch that may pass between two readings."""

LONGEST_PAUSE = 10.0
"""Of the usual time between two readings, what may pass between any."""

STEPS = 40
"""Times that a counter must move, since either end may lie within one of its steps."""


@dataclass(frozen=True)
class Trace:
    """Readings of one meter, in order: seconds on the monotonic clock, totals, and those of each rail; ``lost`` says why it ended early."""

    meter: str
    quantity: Quantity
    scope: Scope
    seconds: tuple[float, ...]
    totals: tuple[float, ...]
    rails: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    lost: str | None = None


@dataclass(frozen=True)
class Energy:
    """The energy of a stretch of time: joules and mean watts, or None and why there are none; net is without ``idle`` watts."""

    joules: float | None
    net_joules: float | None
    watts: float | None
    reason: str | None
    readings: int
    meter: str
    scope: Scope


def energy(trace: Trace, start: float, end: float, idle_watts: float | None = None) -> Energy:
    r"""The energy of the seconds from ``start`` to ``end``: E = ∫ P dt by the trapezium rule, or the difference of a counter.

    Both ends lie between two readings, and what the meter shows there is interpolated. Nothing is given where the readings do not cover
    the stretch: fewer than 10, a gap of more than a fifth of it or of ten times the usual one, none before or after it, a counter that
    moved fewer than 40 times, or time that does not grow.

    Example:
        >>> steady = Trace("synthetic", "watts", "as recorded", tuple(n / 10 for n in range(31)), (5.0,) * 31)
        >>> round(energy(steady, 0.55, 2.45, idle_watts=2.0).joules, 6), energy(steady, 0.55, 0.65).reason
        (9.5, '1 reading in 0.1 s, 10 are needed; measure for longer')
    """
    times, values = np.asarray(trace.seconds, dtype=np.float64), np.asarray(trace.totals, dtype=np.float64)
    inside = int(((times >= start) & (times <= end)).sum())
    reason = _flaw(trace, times, values, start, end)
    if reason:
        return Energy(None, None, None, reason, inside, trace.meter, trace.scope)
    joules = _between(trace.quantity, times, values, start, end)
    net = None if idle_watts is None else joules - idle_watts * (end - start)
    return Energy(joules, net, joules / (end - start), None, inside, trace.meter, trace.scope)


def _between(quantity: Quantity, times: NDArray[np.float64], values: NDArray[np.float64], start: float, end: float) -> float:
    first, last = np.interp((start, end), times, values)
    if quantity == "joules":
        return float(last - first)
    within = (times > start) & (times < end)
    seconds = np.concatenate([[start], times[within], [end]])
    watts = np.concatenate([[first], values[within], [last]])
    return float(np.sum(np.diff(seconds) * (watts[1:] + watts[:-1]) / 2))


def _flaw(trace: Trace, times: NDArray[np.float64], values: NDArray[np.float64], start: float, end: float) -> str | None:
    """Why the readings do not give the stretch's energy, or None."""
    length = end - start
    if length <= 0:
        return "the stretch of time is empty"
    if (np.diff(times) <= 0).any():
        return "the readings' times do not grow"
    if not np.isfinite(values).all():
        return "some readings are not numbers"
    after = f": {trace.lost.rstrip('.')}" if trace.lost else ""
    if not len(times) or times[0] > start:
        return f"no reading before the stretch{after}"
    if times[-1] < end:
        return f"no reading after the stretch{after}"
    within = np.flatnonzero((times >= start) & (times <= end))
    if len(within) < FEWEST:
        return f"{len(within)} {'reading' if len(within) == 1 else 'readings'} in {length:.3g} s, {FEWEST} are needed; measure for longer"
    spread = times[within[0] - (times[within[0]] > start) : within[-1] + 1 + (times[within[-1]] < end)]
    gap = float(np.diff(spread).max())
    usual = float(np.median(np.diff(times)))
    if gap > min(LARGEST_GAP * length, LONGEST_PAUSE * usual):
        return f"nothing was read for {gap:.3g} s, within the {length:.3g} s or beside them"
    if trace.quantity == "joules":
        if (np.diff(values) < 0).any():
            return "the counter went back"
        moves = len(set(values[within])) - 1
        if moves < STEPS:
            return f"the counter moved {moves} times in {length:.3g} s, {STEPS} are needed; measure for longer"
    return None
