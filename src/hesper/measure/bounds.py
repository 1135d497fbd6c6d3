"""What a sample lets one promise: upper bounds on a mean, distribution-free where the risk is bounded, asymptotic where not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def disagreement_p_value(changed: int, n: int, limit: float) -> float:
    """Exact p-value of "the true rate exceeds ``limit``" when of ``n`` images ``changed`` got another class.

        p = P[Binomial(n, limit) <= changed]

    A decision changes or it does not, so for independent images this holds for any distribution, and no valid threshold on the count
    accepts more. Hoeffding-Bentkus (Angelopoulos et al., "Learn then Test", arXiv 2110.01052, section 3.1), min(exp(-n KL(changed / n ||
    limit)), e p), which is also valid for graded losses, is never below it.

    Example:
        >>> disagreement_p_value(0, 100, 0.05) < 0.05 < disagreement_p_value(0, 20, 0.05)
        True
    """
    return float(stats.binom.cdf(changed, n, limit))


def images_needed(limit: float, confidence: float) -> int:
    """The fewest images that could ever prove a disagreement of at most ``limit``: those of a sample without any.

    Example:
        >>> images_needed(0.05, 0.95)
        59
    """
    return math.ceil(min(math.log1p(-confidence) / math.log1p(-limit), 1e18))


def provable_disagreement(changed: int, n: int, confidence: float) -> float:
    """The smallest limit that ``n`` images of which ``changed`` got another class prove with ``confidence``.

    Clopper and Pearson (1934), "The use of confidence or fiducial limits", Biometrika 26.

    Example:
        >>> round(provable_disagreement(0, 59, 0.95), 3)
        0.05
    """
    return float(stats.beta.ppf(confidence, changed + 1, n - changed)) if changed < n else 1.0


def mean_upper_bound(mean: float, stderr: float, n: int, confidence: float, skewness: float = 0.0) -> float:
    """One-sided upper confidence bound of a mean: asymptotic, not distribution-free.

    Student's t, and where the sample is skewed to the right the larger bound of Hall's transformation

        g(t) = ((1 + b t)^3 - 1) / (3 b) + b / 2,    b = skewness / (3 sqrt(n)),

    which takes the skewness out of t = (mean - mu) / stderr: losses have long tails, a sample often misses them, and its mean
    and its standard error are then too small together. The bound does not rise with every single loss: where a small one grows,
    the sample may become less skewed. P. Hall, "On the removal of skewness by transformation", Journal of the Royal Statistical
    Society B 54 (1992).

    Example:
        >>> round(mean_upper_bound(1.0, 0.1, 1000, 0.95), 3), round(mean_upper_bound(1.0, 0.1, 1000, 0.95, skewness=5.0), 3)
        (1.165, 1.185)
    """
    if n < 2:
        return math.inf
    quantile = float(stats.t.ppf(confidence, n - 1))
    bend = max(skewness, 0.0) / (3 * math.sqrt(n))
    if bend * quantile < 1e-9:
        return mean + quantile * stderr
    corrected = (float(np.cbrt(1 - 3 * bend * (quantile + bend / 2))) - 1) / bend
    return mean + max(quantile, -corrected) * stderr


def skewness(values: NDArray[np.number[Any]]) -> float:
    """Third central moment over the cubed standard deviation; 0 where nothing varies.

    Example:
        >>> round(skewness(np.array([0.0, 0.0, 0.0, 1.0])), 4), skewness(np.ones(3))
        (1.1547, 0.0)
    """
    own = values.astype(np.float64)
    mean = float(own.mean())
    spread = float(own.std())
    return float((((own - mean) / spread) ** 3).mean()) if spread > 1e-12 * abs(mean) else 0.0
