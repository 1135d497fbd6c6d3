"""Ratios of times taken in several processes: each process is one sample, however many calls it timed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind

from hesper.errors import UsageError
from hesper.measure.timing import Turns

__all__ = ["Ratio", "ratio_apart", "ratio_in_turns"]

Seconds = Sequence[Sequence[float]]
RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times as long one job took as another, with a 95 % interval; ``processes`` is how many samples the interval knows of.

    Where a model's memory happens to lie differs from process to process, and its times with it, by up to a tenth; calls of one process
    know nothing of that, so that an interval of a single process is too narrow for a statement about the machine.
    """

    ratio: float
    low: float
    high: float
    processes: int


def ratio_in_turns(a: Seconds, b: Seconds, seed: int = 0) -> Ratio:
    """Seconds of ``a`` by those of ``b``, where round n of either was run in turns in the same process.

    With m_p the median over rounds of a / b in process p, the ratio is exp(mean of log m_p) and the interval Student's of that mean. Of a
    single process the interval is a percentile bootstrap over its rounds.

    Args:
        a: seconds of each round, by process.
        b: likewise, as many.
        seed: of the bootstrap.

    Raises:
        UsageError: no times, or not as many of one as of the other.

    Example:
        >>> found = ratio_in_turns([[2.0, 2.2], [2.4, 2.4]], [[1.0, 1.1], [1.0, 1.0]])
        >>> round(found.ratio, 3), found.processes, found.low < found.ratio < found.high
        (2.191, 2, True)
    """
    if not a or [len(each) for each in a] != [len(each) for each in b] or not all(len(each) for each in a):
        raise UsageError("There are no times to compare, or not as many of one as of the other; time both in the same rounds.")
    if len(a) == 1:
        found = Turns({"a": tuple(a[0]), "b": tuple(b[0])}).compare("a", "b", seed)
        return Ratio(found.ratio, found.low, found.high, 1)
    logs = [math.log(float(np.median(np.divide(one, other)))) for one, other in zip(a, b, strict=True)]
    interval = ttest_1samp(logs, 0.0).confidence_interval(COVERAGE) if np.ptp(logs) else (logs[0], logs[0])
    low, high = (float(math.exp(end)) for end in interval)
    return Ratio(math.exp(float(np.mean(logs))), low, high, len(a))


def ratio_apart(a: Seconds, b: Seconds, seed: int = 0) -> Ratio:
    """Seconds of ``a`` by those of ``b``, where the two were not taken in turns.

    exp(mean of log medians of a's processes - that of b's), with Welch's interval. Where either has a single process the interval is a
    bootstrap over all its calls, which knows nothing of other processes.

    Args:
        a: seconds of each call, by process.
        b: likewise.
        seed: of the bootstrap.

    Raises:
        UsageError: no times.

    Example:
        >>> found = ratio_apart([[2.0, 2.1], [2.2, 2.3]], [[1.0, 1.1], [1.0, 1.0]])
        >>> found.low < 2 < found.high and found.processes == 2
        True
    """
    if not (a and b and all(len(each) for each in (*a, *b))):
        raise UsageError("There are no times to compare; time both.")
    if min(len(a), len(b)) == 1:
        return _bootstrap(np.concatenate([*a]), np.concatenate([*b]), seed)
    one, other = ([math.log(float(np.median(each))) for each in side] for side in (a, b))
    middle = float(np.mean(one) - np.mean(other))
    interval = (middle, middle)
    if np.ptp(one) or np.ptp(other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # one side alone may stand still
            interval = ttest_ind(one, other, equal_var=False).confidence_interval(COVERAGE)
    return Ratio(math.exp(middle), float(math.exp(interval[0])), float(math.exp(interval[1])), min(len(a), len(b)))


def _bootstrap(a: np.ndarray, b: np.ndarray, seed: int) -> Ratio:
    rng = np.random.default_rng(seed)
    drawn = [np.median(rng.choice(seconds, (RESAMPLES, len(seconds))), axis=1) for seconds in (a, b)]
    low, high = (float(value) for value in np.percentile(drawn[0] / drawn[1], [50 * (1 - COVERAGE), 50 * (1 + COVERAGE)]))
    return Ratio(float(np.median(a) / np.median(b)), low, high, 1)
