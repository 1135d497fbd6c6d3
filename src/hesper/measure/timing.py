"""Which of two jobs is faster, and how sure that is: timed in turns, so that what slows the machine slows both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hesper.errors import UsageError

__all__ = ["Comparison", "compare"]

RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Seconds of each round, of ``a`` and of ``b``, by a monotonic clock; round n of one was run right beside round n of the other.

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
        rounds: timed runs of each; at least 3.
        warmup: untimed runs of each beforehand.
        seed: of the bootstrap's resampling.
        synchronise: waits until the device is idle, such as ``torch.cuda.synchronize``; called before every look at the clock.
        clock: seconds that only grow.
        progress: told the number of finished rounds, outside the timed parts.

    Raises:
        UsageError: fewer than 3 rounds, or less than no warm-up.

    Example:
        >>> found = compare(lambda: sum(range(20000)), lambda: sum(range(2000)), rounds=9, warmup=2)
        >>> found.ratio > 2 and found.low <= found.ratio <= found.high
        True
    """
    if rounds < 3 or warmup < 0:
        raise UsageError(f"A comparison needs at least 3 rounds and no negative warm-up, not {rounds} and {warmup}.")
    wait = synchronise or (lambda: None)
    for _ in range(warmup):
        a()
        b()
    jobs, seconds = (a, b), np.empty((rounds, 2))
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            wait()
            started = clock()
            jobs[which]()
            wait()
            seconds[number, which] = clock() - started
        if progress:
            progress(number + 1)
    return _comparison(seconds, np.random.default_rng(seed))


def _comparison(seconds: np.ndarray[tuple[int, int], np.dtype[np.float64]], generator: np.random.Generator) -> Comparison:
    rounds = len(seconds)
    ratios = seconds[:, 0] / seconds[:, 1]
    drawn = np.median(ratios[generator.integers(0, rounds, (RESAMPLES, rounds))], axis=1)
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    a, b = (tuple(column) for column in seconds.T.tolist())
    return Comparison(a, b, float(np.median(ratios)), float(low), float(high))
