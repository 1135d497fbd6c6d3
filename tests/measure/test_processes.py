"""Ratios over processes against simulations whose truth is known, and against formulas written out."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from hesper.errors import UsageError
from hesper.measure.processes import ratio_apart, ratio_in_turns

T_4 = 2.7764451051977987  # the 97.5 % point of Student's t with 4 degrees of freedom, as tables have it
ROUNDS = 7


def taken(rng: np.random.Generator, processes: int, seconds: float) -> list[list[float]]:
    """Times of a machine on which processes differ by 5 % and calls of one process by 2 %."""
    own = seconds * np.exp(0.05 * rng.standard_normal((processes, 1)))
    return (own * np.exp(0.02 * rng.standard_normal((processes, ROUNDS)))).tolist()


def test_the_interval_is_students_over_the_processes() -> None:
    rng = np.random.default_rng(3)
    a, b = taken(rng, 5, 2.0), taken(rng, 5, 1.0)
    logs = [math.log(sorted(x / y for x, y in zip(one, other, strict=True))[ROUNDS // 2]) for one, other in zip(a, b, strict=True)]
    mean = sum(logs) / 5
    reach = T_4 * math.sqrt(sum((log - mean) ** 2 for log in logs) / 4 / 5)
    found = ratio_in_turns(a, b)
    assert (found.ratio, found.low, found.high) == pytest.approx((math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)))
    assert found.processes == 5


@pytest.mark.parametrize("processes", [3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(processes: int) -> None:
    rng = np.random.default_rng(processes)
    turns = [ratio_in_turns(taken(rng, processes, 2.0), taken(rng, processes, 1.0)) for _ in range(600)]
    apart = [ratio_apart(taken(rng, processes, 2.0), taken(rng, processes, 1.0)) for _ in range(600)]
    for found in (turns, apart):
        held = np.mean([each.low < 2.0 < each.high for each in found])
        assert 0.92 < held < 0.985


def test_the_interval_of_one_process_is_too_narrow_for_others_and_says_that_it_is_of_one() -> None:
    rng = np.random.default_rng(1)
    found = [ratio_in_turns(taken(rng, 1, 2.0), taken(rng, 1, 1.0)) for _ in range(200)]
    assert np.mean([each.low < 2.0 < each.high for each in found]) < 0.5
    assert {each.processes for each in found} == {1}
    assert ratio_apart(taken(rng, 4, 2.0), taken(rng, 1, 1.0)).processes == 1


def test_times_that_stand_still_have_an_interval_of_one_point() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (ratio_in_turns([[2.0] * 3] * 3, [[1.0] * 3] * 3), ratio_apart([[2.0] * 3] * 3, [[1.0] * 3] * 3)):
            assert (found.ratio, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
        half = ratio_apart([[2.0] * 3] * 3, [[1.0], [1.1], [0.9]])
        assert half.low < half.ratio < half.high


@pytest.mark.parametrize(("a", "b"), [([], []), ([[1.0]], [[1.0, 2.0]]), ([[1.0]], [[1.0], [1.0]]), ([[]], [[]])])
def test_what_cannot_be_compared_is_refused(a: list[list[float]], b: list[list[float]]) -> None:
    with pytest.raises(UsageError, match="no times to compare"):
        ratio_in_turns(a, b)


def test_no_times_are_refused_apart_too() -> None:
    for a, b in (([], [[1.0]]), ([[1.0]], [[]])):
        with pytest.raises(UsageError, match="no times to compare"):
            ratio_apart(a, b)
