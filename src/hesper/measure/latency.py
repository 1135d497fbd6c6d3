"""Times of single calls: warming up until they settle, and how they are spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hesper.errors import UsageError

__all__ = ["Latency", "Warmup", "latency", "settle"]

WINDOW = 5
"""Calls whose median is compared with that of as many before them."""

STILL = 0.03
"""Share by which the two medians may differ once a job has settled."""


@dataclass(frozen=True)
class Latency:
    """Seconds of a call over ``n`` calls: mean, median and upper percentiles, by linear interpolation between calls."""

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Warmup:
    """How many rounds of all jobs ran untimed, whether every job's times had settled by then, and each one's median ``seconds`` at last."""

    rounds: int
    settled: bool
    seconds: Mapping[str, float]


def latency(seconds: tuple[float, ...]) -> Latency:
    """How single calls are spread.

    Raises:
        UsageError: no calls.

    Example:
        >>> latency((0.010, 0.011, 0.012, 0.030)).p50
        0.0115
    """
    if not seconds:
        raise UsageError("There are no times to describe; run at least one call.")
    p50, p90, p95, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 95, 99]))
    return Latency(len(seconds), float(np.mean(seconds)), p50, p90, p95, p99)


def settle(
    jobs: Mapping[str, Callable[[], object]],
    *,
    most_rounds: int = 100,
    most_seconds: float = 60.0,
    least_seconds: float = 0.0,
    synchronise: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Warmup:
    """Run all jobs in turns until each one's times stand still: medians of 5 calls in a row differ by at most 3 %.

    Args:
        jobs: by name.
        most_rounds: after which it is given up.
        most_seconds: likewise.
        least_seconds: that it goes on for in any case, as clocks take that long to rise.
        synchronise: waits until the device is idle; called before every look at the clock.
        clock: seconds that only grow.

    Example:
        >>> settle({"steady": lambda: time.sleep(0.002)}).settled
        True
    """
    wait = synchronise or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    begun = clock()
    rounds = 0
    while (rounds < most_rounds or clock() - begun < least_seconds) and (rounds < 2 * WINDOW or clock() - begun < most_seconds):
        for name, job in jobs.items():
            wait()
            started = clock()
            job()
            wait()
            seconds[name].append(clock() - started)
        rounds += 1
        if clock() - begun >= least_seconds and all(_still(each) for each in seconds.values()):
            break
    still = all(_still(each) for each in seconds.values())
    return Warmup(rounds, still, {name: float(np.median(each[-WINDOW:])) for name, each in seconds.items()})


def _still(seconds: list[float]) -> bool:
    if len(seconds) < 2 * WINDOW:
        return False
    before, after = (float(np.median(part)) for part in (seconds[-2 * WINDOW : -WINDOW], seconds[-WINDOW:]))
    return abs(after - before) <= STILL * before
