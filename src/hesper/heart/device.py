"""A budget on a device: what its staircase foretells is measured on whole models, and the plan placed again with what that taught."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hesper.graft import GraftedViT
from hesper.heart.budget import Chosen
from hesper.heart.spending import Spending
from hesper.measure.evaluate import Evaluation
from hesper.measure.stairs import Stairs
from hesper.plan import OnDevice, Plan

__all__ = ["Check", "Device", "Lesson", "Machine", "Met", "correction", "lesson", "met"]

CHECKS = 4
NEAR = 0.015  # of the limit: as far as what is expected of a plan may lie from it


@dataclass(frozen=True, eq=False)
class Check:
    """What a plan was measured to take on the device.

    ``share`` is of the dense model's time or energy (or of the time that its staircase says the dense model takes, where the budget is in
    milliseconds), with its 95 % interval from ``low`` to ``high`` over ``processes``; ``evaluation`` is of the images that were timed, and
    ``warnings`` say what makes it doubtful.
    """

    share: float
    low: float
    high: float
    processes: int
    evaluation: Evaluation
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Met:
    """A plan that was measured on its device, what every check on the way found, the last being its own, and what makes it doubtful."""

    chosen: Chosen
    checks: tuple[OnDevice, ...]
    warnings: tuple[str, ...]


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
            Interrupted: it did not run, or its energy could not be read; the job may go on from here.
        """


@dataclass(frozen=True, eq=False)
class Lesson:
    """What running a plan on the device taught of its staircase.

    ``error`` is the logarithm of what was measured by what was foretold, ``account`` says both, and ``warnings`` what makes it doubtful.
    """

    error: float
    account: OnDevice
    warnings: tuple[str, ...] = ()


def lesson(plan: Plan, spending: Spending, machine: Machine, checked: Check, learned: Sequence[Lesson] = ()) -> Lesson:
    """From a check of a plan, after what was ``learned`` before; ``spending`` has no correction."""
    foretold = spending.of(plan, checked.evaluation).mean
    account = _account(spending, machine, checked, foretold, foretold * correction(learned))
    return Lesson(math.log(checked.share / foretold), account, checked.warnings)


def correction(lessons: Sequence[Lesson]) -> float:
    """By what to multiply what a staircase foretells: the geometric mean of all lessons, 1 where there are none."""
    return math.exp(math.fsum(each.error for each in lessons) / len(lessons)) if lessons else 1.0


def met(
    chosen: Chosen,
    spending: Spending,
    machine: Machine,
    check: Callable[[Chosen], Check],
    again: Callable[[Chosen, Spending], Chosen],
    learned: Sequence[Lesson] = (),
) -> Met:
    """The plan placed where the device takes what the budget allows.

    The staircase does not know everything: how ragged batches lie, what caches hold between pieces. A check says by how much it is wrong
    for such plans, and the geometric mean over all checks so far corrects it, until what is expected of the plan lies within
    :data:`NEAR` of the limit or a check teaches nothing new, :data:`CHECKS` times at most. What another plan taught before counts until
    then: its sets of blocks may be foretold otherwise.

    Args:
        chosen: a plan placed by what ``spending`` foretells, corrected by what was ``learned``.
        spending: what the budget limits, without a correction.
        machine: what the budget is about.
        check: runs a plan on it.
        again: places the plan's family again under another spending.
        learned: of plans that were run before.

    Raises:
        JobError: nothing of the family keeps the budget once it is corrected.
    """
    lessons = list[Lesson]()
    corrected = spending.corrected(correction(learned))
    while True:
        lessons.append(lesson(chosen.plan, spending, machine, check(chosen), lessons or learned))
        before, corrected = corrected, spending.corrected(correction(lessons))
        off = corrected.of(chosen.plan, chosen.evaluation).mean / spending.limit - 1
        # Where counts fall in steps, or few images prove the plan, it lies further below the limit, and placing it again changes nothing.
        taught_nothing = abs(corrected.correction / before.correction - 1) <= NEAR
        if abs(off) <= NEAR or taught_nothing or len(lessons) == CHECKS:
            break
        last, chosen = chosen, again(chosen, corrected)
        if _cuts(last) == _cuts(chosen):
            break
    every = (*learned, *lessons)
    warnings = list(dict.fromkeys(warning for each in every for warning in each.warnings))
    if off > NEAR:
        warnings.append(f"the plan is expected to take {100 * off:.0f} % more than was asked for; ask for less")
    found = tuple(each.account for each in every)
    statement = _statement(found[-1], f"Above the budget of {spending.budget.value:g}: takes" if off > NEAR else "Takes")
    return Met(replace(chosen, measured=replace(chosen.measured, statement=statement)), found, tuple(warnings))


def _cuts(chosen: Chosen) -> object:
    return chosen.plan.tokens, chosen.plan.heads, chosen.plan.gates


def _account(spending: Spending, machine: Machine, checked: Check, foretold: float, expected: float) -> OnDevice:
    kind, stairs = spending.budget.kind, machine.stairs
    unit = {"latency": "of the dense model's time", "latency_ms": "ms", "energy": "of the dense model's energy"}[kind]
    scale = 1000 * stairs.dense if kind == "latency_ms" else 1.0
    foretold, expected, measured, low, high = (scale * value for value in (foretold, expected, checked.share, checked.low, checked.high))
    words = (machine.words, stairs.batch_size, machine.threads, unit)
    return OnDevice(*words, foretold, expected, measured, low, high, checked.processes)


def _statement(taken: OnDevice, takes: str) -> str:
    images = "for one image" if taken.batch_size == 1 else f"for {taken.batch_size} images"
    processes = "1 process" if taken.processes == 1 else f"{taken.processes} processes"
    return (
        f"{takes} {taken.measured:.4g} {taken.unit} {images} (95 % interval {taken.low:.4g} to {taken.high:.4g} over {processes}, "
        f"{taken.expected:.4g} expected beforehand) on {taken.device}, {taken.threads} threads."
    )
