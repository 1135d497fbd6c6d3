"""Fixed counts and symmetric schedules made from an adaptive plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesper.curvature import ImageBatch
from hesper.graft import graft
from hesper.heart.calibrate import calibration, landed, mean_removed
from hesper.plan import Anatomy, TokenCut, empty_plan, validate
from vits import cuts_of, pictures, plan_for, tables, vit

DIALS = {"merge": 30.0, "drop": 2.0}


def setting(combine, counts, schedule):
    model = vit("plain")
    plan = plan_for(model, cuts_of(combine, [0, 1, 2], threshold=DIALS[combine]))
    batches = [ImageBatch(pictures(8))]
    return model, plan, batches, calibration(model, tables(model), lambda: batches, counts, schedule)


def test_adaptive_and_asymmetric_is_what_the_family_gives_already():
    assert setting("merge", "adaptive", "asymmetric")[3] is None


@pytest.mark.parametrize("counts", ["adaptive", "fixed"])
def test_a_plan_that_cuts_no_token_stays_one(counts):
    _, plan, _, shape = setting("merge", counts, "symmetric")
    assert shape(replace(plan, tokens=())) == ()


@pytest.mark.parametrize("combine", ["merge", "drop"])
def test_fixed_counts_follow_the_mean_of_the_adaptive_plan(combine):
    model, plan, batches, shape = setting(combine, "fixed", "asymmetric")
    mean = mean_removed(graft(model, plan, tables(model)), batches)
    cuts = shape(plan)
    assert sum(mean) > 1
    assert all(cut.threshold is None for cut in cuts)
    assert np.abs(np.cumsum([cut.remove for cut in cuts]) - np.cumsum(mean)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("schedule", ["asymmetric", "symmetric"])
def test_fixed_counts_know_no_multiple(schedule):
    _, plan, _, shape = setting("merge", "fixed", schedule)
    cuts = shape(plan)
    assert shape(replace(plan, tokens=tuple(replace(cut, multiple=4) for cut in plan.tokens))) == cuts
    assert {cut.multiple for cut in cuts} == {1}


def test_symmetric_thresholds_keep_their_multiple():
    _, plan, _, shape = setting("merge", "adaptive", "symmetric")
    assert {cut.multiple for cut in shape(replace(plan, tokens=tuple(replace(cut, multiple=4) for cut in plan.tokens)))} == {4}


@pytest.mark.parametrize("combine", ["merge", "drop"])
def test_symmetric_counts_take_the_same_share_of_what_is_left(combine):
    _, plan, _, shape = setting(combine, "fixed", "symmetric")
    left, shares = 12, []
    for cut in shape(plan):
        shares.append(cut.remove / left)
        left -= cut.remove
    assert max(shares) - min(shares) < 0.15


@pytest.mark.parametrize("combine", ["merge", "drop"])
def test_symmetric_thresholds_remove_about_the_symmetric_counts(combine):
    model, plan, batches, shape = setting(combine, "adaptive", "symmetric")
    fixed = setting(combine, "fixed", "symmetric")[3](plan)
    cuts = shape(plan)
    assert all(cut.remove is None for cut in cuts)
    adaptive = graft(model, plan_for(model, cuts), tables(model))
    mean = mean_removed(adaptive, batches)
    assert np.abs(np.array(mean) - np.array([cut.remove for cut in fixed])).max() <= 1.5


def test_mean_removed_counts_every_image():
    model = vit("plain")
    cut = graft(model, plan_for(model, cuts_of("merge", [0, 2], remove=3)), tables(model))
    batches = [ImageBatch(pictures(3)), ImageBatch(torch.randn(2, 3, 32, 24))]
    assert mean_removed(cut, batches) == [3.0, 3.0]


TINY = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)


@given(
    removed=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    edges=st.lists(st.integers(2, 197), max_size=12),
    combine=st.sampled_from(["merge", "drop"]),
)
def test_counts_land_where_the_device_says_and_remain_a_plan(removed, edges, combine):
    def landing(count):
        return min((edge for edge in edges if count < edge <= count + 15), default=count)

    cuts = tuple(TokenCut(2 * index, combine, remove=count) for index, count in enumerate(removed))
    plan = empty_plan("tiny", TINY)
    after = landed(cuts, plan, TINY, landing)
    validate(replace(plan, tokens=after))
    left = wanted = 197
    for cut, moved in zip(cuts, after, strict=True):
        wanted -= cut.remove
        before, left = left, left - moved.remove
        most = (before - 1) // 2 if combine == "merge" else before - 2
        assert left == max(min(landing(wanted), before), before - most) and left >= wanted


def test_thresholds_do_not_land():
    cuts = (TokenCut(3, "merge", threshold=0.1),)
    assert landed(cuts, empty_plan("tiny", TINY), TINY, lambda count: 197) == cuts
