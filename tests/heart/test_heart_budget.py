"""The budget on synthetic families whose truth is known: never over, and as close as measurement allows."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hesper.cost import head_macs
from hesper.errors import Interrupted, JobError, OutOfReach, UsageError
from hesper.heart.budget import Improvement, _rounded_up, check_sample, choose
from hesper.heart.family import STAGES, Family, affordable_heads, deciding_blocks
from hesper.heart.fit import Atlas, Tables
from hesper.measure.evaluate import Evaluation
from hesper.plan import Anatomy, Budget, Pricing, check_budget, empty_plan

TINY = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
DENSE = 1_000_000


def outcome(kl, agree, macs):
    counts = np.ones((len(kl), 12), dtype=np.int64)
    return Evaluation(kl, agree, macs, counts, counts, DENSE, None, None, None, None, None, 0.0)


def family(name="plain", heads="none"):
    atlas = Atlas(torch.zeros(12, 196), torch.arange(36.0).view(12, 3), torch.zeros(12, 3), 8)
    blank = empty_plan("tiny", TINY)
    blank = dataclasses.replace(blank, provenance=dataclasses.replace(blank.provenance, verify_images=200))
    return Family(name, blank, deciding_blocks(TINY, "every"), "merge", heads, atlas, Tables({}, ()))


def world(n, seed, drift=1.0, spread=0.05):
    """Truth: kept MACs fall with the logarithm of the dial, drift and disagreement rise with it; images differ."""
    rng = np.random.default_rng(seed)
    hard = rng.lognormal(0, 1, n)
    noise = rng.normal(0, spread, n)

    def trial(plan):
        dial = plan.tokens[0].threshold
        kept = np.clip(1 / (1 + (dial / 1e-4) ** 0.25) + noise, 0.1, 1.0)
        kl = drift * hard * dial * 100
        agree = (rng.random(n) >= np.minimum(0.9, kl / 2)).astype(float)
        return outcome(kl, agree, kept * DENSE)

    return trial


def pick(budget, n=200, seed=0, families=None, drift=None):
    drift = drift or {}
    return choose(
        families or [family()],
        budget,
        lambda f: world(100, seed + 1, drift.get(f.name, 1.0)),
        lambda f: world(n, seed, drift.get(f.name, 1.0)),
    )


@given(value=st.floats(0.3, 0.9), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_macs_are_never_over_and_nearly_spent(value, seed):
    chosen = pick(Budget("macs", value, 0.95), seed=seed)
    assert chosen.measured.macs.mean < value
    assert chosen.measured.macs.mean > value - 0.05
    assert f"{value:g}" in chosen.measured.statement


@given(value=st.floats(0.001, 0.3), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_loss_is_never_over_and_more_budget_never_buys_a_milder_plan(value, seed):
    chosen, richer = pick(Budget("loss", value, 0.95), seed=seed), pick(Budget("loss", 2 * value, 0.95), seed=seed)
    assert chosen.measured.drift_kl.mean < value
    assert chosen.evaluation.drift_kl.std() > 0
    assert richer.dial > chosen.dial


def test_disagreement_is_proven_not_just_observed():
    chosen = pick(Budget("disagreement", 0.05, 0.95), n=400)
    assert 1 - chosen.measured.agreement.mean < 0.05
    assert "exact binomial" in chosen.measured.statement


def test_the_family_of_less_drift_wins():
    families = [family("bad"), family("good")]
    assert pick(Budget("macs", 0.6, 0.95), families=families, drift={"bad": 3.0, "good": 1.0}).family.name == "good"


def test_the_family_that_drifts_less_on_more_images_wins_though_few_images_say_otherwise():
    few, many = {"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 1.0}
    budget, families = Budget("macs", 0.6, 0.95), [family("a"), family("b")]
    chosen = choose(families, budget, lambda f: world(50, 1, few[f.name]), lambda f: world(200, 0), lambda f: world(400, 2, many[f.name]))
    assert chosen.family.name == "b"
    assert 0.55 < chosen.measured.macs.mean < 0.6


@pytest.mark.parametrize("budget", [Budget("macs", 0.6, 0.95), Budget("loss", 0.05, 0.95)])
@pytest.mark.parametrize(("refined", "wins"), [(0.7, True), (1.4, False)])
def test_a_refined_family_is_taken_where_it_does_better_and_then_proven(budget, refined, wins):
    drift, asked, proven = {"plain": 1.0, "plain, refined": refined}, [], []

    def refine(one, dial):
        asked.append(dial)
        return dataclasses.replace(one, name="plain, refined")

    def verify(one):
        proven.append(one.name)
        return world(400, 0, drift[one.name])

    chosen = choose(
        [family()],
        budget,
        lambda f: world(100, 1, drift[f.name]),
        verify,
        improvements=(Improvement("refine", lambda f: None, refine, lambda f: world(100, 1, drift[f.name])),),
    )
    (attempt,) = chosen.attempts
    assert (attempt.name, attempt.taken) == ("refine", wins) and "at as many MACs" in attempt.why
    assert (attempt.after < attempt.before) == wins
    assert [chosen.family.name] == proven == ["plain, refined" if wins else "plain"]
    assert len(asked) == 1 and 0.1 < asked[0] / chosen.dial < 10
    assert {point.n for point in chosen.points} == {100, 400}
    truth = drift[chosen.family.name]
    assert all(point.drift_kl == pytest.approx(truth * point.dial * 100 * math.exp(0.5), rel=0.6) for point in chosen.points)


@pytest.mark.parametrize("budget", [Budget("macs", 0.6, 0.95), Budget("loss", 0.05, 0.95)])
def test_improvements_build_on_one_another_and_one_that_fails_or_makes_nothing_changes_nothing(budget):
    drift, given = {"plain": 1.0, "plain, a": 0.8, "plain, a, b": 0.5}, []

    def make(name):
        def made(one, dial):
            given.append(one.name)
            if name == "fails":
                raise JobError("not finite")
            return dataclasses.replace(one, name=f"{one.name}, {name}")

        why = {"hindered": "too few images"}.get(name)
        return Improvement(name, lambda f: why, made, lambda f: world(100, 1, drift[f.name]))

    steps = [make(name) for name in ("hindered", "a", "fails", "b")]
    chosen = choose([family()], budget, lambda f: world(100, 1, drift[f.name]), lambda f: world(400, 0, drift[f.name]), improvements=steps)
    assert chosen.family.name == "plain, a, b" and given == ["plain", "plain, a", "plain, a"]
    assert [(attempt.name, attempt.taken) for attempt in chosen.attempts] == [
        ("hindered", False),
        ("a", True),
        ("fails", False),
        ("b", True),
    ]
    assert [attempt.why for attempt in chosen.attempts if attempt.before is None] == ["too few images", "given up: not finite"]


@pytest.mark.parametrize("budget", [Budget("macs", 0.6, 0.95), Budget("loss", 0.05, 0.95)])
@pytest.mark.parametrize(("close", "wins"), [(1.15, "slow to show, improved"), (9.0, "first, improved")])
def test_sets_of_blocks_little_behind_are_improved_too_and_the_best_then_wins(budget, close, wins):
    families = [dataclasses.replace(family(name), blocks=blocks) for name, blocks in (("first", (0, 2, 4)), ("slow to show", (1, 3, 5)))]
    families.insert(1, dataclasses.replace(families[0], name="same blocks"))
    drift = {"first": 1.0, "same blocks": 1.01, "slow to show": close, "first, improved": 0.95, "slow to show, improved": 0.5}
    made = []

    def improve(one, dial):
        made.append(one.name)
        return dataclasses.replace(one, name=f"{one.name}, improved")

    step = Improvement("refine", lambda f: None, improve, lambda f: world(100, 1, drift[f.name]))
    chosen = choose(families, budget, lambda f: world(100, 1, drift[f.name]), lambda f: world(400, 0, drift[f.name]), improvements=[step])
    assert chosen.family.name == wins
    assert made == ["first", "slow to show"][: 1 if close > 2 else 2] == [contender.family for contender in chosen.contenders]
    assert all(contender.after < contender.before for contender in chosen.contenders) or budget.kind == "loss"
    assert min(contender.after for contender in chosen.contenders) == chosen.contenders[len(made) - 1].after


@pytest.mark.parametrize("budget", [Budget("macs", 0.6, 0.95), Budget("loss", 0.05, 0.95)])
def test_an_improvement_that_is_interrupted_ends_the_job(budget):
    def interrupted(one, dial):
        raise Interrupted("one of the 2 processes died")

    improvement = Improvement("refit", lambda f: None, interrupted, lambda f: world(100, 1))
    with pytest.raises(Interrupted):
        choose([family()], budget, lambda f: world(100, 1), lambda f: world(400, 0), improvements=[improvement])


def test_where_macs_fall_steeply_behind_a_plain_the_budget_is_nearly_spent():
    def steep(n, seed):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, 0.02, n)

        def trial(plan):
            dial = plan.tokens[0].threshold
            kept = 1 - 0.28 / (1 + (dial / 1e-2) ** -10.0) + noise
            kl = rng.lognormal(0, 0.1, n) * dial
            return outcome(kl, np.ones(n), kept * DENSE)

        return trial

    chosen = choose([family()], Budget("macs", 0.9, 0.95), lambda f: steep(128, 1), lambda f: steep(500, 0))
    assert 0.885 < chosen.measured.macs.mean < 0.9


def test_a_cliff_in_the_macs_does_not_refuse_what_can_be_proven():
    def cliff(at, n, seed):
        noise = np.random.default_rng(seed).normal(0, 0.02, n)

        def trial(plan):
            dial = plan.tokens[0].threshold
            kept = np.clip(0.63 - 0.03 * math.log(dial / 1e-4) - 0.06 * (dial > at) + noise - noise.mean(), 0.05, 1)
            return outcome(np.full(n, 100 * dial), np.ones(n), kept * DENSE)

        return trial

    # Beyond the cliff on the images that place the dial, and not yet on those that prove it.
    chosen = choose([family()], Budget("macs", 0.6, 0.95), lambda f: cliff(1e-4, 40, 1), lambda f: cliff(1.3e-4, 200, 2))
    assert 1.3e-4 < chosen.dial < 3e-4 and chosen.measured.macs.mean < 0.6


@given(st.floats(1e-9, 0.999))
def test_the_advice_is_never_below_what_is_needed(needed):
    advised = _rounded_up(needed)
    assert needed * (1 - 1e-9) <= advised <= needed * 1.0101
    assert advised == float(f"{advised:g}")


@pytest.mark.parametrize("budget", [Budget("macs", 0.6, 0.95), Budget("loss", 0.05, 0.95)])
def test_a_family_of_heads_that_cuts_none_is_not_measured(budget):
    seen = []

    def tune(f):
        seen.append(f.name)
        return world(100, 1)

    dear = Atlas(torch.zeros(12, 196), 1 + torch.arange(36.0).view(12, 3), torch.zeros(12, 3), 8)
    with_heads = dataclasses.replace(family("with heads", "static"), atlas=dear)
    choose([family("tokens"), with_heads], budget, tune, lambda f: world(200, 0))
    assert seen == ["tokens"]


def test_what_cannot_be_had_is_said_with_what_can():
    with pytest.raises(JobError, match=r"least that can be had is 0\.1"):
        pick(Budget("macs", 0.05, 0.95))
    with pytest.raises(JobError, match="safest plan tried.*Allow at least"):
        pick(Budget("disagreement", 0.02, 0.95), n=100)


@pytest.mark.parametrize(
    ("budget", "n", "words"),
    [
        (Budget("macs", 0.0, 0.95), 100, "above 0 and be at most 1"),
        (Budget("macs", -0.2, 0.95), 100, "above 0 and be at most 1"),
        (Budget("macs", 1.2, 0.95), 100, "above 0 and be at most 1"),
        (Budget("loss", 0.0, 0.95), 100, "above 0"),
        (Budget("loss", math.nan, 0.95), 100, "above 0"),
        (Budget("disagreement", 0.05, 0.95), 40, "at least 59 readable images"),
        (Budget("disagreement", 0.05, 1.0), 40, "confidence"),
        (Budget("macs", 0.5, 0.95), 1, "at least 10 readable images"),
    ],
)
def test_impossible_budgets_are_refused_beforehand(budget, n, words):
    with pytest.raises(UsageError, match=words):
        check_budget(budget)
        check_sample(budget, n)


def test_heads_go_by_price_per_mac_and_the_dearest_of_a_block_stays():
    prices = torch.tensor([[0.1, 0.2, 0.3], [5.0, 0.05, 6.0]])
    two = dataclasses.replace(TINY, depth=2)
    cuts = affordable_heads(prices, two, 1.0 / head_macs(two))
    assert [(cut.block, cut.remove) for cut in cuts] == [(0, (0, 1)), (1, (1,))]
    assert affordable_heads(prices, two, 0.0) == ()


def test_a_milder_dial_cuts_no_head_a_stronger_one_keeps():
    members = [family("f", "static").at(dial) for dial in (1e-6, 1e-3, 1e-1, 1e1)]
    heads = [{(cut.block, head) for cut in plan.heads for head in cut.remove} for plan in members]
    assert all(a <= b for a, b in zip(heads, heads[1:], strict=False))


def test_deciding_ends_before_the_last_blocks_and_where_nobody_reads_on():
    assert deciding_blocks(TINY, "every") == tuple(range(10))
    assert deciding_blocks(TINY, "every-early") == tuple(range(8))
    assert deciding_blocks(TINY, "alternate") == (0, 2, 4, 6, 8)
    assert deciding_blocks(TINY, "alternate-middle") == (2, 4, 6, 8)
    for depth in range(1, 13):
        for pooled in (False, True):
            anatomy = dataclasses.replace(TINY, depth=depth, reads_patches=pooled)
            for stages in STAGES:
                blocks = deciding_blocks(anatomy, stages)
                assert blocks or (depth == 1 and not pooled)
                assert all(block < depth - (not pooled) for block in blocks)


def test_sets_of_one_block_have_one_in_models_of_any_depth():
    for depth in range(2, 49):
        anatomy = dataclasses.replace(TINY, depth=depth)
        found = [deciding_blocks(anatomy, stages) for stages in ("once-first", "once-early", "once")]
        assert all(len(blocks) == 1 for blocks in found) and found == sorted(found)
    assert [deciding_blocks(TINY, stages) for stages in ("once-first", "once-early", "once")] == [(0,), (1,), (2,)]


def test_the_time_of_gates_is_part_of_the_time_of_deciding():
    plain, gated = family(), dataclasses.replace(family("gated"), heads="adaptive")
    assert plain.gating_time == 0 < gated.gating_time
    assert gated.deciding_time == pytest.approx(plain.deciding_time + gated.gating_time)


def test_of_equal_drift_the_family_that_decides_less_wins_and_heads_are_tried_on_the_best_blocks_alone():
    fewer = dataclasses.replace(family("fewer"), blocks=(0, 2, 4, 6))
    with_heads = [dataclasses.replace(f, heads="static", name=f.name + " and heads") for f in (family("more"), fewer)]
    seen = []

    def tune(f):
        seen.append(f.name)
        return world(100, 1)

    chosen = choose([fewer, with_heads[1], family("more"), with_heads[0]], Budget("macs", 0.6, 0.95), tune, lambda f: world(200, 0))
    assert chosen.family.blocks == (0, 2, 4, 6)
    assert "more and heads" not in seen


def rounds_of(number):
    pricing = Pricing("kl", 4.0, 3, 24, 0.35, number)
    return dataclasses.replace(family(f"{number} rounds"), blank=dataclasses.replace(family().blank, pricing=pricing))


def test_a_second_round_must_be_worth_its_time():
    two, one = rounds_of(2), rounds_of(1)
    assert two.deciding_time > one.deciding_time
    assert pick(Budget("macs", 0.6, 0.95), families=[two, one], drift={"2 rounds": 9.0, "1 rounds": 10.0}).family is one
    assert pick(Budget("macs", 0.6, 0.95), families=[two, one], drift={"2 rounds": 3.0, "1 rounds": 10.0}).family is two
    wide = dataclasses.replace(two.blank.model, anatomy=dataclasses.replace(TINY, width=768, heads=12))
    assert dataclasses.replace(two, blank=dataclasses.replace(two.blank, model=wide)).deciding_time == pytest.approx(two.deciding_time / 4)


def test_heads_are_tried_with_the_best_number_of_rounds_though_heads_did_better_with_another():
    families = [
        dataclasses.replace(rounds_of(number), heads=heads, name=f"{number} {heads}") for number in (2, 1) for heads in ("none", "static")
    ]
    drift = {"2 none": 100.0, "2 static": 40.0, "1 none": 90.0, "1 static": 30.0}
    assert pick(Budget("macs", 0.6, 0.95), families=families, drift=drift).family.name == "1 static"


def test_a_drop_decides_in_one_round_and_depth_dilutes_what_deciding_takes():
    two, drops = rounds_of(2), dataclasses.replace(rounds_of(2), combine="drop")
    assert drops.rounds == 1 and drops.deciding_time < two.deciding_time
    deep = dataclasses.replace(two.blank.model, anatomy=dataclasses.replace(TINY, depth=24))
    assert dataclasses.replace(two, blank=dataclasses.replace(two.blank, model=deep)).deciding_time == pytest.approx(two.deciding_time / 2)


def test_of_equal_risk_the_family_that_decides_less_wins():
    fewer = dataclasses.replace(family("fewer"), blocks=(0, 2, 4, 6))
    assert pick(Budget("loss", 0.05, 0.95), families=[family("more"), fewer]).family is fewer


def test_a_budget_out_of_reach_of_counts_in_steps_says_so():
    steps = dataclasses.replace(family(), multiple=16)
    with pytest.raises(OutOfReach, match=r"least that can be had is 0\.\d+ with counts in multiples of 16; smaller multiples keep less"):
        pick(Budget("macs", 0.01, 0.95), families=[steps])


def test_where_everything_that_can_go_may_go_milder_plans_are_still_proven():
    """Beyond some dial nothing more goes; on the images that place the dial that is within the budget, on those that prove it not."""

    def trial(harm, n):
        def measured(plan):
            share = min(plan.tokens[0].threshold / 1e-4, 1.0)
            macs = np.full(n, (1 - 0.7 * share**0.25) * DENSE)
            return outcome(np.full(n, harm * share), np.ones(n), macs)

        return measured

    chosen = choose([family()], Budget("loss", 0.02, 0.95), lambda f: trial(0.019, 50), lambda f: trial(0.04, 200))
    assert 0.01 < chosen.measured.drift_kl.mean < 0.02


@pytest.mark.parametrize(("sets", "taken"), [(5, 3), (1, 1)])
def test_no_more_than_three_sets_are_improved_and_none_where_nothing_can_be(sets, taken):
    families = [dataclasses.replace(family(str(first)), blocks=(first, 10)) for first in range(sets)]
    for obstacle, expected in ((None, taken), ("too few images", 1)):
        step = Improvement("refine", lambda f, why=obstacle: why, lambda f, dial: f, lambda f: world(100, 1))
        chosen = choose(families, Budget("macs", 0.6, 0.95), lambda f: world(100, 1), lambda f: world(400, 0), improvements=[step])
        assert len(chosen.contenders) == expected


def test_heads_that_adapt_must_be_worth_the_time_their_gates_take():
    gated = dataclasses.replace(family("gated"), heads="adaptive")
    assert gated.decisions == family().decisions + 12
    families, budget = [family("plain"), gated], Budget("macs", 0.6, 0.95)
    assert pick(budget, families=families, drift={"plain": 10.0, "gated": 8.0}).family.name == "plain"
    assert pick(budget, families=families, drift={"plain": 10.0, "gated": 1.0}).family.name == "gated"


class Population:
    """Images whose drift and disagreement at every dial are known, and random samples of them."""

    def __init__(self, size=4000):
        rng = np.random.default_rng(7)
        self.hard, self.luck, self.noise = rng.lognormal(0, 1, size), rng.random(size), rng.normal(0, 0.05, size)

    def outcome(self, dial, images):
        kl = self.hard[images] * dial * 100
        agree = (self.luck[images] >= np.minimum(0.9, kl / 2)).astype(float)
        kept = np.clip(1 / (1 + (dial / 1e-4) ** 0.25) + self.noise[images], 0.1, 1.0)
        return kl, agree, kept

    def trial(self, images):
        def measured(plan):
            kl, agree, kept = self.outcome(plan.dial, images)
            return outcome(kl, agree, kept * DENSE)

        return measured

    def risk(self, kind, dial):
        kl, agree, _ = self.outcome(dial, np.arange(len(self.hard)))
        return kl.mean() if kind == "loss" else 1 - agree.mean()


@pytest.mark.parametrize(
    ("kind", "value", "confidence"), [("disagreement", 0.05, 0.8), ("disagreement", 0.15, 0.95), ("loss", 0.05, 0.8), ("loss", 0.05, 0.95)]
)
def test_the_promise_is_broken_no_more_often_than_its_confidence_allows(kind, value, confidence):
    population, rng, splits = Population(), np.random.default_rng(0), 200
    broken = kept = 0
    for _ in range(splits):
        tune, verify = (population.trial(rng.integers(0, 4000, size)) for size in (128, 300))
        try:
            chosen = choose([family()], Budget(kind, value, confidence), lambda _, t=tune: t, lambda _, v=verify: v)
        except JobError:
            continue
        kept += 1
        broken += population.risk(kind, chosen.dial) > value
    allowed = (1 - confidence) * splits
    assert kept > 0.9 * splits
    assert broken <= allowed + 3 * math.sqrt(allowed * confidence)
    assert broken > 0 or confidence > 0.9  # a promise that is never near being broken would waste the budget
