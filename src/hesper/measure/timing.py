"""Which of several jobs is faster, and how sure that is: timed in turns, so that what slows the machine slows all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hesper.errors import UsageError

__all__ = ["Comparison", "Turns", "compare", "take_turns"]

RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Seconds of each round, of ``a`` and of ``b``, by a monotonic clock; round n of one was run in the same round as that of the other.

    ``ratio`` is the median over rounds of a / b, how many times faster b is: what slows a whole round cancels. ``low`` and ``high`` bound
    it with 95 % confidence (percentile bootstrap over rounds).
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    ratio: float
    low: float
    high: float

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of one round of ``a`` and of ``b``."""
        return float(np.median(self.a)), float(np.median(self.b))


@dataclass(frozen=True)
class Turns:
    """Seconds of each round, by job, on a monotonic clock; round n of one was run between those of all others, in one order or another.

    Example:
        >>> Turns({"slow": (2.0, 4.0, 6.0), "fast": (1.0, 2.0, 3.0)}).compare("fast", "slow").seconds
        (2.0, 4.0)
    """

    seconds: Mapping[str, tuple[float, ...]]

    def compare(self, a: str, b: str, seed: int = 0) -> Comparison:
        """How many times faster ``b`` was than ``a``; ``seed`` is of the bootstrap's resampling.

        Example:
            >>> Turns({"slow": (2.0, 4.0, 6.0), "fast": (1.0, 2.0, 3.0)}).compare("slow", "fast").ratio
            2.0
        """
        ratios = np.divide(self.seconds[a], self.seconds[b])
        drawn = np.median(ratios[np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))], axis=1)
        low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        return Comparison(self.seconds[a], self.seconds[b], float(np.median(ratios)), float(low), float(high))


def take_turns(
    jobs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    before: Callable[[str], object] | None = None,
    synchronise: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] | None = None,
) -> Turns:
    """Run every job once a round, in an order that changes every round: forward, then backward, then from the next job on.

    Args:
        jobs: by name.
        rounds: timed runs of each; at least 3.
        warmup: untimed runs of each beforehand.
        before: told whose turn it is, outside the timed parts.
        synchronise: waits until the device is idle, such as ``torch.cuda.synchronize``; called before every look at the clock.
        clock: seconds that only grow.
        progress: told the number of finished rounds, outside the timed parts.

    Raises:
        UsageError: no jobs, fewer than 3 rounds, or less than no warm-up.

    Example:
        >>> turns = take_turns({"long": lambda: sum(range(20000)), "short": lambda: sum(range(2000))}, rounds=9, warmup=2)
        >>> turns.compare("long", "short").ratio > 2
        True
    """
    if rounds < 3 or warmup < 0:
        raise UsageError(f"A comparison needs at least 3 rounds and no negative warm-up, not {rounds} and {warmup}.")
    if not jobs:
        raise UsageError("There is nothing to time; give at least one job.")
    wait = synchronise or (lambda: None)
    for _ in range(warmup):
        for job in jobs.values():
            job()
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 == 0 else reversed(order):
            if before:
                before(name)
            wait()
            started = clock()
            jobs[name]()
            wait()
            seconds[name].append(clock() - started)
        if progress:
            progress(number + 1)
    return Turns({name: tuple(each) for name, each in seconds.items()})


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    rounds: int,
    warmup: int,
    seed: int = 0,
    synchronise: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run ``a`` and ``b`` in turns, the first of a round changing every round, and compare their times.

    Args:
        a: the job to compare with.
        b: the job of interest.
        rounds: this and the others as for :func:`take_turns`.
        warmup: untimed runs of each beforehand.
        seed: of the bootstrap's resampling.
        synchronise: waits until the device is idle.
        clock: seconds that only grow.
        progress: told the number of finished rounds.

    Raises:
        UsageError: fewer than 3 rounds, or less than no warm-up.

    Example:
        >>> found = compare(lambda: sum(range(20000)), lambda: sum(range(2000)), rounds=9, warmup=2)
        >>> found.ratio > 2 and found.low <= found.ratio <= found.high
        True
    """
    jobs = {"a": a, "b": b}
    turns = take_turns(jobs, rounds=rounds, warmup=warmup, synchronise=synchronise, clock=clock, progress=progress)
    return turns.compare("a", "b", seed)
