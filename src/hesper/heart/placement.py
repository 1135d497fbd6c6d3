"""Where on its dial a family meets a budget, as the images that fitted it have it, and which families are worth improving."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hesper.errors import OutOfReach
from hesper.heart.family import Family
from hesper.heart.spending import Spending
from hesper.measure.evaluate import Evaluation
from hesper.plan import Budget, Estimate, OperatingPoint, Plan

Trial = Callable[[Plan], Evaluation]

SMALLEST_DIAL, FIRST_DIAL, LARGEST_DIAL = 1e-9, 1e-5, 1e3
MOST_TRIALS = 24
CLOSE, FLAT, NARROW = 0.003, 1e-4, 1.01
STEPS = 11
ALIKE = 1e-9  # spread of what is spent below which all images cost the same: fixed counts, or heads alone
DRIFT_RATE = 12.0  # drift grows as exp(-12 MACs) where half to two thirds of them are kept (11 to 15 on two ViTs)
IMPERCEPTIBLE = 0.0003  # nats of drift that no decision is worth
# Powers of two around the dial that met the budget on fitting images: fixed beforehand, finer where the answer is likely.
LADDER = (-5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
SIGMAS = (5.0, 4.0, 3.2, 2.6, 2.1, 1.7, 1.3, 0.9)
SLOPE_REACH = (0.03, 0.1)  # of what is spent: points this near say how fast it falls
SAFE = (2.0, 0.7)  # steps in the dial's logarithm from which spending is on the safe side whatever its slope was taken for
# What is learned later lowers the drift of some sets of blocks by a quarter and of others not at all, so several are improved.
FINALISTS, BEHIND = 3, 0.03


@dataclass(frozen=True, eq=False)
class Placed:
    """A family with the dial that met the budget on the fitting images, dials to prove it at, and what was measured on the way.

    ``cost`` orders families of one budget: the share of the dense model's time that MACs and deciding take; with a budget of MACs or on a
    device, where drifts differ, less what a lower drift could save of it.
    """

    family: Family
    dial: float
    dials: list[float]
    points: list[OperatingPoint]
    cost: float


@dataclass(frozen=True, eq=False)
class _Try:
    """A member of a family that was tried: its dial, how it did, and the share it spends on average."""

    dial: float
    plan: Plan
    evaluation: Evaluation
    spent: float


def place(
    families: Sequence[Family],
    budget: Budget,
    spending: Spending,
    tune: Callable[[Family], Trial],
    compare: Callable[[Family], Trial] | None = None,
    start: float | None = None,
) -> list[Placed]:
    """Families that meet the budget on the fitting images, the best first.

    ``tune`` measures on the images that place the dial, ``compare`` on more of them how far a family drifts at a budget that ``spending``
    limits. The search begins at ``start``, a dial.

    Raises:
        OutOfReach: no family spends so little; says what can be had.
    """
    families = sorted(families, key=lambda family: family.heads != "none")  # cutting heads too is tried on the best of the others
    placed = _place_spent(families, spending, tune, compare, start) if spending.limits else _place_risk(families, budget, tune)
    return sorted(placed, key=lambda each: each.cost)


def finalists(placed: Sequence[Placed]) -> list[Placed]:
    """Of families in order the best of every set of blocks, as far as they are little behind the first."""
    best: dict[tuple[int, ...], Placed] = {}
    for each in placed:
        if each.cost <= placed[0].cost + BEHIND:
            best.setdefault(each.family.blocks, each)
    return list(best.values())[:FINALISTS]


def _place_spent(
    families: Sequence[Family],
    spending: Spending,
    tune: Callable[[Family], Trial],
    compare: Callable[[Family], Trial] | None,
    dial: float | None,
) -> list[Placed]:
    """Each family at the dial that just spends its limit, and dials that spend a little more and more.

    The search for a family's dial begins at that of the family before, or at ``dial``. Deciding takes time that MACs do not show, so a
    family that decides more often, or in more rounds, must drift less.
    """
    least, found = math.inf, list[Placed]()
    for family in families:
        if found and _refines_nothing(family, _whole(found)):
            continue
        best, tried = _dial_for(family, tune(family), spending, start=dial or FIRST_DIAL)
        least = min(least, *(each.spent for each in tried))
        if best is not None:
            dial = best.dial
            evaluation = best.evaluation if compare is None else compare(family)(best.plan)
            spent, drift = spending.of(best.plan, evaluation), float(evaluation.drift_kl.mean()) + IMPERCEPTIBLE * family.decisions
            deciding = family.gating_time if spending.knows_deciding else family.deciding_time
            cost = spent.mean + deciding + math.log(max(drift, 1e-12)) / DRIFT_RATE
            points = [point(each.dial, each.evaluation) for each in tried]
            found.append(Placed(family, dial, _dials(family, dial, spent, tried, spending.limit), points, cost))
    if not found:
        steps = max(family.multiple for family in families)
        hint = f" with counts in multiples of {steps}; smaller multiples keep less" if steps > 1 else ""
        raise OutOfReach(spending.out_of_reach(least) + f"{hint}.")
    return found


def _dials(family: Family, dial: float, spent: Estimate, tried: Sequence[_Try], limit: float) -> list[float]:
    """Dials between five and one standard errors below the limit, as the fitting images foretell them for the two samples' difference."""
    # Two samples of images differ: the tuned mean has its error, and so will the verified one.
    error = spent.stderr * math.sqrt(1 + spent.n / family.blank.provenance.verify_images)
    if error < ALIKE:
        return [dial]
    slope, short = _slope(tried, spent.mean), spent.mean - limit
    steps = [max(-SAFE[0], min((sigmas * error + short) / slope, SAFE[0])) for sigmas in SIGMAS]
    # Where spending falls in steps, or few images say how fast, the slope deceives, and a first dial that fails would refuse the budget.
    steps = [safe for safe in SAFE if safe > steps[0]] + steps
    return [dial * math.exp(step) for step in steps]


def _slope(tried: Sequence[_Try], near: float) -> float:
    """How fast a family's spending falls with the logarithm of the dial around ``near``; a cautious guess where too little was measured."""
    for reach in SLOPE_REACH:
        close = {(math.log(each.dial), each.spent) for each in tried if abs(each.spent - near) < reach}
        if len({x for x, _ in close}) >= 2:
            break
    else:
        return 0.1
    mean_x, mean_y = (sum(values) / len(close) for values in zip(*close, strict=True))
    variance = sum((x - mean_x) ** 2 for x, _ in close)
    slope = -sum((x - mean_x) * (y - mean_y) for x, y in close) / variance
    return float(max(slope, 0.01))


def _dial_for(family: Family, trial: Trial, spending: Spending, start: float = FIRST_DIAL) -> tuple[_Try | None, list[_Try]]:
    """The dial whose mean spending lies just below the limit, None where no dial reaches it; and all that was tried.

    Spending falls with the dial, nearly linearly in its logarithm: false position between a dial that spends too much and one that
    spends too little, after walking out from ``start`` by factors of four until there is one of each.
    """
    target = spending.limit
    tried: list[_Try] = []
    mild: _Try | None = None
    best: _Try | None = None
    dial = start
    while len(tried) < MOST_TRIALS:
        plan = family.at(dial)
        evaluation = trial(plan)
        now = _Try(dial, plan, evaluation, spending.of(plan, evaluation).mean)
        tried.append(now)
        if now.spent > target:
            if dial >= LARGEST_DIAL:
                break
            flat = mild is not None and best is None and mild.spent - now.spent < FLAT
            mild = now
            if flat:
                dial = LARGEST_DIAL  # either nothing more can be had, or the next step is far away
                continue
        else:
            best = now
            if target - now.spent < CLOSE or dial <= SMALLEST_DIAL:
                break
        if best is None or mild is None:
            dial = dial * 4 if best is None else dial / 4
            continue
        if best.dial / mild.dial < NARROW:
            break
        share = (mild.spent - target + CLOSE / 2) / (mild.spent - best.spent)
        dial = mild.dial * (best.dial / mild.dial) ** min(max(share, 0.1), 0.9)
    return best, tried


def _place_risk(families: Sequence[Family], budget: Budget, tune: Callable[[Family], Trial]) -> list[Placed]:
    """What each family saves at a budget of loss or disagreement, and a ladder of dials around the place where it is met."""
    found, met = list[Placed](), dict[str, float]()
    for family in families:
        if found and _refines_nothing(family, (best := _whole(found)), met[best.family.name] * 2 ** LADDER[-1]):
            continue
        trial, tried = tune(family), list[OperatingPoint]()
        dial, high, macs = 1e-8, LARGEST_DIAL, 1.0
        for _ in range(STEPS):
            middle = math.sqrt(dial * high)
            evaluation = trial(family.at(middle))
            tried.append(point(middle, evaluation))
            if _risk(budget, evaluation) <= budget.value:
                dial, macs = middle, evaluation.kept_macs.mean
            else:
                high = middle
        met[family.name] = dial  # heads may still be cheap enough where no more tokens can go
        if high == LARGEST_DIAL:
            dial = _edge(family, trial, macs, dial, tried)
        found.append(Placed(family, dial, [dial * 2**step for step in LADDER], tried, macs + family.deciding_time))
    return found


def _edge(family: Family, trial: Trial, macs: float, dial: float, tried: list[OperatingPoint]) -> float:
    """About the smallest dial that keeps no more than ``macs``: nothing more goes beyond it, and a ladder there would be all one plan."""
    low = SMALLEST_DIAL
    for _ in range(STEPS):
        middle = math.sqrt(low * dial)
        evaluation = trial(family.at(middle))
        tried.append(point(middle, evaluation))
        low, dial = (low, middle) if evaluation.kept_macs.mean < macs + FLAT else (middle, dial)
    return dial


def _whole(found: Sequence[Placed]) -> Placed:
    """The best of those that cut no heads, or of all."""
    return min([each for each in found if each.family.heads == "none"] or found, key=lambda each: each.cost)


def _refines_nothing(family: Family, best: Placed, dial: float | None = None) -> bool:
    """Whether cutting heads too need not be tried: it decides otherwise than the best, or at ``dial`` no head is cheap enough for good."""
    if family.heads == "none" or not family.blocks:
        return False
    other = (family.blocks, family.rounds) != (best.family.blocks, best.family.rounds)
    return other or (family.heads == "static" and not family.head_cuts(dial or best.dial))


def _risk(budget: Budget, evaluation: Evaluation) -> float:
    return float(evaluation.drift_kl.mean()) if budget.kind == "loss" else 1 - float(evaluation.agreement.mean())


def point(dial: float, evaluation: Evaluation, verified: bool = False) -> OperatingPoint:
    """A member of a family as it was measured."""
    agreement = float(evaluation.agreement.mean())
    return OperatingPoint(dial, evaluation.kept_macs.mean, float(evaluation.drift_kl.mean()), agreement, evaluation.n, verified)
