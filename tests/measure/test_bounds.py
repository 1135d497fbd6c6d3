"""Bounds against exact binomial arithmetic and simulation-free coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hesper.measure.bounds import disagreement_p_value, images_needed, mean_upper_bound, provable_disagreement, skewness


@given(n=st.integers(5, 400), limit=st.floats(0.01, 0.5), alpha=st.floats(0.01, 0.3))
def test_a_true_rate_at_the_limit_is_wrongly_accepted_no_more_often_than_promised(n, limit, alpha):
    """Exact over all outcomes: the probability of a p-value at or below alpha is at most alpha."""
    accepted = [k for k in range(n + 1) if disagreement_p_value(k, n, limit) <= alpha]
    assert sum(float(stats.binom.pmf(k, n, limit)) for k in accepted) <= alpha + 1e-12


@given(n=st.integers(10, 300), limit=st.floats(0.02, 0.5))
def test_more_disagreement_never_proves_more(n, limit):
    values = [disagreement_p_value(k, n, limit) for k in range(n + 1)]
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == 1.0


@given(n=st.integers(1, 400), limit=st.floats(0.01, 0.5), share=st.floats(0, 1))
def test_a_p_value_is_the_probability_of_so_few_changes_and_never_above_hoeffding_and_bentkus(n, limit, share):
    changed = int(share * n)
    exact = math.fsum(math.comb(n, k) * limit**k * (1 - limit) ** (n - k) for k in range(changed + 1))
    p, rate = disagreement_p_value(changed, n, limit), min(changed / n, limit)
    divergence = (rate * math.log(rate / limit) if rate > 0 else 0.0) + (1 - rate) * math.log((1 - rate) / (1 - limit))
    assert p == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert p <= math.exp(-n * divergence) + 1e-12


@given(n=st.integers(1, 400), confidence=st.floats(0.5, 0.99), share=st.floats(0, 1))
def test_the_smallest_limit_that_is_proven_is_where_the_p_value_meets_the_confidence(n, confidence, share):
    changed = int(share * n)
    limit = provable_disagreement(changed, n, confidence)
    assert limit > changed / n or changed == n
    assert changed == n or disagreement_p_value(changed, n, limit) == pytest.approx(1 - confidence, rel=1e-6)


@given(limit=st.floats(0.005, 0.4), confidence=st.floats(0.6, 0.99))
def test_images_needed_is_the_first_sample_size_that_can_prove_anything(limit, confidence):
    needed = images_needed(limit, confidence)
    assert disagreement_p_value(0, needed, limit) <= 1 - confidence + 1e-9
    assert needed == 1 or math.exp((needed - 1) * math.log(1 - limit)) > 1 - confidence - 1e-9


def test_mean_bound_is_students():
    assert mean_upper_bound(2.0, 0.5, 10, 0.95) == pytest.approx(2.0 + 0.5 * 1.8331129326536335)
    assert mean_upper_bound(2.0, 0.5, 1, 0.95) == math.inf


@given(n=st.integers(2, 5000), confidence=st.floats(0.5, 0.999), skew=st.floats(-50, 50))
def test_the_bound_undoes_halls_transformation_and_is_never_below_students(n, confidence, skew):
    bound, plain = (mean_upper_bound(2.0, 0.5, n, confidence, own) for own in (skew, 0.0))
    assert bound >= plain
    if bound > plain:
        t, b = (2.0 - bound) / 0.5, skew / (3 * math.sqrt(n))
        quantile = float(stats.t.ppf(confidence, n - 1))
        assert ((1 + b * t) ** 3 - 1) / (3 * b) + b / 2 == pytest.approx(-quantile, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [200, 500])
def test_a_bound_on_losses_with_a_long_tail_is_broken_about_as_often_as_promised(n):
    """Log-normal losses, whose mean is known; without its skewness a sample promises too much."""
    rng, broken, plainly = np.random.default_rng(0), 0, 0
    truth, trials = math.exp(1.1**2 / 2), 3000
    for sample in np.exp(1.1 * rng.standard_normal((trials, n))):
        mean, error = sample.mean(), sample.std(ddof=1) / math.sqrt(n)
        broken += mean_upper_bound(mean, error, n, 0.95, skewness(sample)) < truth
        plainly += mean_upper_bound(mean, error, n, 0.95) < truth
    assert broken / trials < 0.065 and plainly > 1.3 * broken


def test_skewness_is_the_usual_one_and_none_where_nothing_varies():
    values = np.random.default_rng(1).exponential(size=50)
    assert skewness(values) == pytest.approx(float(stats.skew(values)))
    assert skewness(np.full(9, 0.3)) == skewness(np.zeros(3)) == 0.0
