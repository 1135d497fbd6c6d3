"""A budget on a device: what its staircase foretells is measured on whole models, and the plan placed again with what that taught."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from hesper.graft import GraftedViT
from hesper.heart.budget import Chosen
from hesper.heart.spending import Spending
from hesper.measure.evaluate import Evaluation
from hesper.measure.stairs import Stairs
from hesper.plan import OnDevice

__all__ = ["Check", "Device", "Machine", "met"]

CHECKS = 4
NEAR = 0.015  # of the limit: as far as what is expected of a plan may lie from it


@dataclass(frozen=True, eq=False)
class Check:
    """What a plan was measured to take on the device.

    ``share`` is of the dense model's time or energy (or of the time that its staircase says the dense model takes, where the budget is in
    milliseconds), with its 95 % interval from ``low`` to ``high`` over ``processes``; ``evaluation`` is of the images that were timed.
    """

    share: float
    low: float
    high: float
    processes: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Machine:
    """A device in words, how many threads of its processor are used, and how long the model's pieces take on it."""

    words: str
    threads: int
    stairs: Stairs


class Device(Protocol):
    """A device that plans are made for, in batches of one size."""

    @property
    def machine(self) -> Machine:
        """What is known of it."""

    def check(self, model: GraftedViT) -> Check:
        """Run a cut model on it beside the dense one.

        Raises:
            JobError: it did not run, or its energy could not be read.
        """


def met(
    chosen: Chosen,
    spending: Spending,
    machine: Machine,
    check: Callable[[Chosen], Check],
    again: Callable[[Chosen, Spending], Chosen],
) -> tuple[Chosen, tuple[OnDevice, ...]]:
    """The plan placed where the device takes what the budget allows, and what every check on the way found.

    The staircase does not know everything: how ragged batches lie, what caches hold between pieces. A check says by how much it is wrong
    for such plans, and the geometric mean over all checks so far corrects it, until what is expected of the plan lies within
    :data:`NEAR` of the limit.

    Args:
        chosen: a plan placed by what ``spending`` foretells without a correction.
        spending: what the budget limits.
        machine: what the budget is about.
        check: runs a plan on it.
        again: places the plan's family again under another spending.

    Raises:
        JobError: nothing of the family keeps the budget once it is corrected.
    """
    errors, found = list[float](), list[OnDevice]()
    corrected = spending
    while True:
        checked = check(chosen)
        foretold = spending.of(chosen.plan, checked.evaluation).mean
        expected = corrected.of(chosen.plan, checked.evaluation).mean
        errors.append(math.log(checked.share / foretold))
        found.append(_account(spending, machine, checked, foretold, expected))
        corrected = spending.corrected(math.exp(math.fsum(errors) / len(errors)))
        off = corrected.of(chosen.plan, chosen.evaluation).mean / spending.limit - 1
        if abs(off) <= NEAR or len(found) == CHECKS:
            break
        chosen = again(chosen, corrected)
    taken = found[-1]
    statement = _statement(taken, "" if off <= NEAR else f", above the {spending.budget.value:g} asked for")
    return replace(chosen, measured=replace(chosen.measured, statement=statement)), tuple(found)


def _account(spending: Spending, machine: Machine, checked: Check, foretold: float, expected: float) -> OnDevice:
    kind, stairs = spending.budget.kind, machine.stairs
    unit = {"latency": "of the dense model's time", "latency_ms": "ms", "energy": "of the dense model's energy"}[kind]
    scale = 1000 * stairs.dense if kind == "latency_ms" else 1.0
    foretold, expected, measured, low, high = (scale * value for value in (foretold, expected, checked.share, checked.low, checked.high))
    words = (machine.words, stairs.batch_size, machine.threads, unit)
    return OnDevice(*words, foretold, expected, measured, low, high, checked.processes)


def _statement(taken: OnDevice, verdict: str) -> str:
    images = "for one image" if taken.batch_size == 1 else f"for {taken.batch_size} images"
    processes = "1 process" if taken.processes == 1 else f"{taken.processes} processes"
    return (
        f"Takes {taken.measured:.4g} {taken.unit} {images} (95 % interval {taken.low:.4g} to {taken.high:.4g} over {processes}, "
        f"{taken.expected:.4g} expected beforehand) on {taken.device}, {taken.threads} threads{verdict}."
    )
