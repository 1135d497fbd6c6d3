from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given

from hesper.plan import HeadCut, OperatingPoint, Plan, TokenCut, plan_hash, render
from strategies import EXAMPLE_ANATOMY as ANATOMY
from strategies import EXAMPLE_PLAN as PLAN
from strategies import plans


def fits(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 40 and all(len(line) <= 80 for line in lines) and text.replace("\n", "").isprintable()


@given(plans())
def test_any_plan_fits_one_screen(plan: Plan) -> None:
    assert fits(render(plan))


def test_the_screen_says_what_was_asked_measured_and_cut() -> None:
    text = render(PLAN)
    assert plan_hash(PLAN)[:12] in text and "vit_tiny_patch16_224" in text
    assert "at most 0.05 nats of loss, confidence 0.95, asymmetric schedule" in text
    assert "drift KL   0.03 +- 0.002 nats (n = 300)" in text
    assert "KL <= 0.05 with 95 % confidence" in text
    lines = text.splitlines()
    assert any(line.split() == ["2", "-", "2", "of", "3:", "0,", "2"] for line in lines)
    assert any(line.split() == ["4", "-", "if", "<=", "0.0002", "nats"] for line in lines)
    assert any(line.split() == ["5", "-", "1", "of", "3,", "if", "<=", "0.0002"] for line in lines)
    assert any(line.split()[:6] == ["3", "merge", "if", "<", "0.001", "nats"] for line in lines)
    assert any(line.split()[:3] == ["6", "drop", "20"] for line in lines)


def test_what_was_not_measured_is_said() -> None:
    assert "nothing yet" in render(dataclasses.replace(PLAN, measured=None))


def test_what_was_tried_and_declined_is_said() -> None:
    assert PLAN.pricing is not None
    plan = dataclasses.replace(PLAN, pricing=dataclasses.replace(PLAN.pricing, refit=False, refine=3))
    why = "drifts more than it did before, which is why what was fitted again and measured is not in the plan"
    text = render(plan, {"refit": why, "refine": "never shown"})
    assert "refitted  no: drifts more" in text and "in 3 epochs" in text and "never shown" not in text
    assert "measured is not in the plan" in text and max(map(len, text.splitlines())) <= 80


def test_bars_are_relative_to_the_largest_cut_of_their_kind() -> None:
    cuts = (TokenCut(0, "merge", threshold=0.1), TokenCut(1, "merge", threshold=0.2), TokenCut(2, "drop", remove=8))
    bars = [line.count("#") for line in render(dataclasses.replace(PLAN, tokens=cuts)).splitlines()[-13:-10]]
    assert bars == [10, 20, 20]


def test_a_deep_model_still_fits_with_equal_blocks_joined() -> None:
    model = dataclasses.replace(PLAN.model, anatomy=dataclasses.replace(ANATOMY, depth=48, heads=24))
    every = tuple(TokenCut(block, "merge", threshold=0.001) for block in range(48))
    joined = render(dataclasses.replace(PLAN, model=model, tokens=every, heads=(), gates=(), skip_unread=False))
    assert fits(joined) and "0-47" in joined
    uneven = tuple(HeadCut(block, tuple(range(1, 2 + block % 20))) for block in range(48))
    elided = render(dataclasses.replace(PLAN, model=model, tokens=every, heads=uneven))
    assert fits(elided) and "more lines, see plan.toml" in elided


@pytest.mark.parametrize("own", [0, 3, 11])
def test_the_ends_of_the_verified_range_and_the_runs_own_point_are_shown(own: int) -> None:
    points = tuple(OperatingPoint((place + 1) / 1000, 1 - place / 20, place / 100, 0.9, 300, True) for place in range(12))
    lines = render(dataclasses.replace(PLAN, points=points, dial=points[own].dial)).splitlines()
    shown = [line for line in lines if "nats: MACs" in line]
    assert "0.001 nats" in shown[0] and "0.012 nats" in shown[-1] and 3 <= len(shown) <= 5
    (marked,) = [line for line in shown if line.startswith("this run")]
    assert f"{points[own].dial:.3g} nats" in marked


@pytest.mark.parametrize(("rounds", "said"), [(1, "1 round\n"), (2, "2 rounds\n")])
def test_rounds_are_counted_in_words_that_agree(rounds: int, said: str) -> None:
    assert PLAN.pricing is not None
    pricing = dataclasses.replace(PLAN.pricing, rounds=rounds)
    assert f", {said}" in render(dataclasses.replace(PLAN, pricing=pricing))
