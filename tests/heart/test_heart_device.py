"""A budget on a device that its staircase foretells wrongly: what is measured mends it, and what cannot be had is said."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hesper.errors import OutOfReach
from hesper.heart.budget import Chosen, choose
from hesper.heart.device import CHECKS, Check, Machine, met
from hesper.heart.family import Family, deciding_blocks
from hesper.heart.fit import Atlas, Tables
from hesper.heart.placement import Trial
from hesper.heart.spending import Spending, spending_of
from hesper.measure.evaluate import Evaluation
from hesper.measure.stairs import Stairs
from hesper.plan import Anatomy, Budget, OnDevice, Plan, empty_plan

TINY = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
BLOCK = 1e-3  # seconds of a block with all tokens


def stairs(start: float = 0.0) -> Stairs:
    """Blocks whose time is proportional to their tokens, and ends that take ``start`` seconds."""
    counts = (1, 197)
    blocks = tuple(BLOCK * count / 197 for count in counts)
    nothing = (0.0, 0.0)
    return Stairs(
        1, 1, False, counts, blocks, nothing, nothing, counts, {"1": nothing}, (1, 3), (BLOCK / 3, BLOCK), start, 12 * BLOCK + start
    )


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


def run(budget: Budget, wrong: float, noise: float = 0.0, start: float = 0.0) -> tuple[Chosen, tuple[OnDevice, ...], Spending]:
    """``met`` on a device that takes ``wrong`` times what is foretold, and more or less by ``noise``."""
    spending, rng = spending_of(budget, stairs(start)), np.random.default_rng(0)

    def check(chosen: Chosen) -> Check:
        evaluation = world(64, 3)(chosen.plan)
        share = wrong * spending.of(chosen.plan, evaluation).mean * math.exp(noise * rng.standard_normal())
        return Check(share, 0.95 * share, 1.05 * share, 5, evaluation)

    machine = Machine("A78", 4, stairs(start))
    chosen, checks = met(placed(budget, spending), spending, machine, check, lambda chosen, own: placed(budget, own, chosen.dial))
    return chosen, checks, spending


@pytest.mark.parametrize("wrong", [0.85, 1.0, 1.2])
def test_a_staircase_that_is_wrong_is_corrected_by_what_is_measured(wrong: float) -> None:
    chosen, checks, spending = run(Budget("latency", 0.7, 0.95), wrong)
    truth = wrong * spending.of(chosen.plan, world(4000, 9)(chosen.plan)).mean
    assert truth == pytest.approx(0.7, rel=0.02)
    assert len(checks) == (1 if wrong == 1.0 else 2) and checks[0].measured / checks[0].foretold == pytest.approx(wrong)
    assert checks[-1].expected == pytest.approx(checks[-1].measured) and checks[-1].unit == "of the dense model's time"
    assert f"Takes {checks[-1].measured:.4g} of the dense model's time for one image" in chosen.measured.statement
    assert "above" not in chosen.measured.statement


def test_checks_that_scatter_are_averaged_and_come_to_an_end() -> None:
    chosen, checks, spending = run(Budget("latency", 0.6, 0.95), 1.1, noise=0.03)
    truth = 1.1 * spending.of(chosen.plan, world(4000, 9)(chosen.plan)).mean
    assert len(checks) <= CHECKS and truth == pytest.approx(0.6, rel=0.05)


def test_milliseconds_are_those_of_the_device() -> None:
    dense = 1000 * (12 * BLOCK + 0.003)
    chosen, checks, spending = run(Budget("latency_ms", 0.6 * dense, 0.95), 1.1, start=0.003)
    assert spending.limit == pytest.approx(0.6)
    truth = 1.1 * dense * spending.of(chosen.plan, world(4000, 9)(chosen.plan)).mean
    assert truth == pytest.approx(0.6 * dense, rel=0.02)
    assert checks[-1].unit == "ms" and checks[-1].measured == pytest.approx(truth, rel=0.02)
    assert " ms for one image" in chosen.measured.statement


def test_a_plan_above_its_budget_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.heart.device.CHECKS", 1)
    chosen, _, _ = run(Budget("energy", 0.7, 0.95), 1.2)
    assert "of the dense model's energy" in chosen.measured.statement and ", above the 0.7 asked for." in chosen.measured.statement


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
