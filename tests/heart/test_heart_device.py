"""A budget on a device that its staircase foretells wrongly: what is measured mends it, and what cannot be had is said."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hesper.errors import OutOfReach, UsageError
from hesper.heart.budget import Chosen, choose
from hesper.heart.device import CHECKS, Check, Machine, Met, correction, lesson, met
from hesper.heart.family import Family, deciding_blocks
from hesper.heart.fit import Atlas, Tables
from hesper.heart.placement import Trial
from hesper.heart.spending import Spending, spending_of
from hesper.measure.evaluate import Evaluation
from hesper.measure.stairs import Stairs
from hesper.plan import Anatomy, Budget, Plan, empty_plan

TINY = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
BLOCK = 1e-3  # seconds of a block with all tokens


def stairs(start: float = 0.0) -> Stairs:
    """Blocks whose time is proportional to their tokens, and ends that take ``start`` seconds."""
    counts = (1, 197)
    blocks = tuple(BLOCK * count / 197 for count in counts)
    nothing = (0.0, 0.0)
    return Stairs(1, False, counts, blocks, nothing, nothing, counts, {"1": nothing}, (1, 3), (BLOCK / 3, BLOCK), start, 12 * BLOCK + start)


def family() -> Family:
    atlas = Atlas(torch.zeros(12, 196), torch.arange(36.0).view(12, 3), torch.zeros(12, 3), 8)
    blank = empty_plan("tiny", TINY)
    blank = dataclasses.replace(blank, provenance=dataclasses.replace(blank.provenance, verify_images=300))
    return Family("plain", blank, deciding_blocks(TINY, "third-middle"), "merge", "none", atlas, Tables({}, ()))


def world(images: int, seed: int) -> Trial:
    """Tokens left after the fourth block fall with the logarithm of the dial, drift rises with it; images differ."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 0.05, images)

    def trial(plan: Plan) -> Evaluation:
        share = np.clip(1 / (1 + ((plan.dial or 0.0) / 1e-4) ** 0.3) + ease, 0.02, 1.0)
        fed = np.tile(197, (images, 12))
        fed[:, 3:] = np.round(197 * share)[:, None]
        kl = np.full(images, 1000 * (plan.dial or 0.0))
        return Evaluation(kl, np.ones(images), share, fed, np.full((images, 12), 3), 1, None, None, None, None, None, 0.0)

    return trial


def placed(budget: Budget, spending: Spending, start: float | None = None) -> Chosen:
    return choose([family()], budget, lambda _: world(128, 1), lambda _: world(300, 2), spending=spending, start=start)


def run(budget: Budget, wrong: float, noise: float = 0.0, start: float = 0.0) -> tuple[Met, Spending]:
    """``met`` on a device that takes ``wrong`` times what is foretold, and more or less by ``noise``."""
    spending, rng = spending_of(budget, stairs(start)), np.random.default_rng(0)

    def check(chosen: Chosen) -> Check:
        evaluation = world(64, 3)(chosen.plan)
        share = wrong * spending.of(chosen.plan, evaluation).mean * math.exp(noise * rng.standard_normal())
        return Check(share, 0.95 * share, 1.05 * share, 5, evaluation, ("the processor was hot",))

    machine = Machine("A78", 4, stairs(start))
    found = met(placed(budget, spending), spending, machine, check, lambda chosen, own: placed(budget, own, chosen.dial))
    return found, spending


def truth(found: Met, spending: Spending, wrong: float) -> float:
    """The share that the plan takes on very many images."""
    plan = found.chosen.plan
    return wrong * spending.of(plan, world(4000, 9)(plan)).mean


@pytest.mark.parametrize("wrong", [0.85, 1.0, 1.2])
def test_a_staircase_that_is_wrong_is_corrected_by_what_is_measured(wrong: float) -> None:
    found, spending = run(Budget("latency", 0.7, 0.95), wrong)
    checks, statement = found.checks, found.chosen.measured.statement
    assert truth(found, spending, wrong) == pytest.approx(0.7, rel=0.02) and found.warnings == ("the processor was hot",)
    assert len(checks) == (1 if wrong == 1.0 else 2) and checks[0].measured / checks[0].foretold == pytest.approx(wrong)
    assert checks[-1].expected == pytest.approx(checks[-1].measured) and checks[-1].unit == "of the dense model's time"
    assert statement.startswith(f"Takes {checks[-1].measured:.4g} of the dense model's time for one image")


def test_what_was_learned_before_counts_and_is_told() -> None:
    """A plan placed by what another one taught needs no second look; once it was run itself, that other one no longer counts."""
    budget, machine = Budget("latency", 0.7, 0.95), Machine("A78", 4, stairs())
    spending = spending_of(budget, stairs())

    def check(own: Chosen, wrong: float = 1.2) -> Check:
        evaluation = world(64, 3)(own.plan)
        share = wrong * spending.of(own.plan, evaluation).mean
        return Check(share, share, share, 5, evaluation, ("hot",))

    first = placed(budget, spending)
    learned = lesson(first.plan, spending, machine, check(first))
    assert correction([learned]) == pytest.approx(1.2) and learned.account.expected == learned.account.foretold
    known = spending.corrected(correction([learned]))
    found = met(placed(budget, known), spending, machine, check, lambda own, again: placed(budget, again, own.dial), [learned])
    assert len(found.checks) == 2 and found.checks[0] == learned.account and found.warnings == ("hot",)
    assert found.checks[1].expected == pytest.approx(found.checks[1].measured) == pytest.approx(0.7, rel=0.02)
    wrong = dataclasses.replace(learned, error=math.log(1.0))
    twice = met(first, spending, machine, check, lambda own, again: placed(budget, again, own.dial), [wrong])
    assert [round(each.expected / each.foretold, 6) for each in twice.checks] == [1.0, 1.0, 1.2]
    assert twice.checks[-1].measured == pytest.approx(0.7, rel=0.02)
    other = lesson(first.plan, spending, machine, check(first, 1.2 * 1.1**2))
    assert correction([learned, other]) == pytest.approx(1.2 * 1.1) and correction([]) == 1.0


def test_checks_that_scatter_are_averaged_and_come_to_an_end() -> None:
    found, spending = run(Budget("latency", 0.6, 0.95), 1.1, noise=0.03)
    assert len(found.checks) <= CHECKS and truth(found, spending, 1.1) == pytest.approx(0.6, rel=0.05)


def test_a_plan_that_lies_below_its_budget_for_other_reasons_is_not_checked_again() -> None:
    """Few images that differ much prove the budget only well below it; no check can teach that away."""
    spending = spending_of(Budget("latency", 0.7, 0.95), stairs())
    chosen = placed(Budget("latency", 0.6, 0.95), spending_of(Budget("latency", 0.6, 0.95), stairs()))

    def check(chosen: Chosen) -> Check:
        evaluation = world(64, 3)(chosen.plan)
        share = 1.01 * spending.of(chosen.plan, evaluation).mean
        return Check(share, share, share, 5, evaluation)

    def again(_: Chosen, __: Spending) -> Chosen:
        raise AssertionError("it was placed again")

    assert len(met(chosen, spending, Machine("A78", 4, stairs()), check, again).checks) == 1
    # Nor where placing it again gives the same cuts.
    wrong = met(chosen, spending, Machine("A78", 4, stairs()), lambda c: dataclasses.replace(check(c), share=0.2), lambda c, _: c)
    assert len(wrong.checks) == 1 and wrong.chosen.plan == chosen.plan


def test_milliseconds_are_those_of_the_device() -> None:
    dense = 1000 * (12 * BLOCK + 0.003)
    found, spending = run(Budget("latency_ms", 0.6 * dense, 0.95), 1.1, start=0.003)
    taken, last = dense * truth(found, spending, 1.1), found.checks[-1]
    assert spending.limit == pytest.approx(0.6) and taken == pytest.approx(0.6 * dense, rel=0.02)
    assert last.unit == "ms" and last.measured == pytest.approx(taken, rel=0.02)
    assert " ms for one image" in found.chosen.measured.statement


def test_milliseconds_that_the_dense_model_keeps_are_no_budget() -> None:
    with pytest.raises(UsageError, match="The dense model takes 12 ms here already, so 12 ms is no budget; give less"):
        spending_of(Budget("latency_ms", 12.0, 0.95), stairs())


def test_a_plan_above_its_budget_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.heart.device.CHECKS", 1)
    found, _ = run(Budget("energy", 0.7, 0.95), 1.2)
    statement = found.chosen.measured.statement
    assert statement.startswith("Above the budget of 0.7: takes 0.8") and "of the dense model's energy" in statement
    assert "expected to take 1" in found.warnings[-1] and found.warnings[-1].endswith("% more than was asked for; ask for less")


def test_what_no_plan_takes_is_out_of_reach() -> None:
    with pytest.raises(OutOfReach, match=r"No plan takes 0.2 of the dense model's time here; the least that can be had is 0\.3\d+"):
        run(Budget("latency", 0.2, 0.95), 1.0)
    with pytest.raises(OutOfReach, match=r"No plan takes 1 ms here, where the dense model takes 12 ms; .* had is 4\.\d+ ms"):
        run(Budget("latency_ms", 1.0, 0.95), 1.0)
    with pytest.raises(OutOfReach, match=r"energy here"):  # in reach of what is foretold, and not of what is measured
        run(Budget("energy", 0.4, 0.95), 1.6)


def test_a_budget_of_macs_heeds_no_staircase() -> None:
    plan = dataclasses.replace(empty_plan("tiny", TINY), dial=1e-4)
    evaluation = world(64, 3)(plan)
    assert np.array_equal(spending_of(Budget("macs", 0.7, 0.95), stairs()).shares(plan, evaluation), evaluation.macs)
