"""From a family to a plan: predictions place the dial, measurement on images that fitted nothing decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hesper.errors import JobError, UsageError
from hesper.heart.family import Family
from hesper.measure.bounds import disagreement_p_value, images_needed, mean_upper_bound
from hesper.measure.evaluate import Evaluation, estimate
from hesper.plan import Budget, Measured, OperatingPoint, Plan

Trial = Callable[[Plan], Evaluation]

SMALLEST_DIAL, FIRST_DIAL, LARGEST_DIAL = 1e-9, 1e-5, 1e3
MOST_TRIALS = 24
CLOSE, FLAT, NARROW = 0.003, 1e-4, 1.01
STEPS = 9
# Deciding takes time that MACs do not show: many small steps. A family that decides in every block must drift less by this share
# than one that never does, and half as much less than one that decides in every other.
WORTH = 0.1
# Powers of two around the dial that met the budget on fitting images: fixed beforehand, finer where the answer is likely.
LADDER = (-5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
MARGIN = 0.002


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan that keeps its budget: the family it is of, its dial, how it did on the verification images, and every point measured."""

    family: Family
    dial: float
    plan: Plan
    evaluation: Evaluation
    measured: Measured
    points: tuple[OperatingPoint, ...]


def check_budget(budget: Budget, verify_images: int) -> None:
    """Refuse budgets no plan could keep or no sample of this size could prove.

    Raises:
        UsageError: a value or confidence out of range, or too few verification images.
    """
    if not 0 < budget.confidence < 1:
        raise UsageError(f"The confidence must lie between 0 and 1, not {budget.confidence:g}; give for example 0.95.")
    if budget.kind == "loss":
        if not (budget.value > 0 and math.isfinite(budget.value)):
            raise UsageError(f"The loss budget must be above 0 nats, not {budget.value:g}; give for example 0.02.")
    elif not 0 < budget.value <= 1 or (budget.kind == "disagreement" and budget.value == 1):
        what = "kept share of MACs" if budget.kind == "macs" else "share of changed decisions"
        raise UsageError(f"The {what} must lie between 0 and 1, not {budget.value:g}.")
    if budget.kind == "disagreement" and (needed := images_needed(budget.value, budget.confidence)) > verify_images:
        raise UsageError(
            f"Proving at most {budget.value:g} changed decisions with confidence {budget.confidence:g} takes at least {needed} images for "
            f"verification, and there are {verify_images}; give more calibration images, or a larger share."
        )
    if verify_images < 2:
        raise UsageError(f"A budget needs at least 2 images for verification, and there are {verify_images}; give more calibration images.")


def choose(families: Sequence[Family], budget: Budget, tune: Callable[[Family], Trial], verify: Callable[[Family], Trial]) -> Chosen:
    """The plan of least drift that keeps the budget on the verification images.

    ``tune`` measures on fitting images and places the dial; ``verify`` measures on images that fitted nothing and has the last word.

    Raises:
        JobError: no member of any family keeps the budget; says what can be had.
    """
    if budget.kind == "macs":
        return _meet_macs(families, budget, tune, verify)
    return _meet_risk(families, budget, tune, verify)


def _meet_macs(families: Sequence[Family], budget: Budget, tune: Callable[[Family], Trial], verify: Callable[[Family], Trial]) -> Chosen:
    target = budget.value - MARGIN
    points: list[OperatingPoint] = []
    placed: list[tuple[float, float, Family]] = []
    dial: float | None = None
    for family in families:
        if placed and family.heads == "static" and dial is not None and not family.head_cuts(dial):
            continue  # its plans are those of the family just measured
        dial, evaluation, tried = _dial_for_macs(family, tune(family), target, start=dial or FIRST_DIAL)
        points += tried
        if dial is not None:
            placed.append((float(evaluation.drift_kl.mean()), dial, family))
    if not placed:
        least = min(point.macs for point in points)
        raise JobError(f"No plan keeps {budget.value:g} of the MACs; the least that can be had is {least:.3f}.")
    _, dial, family = min(placed, key=lambda entry: entry[0] * (1 + WORTH * len(entry[2].blocks) / entry[2].blank.model.anatomy.depth))
    while dial is not None:
        plan = family.at(dial)
        evaluation = verify(family)(plan)
        kept = evaluation.kept_macs
        bound = mean_upper_bound(kept.mean, kept.stderr, kept.n, budget.confidence)
        if bound <= budget.value:
            statement = (
                f"Keeps at most {budget.value:g} of the dense MACs on average with confidence {budget.confidence:g} "
                f"(asymptotic bound {bound:.4f}, {kept.n} images)."
            )
            return Chosen(family, dial, plan, evaluation, _measured(evaluation, statement), _sorted(points))
        target -= (bound - budget.value) + MARGIN
        dial, _, tried = _dial_for_macs(family, tune(family), target, start=dial)
        points += tried
    raise JobError(f"No plan ({family.name}) kept {budget.value:g} of the MACs on the verification images; ask for a little more.")


def _dial_for_macs(
    family: Family, trial: Trial, target: float, start: float = FIRST_DIAL
) -> tuple[float | None, Evaluation, list[OperatingPoint]]:
    """The dial whose mean MACs lie just below ``target``; None where no dial reaches it.

    Mean MACs fall with the dial, nearly linearly in its logarithm: false position between a dial that keeps too much and one that
    keeps too little, after walking out from ``start`` by factors of four until there is one of each.
    """
    tried: list[OperatingPoint] = []
    mild: tuple[float, float] | None = None
    best: tuple[float, Evaluation] | None = None
    dial = start
    while len(tried) < MOST_TRIALS:
        evaluation = trial(family.at(dial))
        tried.append(_point(dial, evaluation))
        kept = evaluation.kept_macs.mean
        if kept > target:
            if dial >= LARGEST_DIAL or (mild is not None and best is None and mild[1] - kept < FLAT and kept < 1 - FLAT):
                break
            mild = (dial, kept)
        else:
            best = (dial, evaluation)
            if target - kept < CLOSE or dial <= SMALLEST_DIAL:
                break
        if best is None or mild is None:
            dial = dial * 4 if best is None else dial / 4
            continue
        if best[0] / mild[0] < NARROW:
            break
        share = (mild[1] - target + CLOSE / 2) / (mild[1] - best[1].kept_macs.mean)
        dial = mild[0] * (best[0] / mild[0]) ** min(max(share, 0.1), 0.9)
    return (None, evaluation, tried) if best is None else (*best, tried)


def _meet_risk(families: Sequence[Family], budget: Budget, tune: Callable[[Family], Trial], verify: Callable[[Family], Trial]) -> Chosen:
    """Fixed-sequence testing: from harmless to aggressive along dials fixed beforehand, stopping at the first that fails."""
    family, dials, points = _place(families, budget, tune)
    trial = verify(family)
    kept: tuple[float, Plan, Evaluation, str] | None = None
    first = ""
    for dial in dials:
        plan = family.at(dial)
        evaluation = trial(plan)
        points.append(_point(dial, evaluation))
        holds, statement = _verdict(budget, evaluation)
        first = first or statement
        if not holds:
            break
        kept = (dial, plan, evaluation, statement)
    if kept is None:
        raise JobError(f"The budget cannot be proven even for the mildest plan tried: {first} Allow more, or give more calibration images.")
    dial, plan, evaluation, statement = kept
    return Chosen(family, dial, plan, evaluation, _measured(evaluation, statement), _sorted(points))


def _place(families: Sequence[Family], budget: Budget, tune: Callable[[Family], Trial]) -> tuple[Family, list[float], list[OperatingPoint]]:
    """The family that saves most at the budget on the fitting images, and a ladder of dials around the place where it is met."""
    points: list[OperatingPoint] = []
    best: tuple[float, float, Family] | None = None
    for family in families:
        trial = tune(family)
        low, high = 1e-8, 1e-2
        found = trial(family.at(low))
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            evaluation = trial(family.at(middle))
            points.append(_point(middle, evaluation))
            if _risk(budget, evaluation) <= budget.value:
                low, found = middle, evaluation
            else:
                high = middle
        macs = found.kept_macs.mean
        if best is None or macs < best[0]:
            best = (macs, low, family)
    assert best is not None
    _, dial, family = best
    return family, [dial * 2**step for step in LADDER], points


def _risk(budget: Budget, evaluation: Evaluation) -> float:
    return float(evaluation.drift_kl.mean()) if budget.kind == "loss" else 1 - float(evaluation.agreement.mean())


def _verdict(budget: Budget, evaluation: Evaluation) -> tuple[bool, str]:
    if budget.kind == "loss":
        drift = estimate(evaluation.drift_kl)
        bound = mean_upper_bound(drift.mean, drift.stderr, drift.n, budget.confidence)
        return bound <= budget.value, (
            f"Drifts at most {budget.value:g} nats on average with confidence {budget.confidence:g} "
            f"(asymptotic bound {bound:.4g}, {drift.n} images)."
        )
    rate = 1 - float(evaluation.agreement.mean())
    p = disagreement_p_value(rate, evaluation.n, budget.value)
    return p <= 1 - budget.confidence, (
        f"Changes at most {budget.value:g} of the top-1 decisions with confidence {budget.confidence:g} "
        f"(Hoeffding-Bentkus, distribution-free, p = {p:.3g}, measured {rate:.4f} on {evaluation.n} images)."
    )


def _point(dial: float, evaluation: Evaluation) -> OperatingPoint:
    agreement = float(evaluation.agreement.mean())
    return OperatingPoint(dial, evaluation.kept_macs.mean, float(evaluation.drift_kl.mean()), agreement, evaluation.n)


def _measured(evaluation: Evaluation, statement: str) -> Measured:
    return Measured(evaluation.kept_macs, estimate(evaluation.drift_kl), estimate(evaluation.agreement), statement)


def _sorted(points: Sequence[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    return tuple(sorted(set(points), key=lambda point: (point.dial, point.n)))
