"""The dial at run time: the same model at another price, with a word where nobody has measured it."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from hesper.errors import UsageError
from hesper.graft import GraftedViT, graft
from hesper.plan import OperatingPoint, Plan, at_dial, empty_plan, validate
from vits import cuts_of, pictures, plan_for, tables, vit

MODEL = vit()
POINTS = (
    OperatingPoint(1.0, 0.99, 0.0, 1.0, 50, False),
    OperatingPoint(8.0, 0.95, 0.01, 0.99, 60, True),
    OperatingPoint(128.0, 0.5, 0.3, 0.8, 60, True),
)


def turnable(dial: float = 32.0) -> Plan:
    """A plan whose second block cuts at twice the price of its first."""
    first, second = cuts_of("merge", [0, 1], threshold=dial)
    cuts = [first, dataclasses.replace(second, threshold=2 * dial)]
    return dataclasses.replace(plan_for(MODEL, cuts), dial=dial, points=POINTS)


def grafted(plan: Plan) -> GraftedViT:
    return graft(MODEL, plan, tables(MODEL))


@torch.no_grad()
def test_turning_the_dial_is_grafting_the_plan_of_that_dial() -> None:
    images, cut = pictures(5), grafted(turnable())
    spent = []
    for dial in (8.0, 100.0, 32.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cut.set_dial(dial)
        expected = grafted(turnable(dial)).run(images)
        outcome = cut.run(images)
        assert torch.equal(outcome.logits, expected.logits) and (outcome.macs == expected.macs).all()
        spent.append(int(outcome.macs.sum()))
    assert spent[1] < spent[2] < spent[0]


@torch.no_grad()
def test_a_dial_of_zero_keeps_every_token() -> None:
    cut = grafted(turnable())
    with pytest.warns(UserWarning, match="verified from 8"):
        cut.set_dial(0.0)
    assert (cut.run(pictures(3)).traffic.fed == 13).all()
    validate(at_dial(turnable(), 0.0))


@pytest.mark.parametrize("dial", [5.0, 130.0])
def test_outside_the_verified_range_the_dial_warns_and_says_the_range(dial: float) -> None:
    with pytest.warns(UserWarning, match=rf"from 8 \(0.95 of the MACs\) to 128 \(0.50\); at {dial:g} nothing is known"):
        grafted(turnable()).set_dial(dial)


def test_what_was_measured_elsewhere_on_the_dial_is_left_out() -> None:
    moved = at_dial(turnable(), 1.0)
    assert moved.dial == 1.0 and moved.measured is None and [cut.threshold for cut in moved.tokens] == [1.0, 2.0]


@pytest.mark.parametrize("dial", [-1.0, float("nan"), float("inf")])
def test_what_is_no_price_is_refused(dial: float) -> None:
    with pytest.raises(UsageError, match="a price in nats, 0 or more"):
        grafted(turnable()).set_dial(dial)


@pytest.mark.parametrize("plan", [plan_for(MODEL, cuts_of("merge", [0], remove=2)), empty_plan("tiny", turnable().model.anatomy)])
def test_a_plan_without_a_dial_cannot_be_turned(plan: Plan) -> None:
    with pytest.raises(UsageError, match="it has no dial; make a run with adaptive counts"):
        grafted(plan).set_dial(0.1)
