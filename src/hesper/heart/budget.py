"""From families to a plan: measurement on fitting images places the dial, measurement on images that fitted nothing decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hesper.errors import Interrupted, JobError, UsageError
from hesper.heart.family import Family
from hesper.measure.bounds import disagreement_p_value, images_needed, mean_upper_bound, provable_disagreement, skewness
from hesper.measure.evaluate import Evaluation, estimate
from hesper.plan import Budget, HeadGate, Measured, OperatingPoint, Plan, TokenCut, at_dial

Trial = Callable[[Plan], Evaluation]

FEWEST_IMAGES = 10
SMALLEST_DIAL, FIRST_DIAL, LARGEST_DIAL = 1e-9, 1e-5, 1e3
MOST_TRIALS = 24
CLOSE, FLAT, NARROW = 0.003, 1e-4, 1.01
STEPS = 11
ALIKE = 1e-9  # spread of kept MACs below which all images cost the same: fixed counts, or heads alone
DRIFT_RATE = 12.0  # drift grows as exp(-12 MACs) where half to two thirds of them are kept (11 to 15 on two ViTs)
IMPERCEPTIBLE = 0.0003  # nats of drift that no decision is worth
# Powers of two around the dial that met the budget on fitting images: fixed beforehand, finer where the answer is likely.
LADDER = (-5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
NEIGHBOURS = (1 / 8, 1 / 4, 1 / 2, 2.0)
SIGMAS = (5.0, 4.0, 3.2, 2.6, 2.1, 1.7, 1.3, 0.9)
SAFE = (2.0, 0.7)  # steps in the dial's logarithm from which MACs are on the safe side whatever their slope was taken for


@dataclass(frozen=True, eq=False)
class Improvement:
    """Makes another family of one, given its dial, and measures which of the two is better.

    ``obstacle`` says why a family cannot be improved, None where it can. ``judge`` measures on images that favour neither: either both
    have been fitted on them or none.
    """

    name: str
    obstacle: Callable[[Family], str | None]
    make: Callable[[Family, float], Family]
    judge: Callable[[Family], Trial]


@dataclass(frozen=True)
class Attempt:
    """What became of an improvement, and in words why; drift in nats without and with it, where that was measured."""

    name: str
    taken: bool
    why: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan that keeps its budget: the family it is of, its dial, how it did on the verification images, and every point measured."""

    family: Family
    dial: float
    plan: Plan
    evaluation: Evaluation
    measured: Measured
    points: tuple[OperatingPoint, ...]
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, eq=False)
class _Placed:
    """The best of several families, the dial that met the budget on the fitting images, dials to prove it at, and what was measured."""

    family: Family
    dial: float
    dials: list[float]
    points: list[OperatingPoint]


def check_sample(budget: Budget, verify_images: int) -> None:
    """Refuse to prove a budget on too few images.

    Raises:
        UsageError: fewer verification images than the budget's confidence needs.
    """
    needed = FEWEST_IMAGES
    if budget.kind == "disagreement":
        needed = max(needed, images_needed(budget.value, budget.confidence))
    if needed > verify_images:
        unit = {"macs": "of the MACs", "loss": "nats", "disagreement": "changed decisions"}[budget.kind]
        raise UsageError(
            f"Proving at most {budget.value:g} {unit} with confidence {budget.confidence:g} takes at least {needed} readable images for "
            f"verification, and there are {verify_images}; give more calibration images, of which half verify."
        )


def choose(
    families: Sequence[Family],
    budget: Budget,
    tune: Callable[[Family], Trial],
    verify: Callable[[Family], Trial],
    compare: Callable[[Family], Trial] | None = None,
    improvements: Sequence[Improvement] = (),
) -> Chosen:
    """The plan of least drift that keeps the budget on the verification images.

    ``tune`` measures on fitting images and places the dial; ``verify`` measures on images that fitted nothing and has the last word.
    ``compare`` measures on more fitting images which family drifts least at a budget of MACs; a few images of great drift decide that.
    ``improvements`` are tried on the best family one after the other, and each is taken where it is one.

    Raises:
        JobError: no member of any family keeps the budget; says what can be had.
    """
    placed = _place_macs(families, budget, tune, compare) if budget.kind == "macs" else _place_risk(families, budget, tune)
    attempts = []
    for improvement in improvements:
        placed, attempt = _improved(placed, budget, tune, compare, improvement)
        attempts.append(attempt)
    trial = verify(placed.family)
    chosen = _with_neighbours(_prove(placed.family, placed.dials, placed.points, budget, trial), trial)
    return replace(chosen, attempts=tuple(attempts))


def _improved(
    placed: _Placed, budget: Budget, tune: Callable[[Family], Trial], compare: Callable[[Family], Trial] | None, improvement: Improvement
) -> tuple[_Placed, Attempt]:
    """The improved family where each at its own dial, and at as many MACs, it drifts less than the family as it was."""
    if (obstacle := improvement.obstacle(placed.family)) is not None:
        return placed, Attempt(improvement.name, False, obstacle)
    try:
        family = improvement.make(placed.family, placed.dial)
        new = _place_macs([family], budget, tune, compare, placed.dial) if budget.kind == "macs" else _place_risk([family], budget, tune)
        results = [improvement.judge(each.family)(each.family.at(each.dial)) for each in (placed, new)]
    except Interrupted:
        raise
    except JobError as error:  # what was placed keeps the budget on the fitting images, whatever the other came to
        return placed, Attempt(improvement.name, False, f"given up: {error}")
    kept, other = (result.kept_macs.mean for result in results)
    before, after = (float(result.drift_kl.mean()) for result in results)
    after *= math.exp(DRIFT_RATE * (other - kept))  # as it would be at as many MACs
    why = f"drift {after:.3g} nats with it, {before:.3g} without, at as many MACs"
    return new if after < before else placed, Attempt(improvement.name, after < before, why, before, after)


def _prove(family: Family, dials: Sequence[float], points: list[OperatingPoint], budget: Budget, trial: Trial) -> Chosen:
    """Fixed-sequence testing: along dials fixed beforehand, from the safe side towards the budget, stopping at the first that fails.

    Every test may use the full confidence, because a later plan is only tested when all before it passed (Learn then Test, arXiv
    2110.01052, section 3.2).
    """
    kept: tuple[float, Plan, Evaluation, _Verdict] | None = None
    last: tuple[Plan, Evaluation] | None = None
    proven: list[tuple[float, Plan, Evaluation]] = []
    verdict = None
    for dial in dials:
        plan = family.at(dial)
        cuts = (plan.tokens, plan.heads, plan.gates)
        same = last is not None and (last[0].tokens, last[0].heads, last[0].gates) == cuts
        evaluation = last[1] if last is not None and same else trial(plan)
        last = (plan, evaluation)
        proven.append((dial, plan, evaluation))
        verdict = _verdict(budget, evaluation)
        if not verdict.holds:
            break
        kept = (dial, plan, evaluation, verdict)
    if kept is None:
        assert verdict is not None
        raise JobError(
            f"Not even the safest plan tried can be proven to keep the budget of {budget.value:g}: "
            f"on {evaluation.n} images {verdict.found}. Allow at least {_rounded_up(verdict.provable):g}, or give more calibration images."
        )
    dial, plan, evaluation, verdict = kept
    points = [*points, *(_point(own, measured, _turns_to(plan, other, own)) for own, other, measured in proven)]
    return Chosen(family, dial, plan, evaluation, _measured(evaluation, verdict.statement), _sorted(points))


def _turns_to(plan: Plan, other: Plan, dial: float) -> bool:
    """Whether turning the dial of ``plan`` gives ``other``: removed heads, and thresholds of a symmetric schedule, do not turn with it."""
    if plan.dial is None or other.heads != plan.heads:
        return False
    turned = at_dial(plan, dial)
    return _alike(turned.tokens, other.tokens) and _alike(turned.gates, other.gates)


def _alike(mine: Sequence[TokenCut | HeadGate], theirs: Sequence[TokenCut | HeadGate]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all(math.isclose(own.threshold or 0.0, other.threshold or 0.0, rel_tol=1e-9) for own, other in pairs)


def _with_neighbours(chosen: Chosen, trial: Trial) -> Chosen:
    """Also measure other places of the dial on the verification images, for turning it at run time."""
    if chosen.plan.dial is None:
        return chosen
    dials = [chosen.plan.dial * factor for factor in NEIGHBOURS]
    points = [_point(dial, trial(at_dial(chosen.plan, dial)), verified=True) for dial in dials]
    return replace(chosen, points=_sorted([*chosen.points, *points]))


def _place_macs(
    families: Sequence[Family],
    budget: Budget,
    tune: Callable[[Family], Trial],
    compare: Callable[[Family], Trial] | None = None,
    dial: float | None = None,
) -> _Placed:
    """The family of least drift at the budget on fitting images, and dials that keep a little more and more of the MACs.

    The search for the first family's dial starts at ``dial``.

    The dials aim between five and one standard errors below the budget, as the fitting images foretell them for the difference
    between the two samples. Deciding takes time that MACs do not show, so a family that decides more often, or in more rounds, must
    drift less.
    """
    least = 1.0
    best: _Placement | None = None
    for family in families:
        if best is not None and _refines_nothing(family, best.family, best.dial):
            continue
        dial, evaluation, tried = _dial_for_macs(family, tune(family), budget.value, start=dial or FIRST_DIAL)
        least = min(least, *(point.macs for point in tried))
        if dial is not None:
            evaluation = evaluation if compare is None else compare(family)(family.at(dial))
            placed = _Placement(family, dial, evaluation, tuple(tried))
            best = placed if best is None or placed.weighted_drift < best.weighted_drift else best
    if best is None:
        raise JobError(f"No plan keeps {budget.value:g} of the MACs; the least that can be had is {least:.3f}.")
    # Two samples of images differ: the tuned mean has its error, and so will the verified one.
    kept = best.evaluation.kept_macs
    error = kept.stderr * math.sqrt(1 + best.evaluation.n / best.family.blank.provenance.verify_images)
    slope, short = _slope(best.tried, kept.mean), kept.mean - budget.value
    steps = [min((sigmas * error + short) / slope, SAFE[0]) for sigmas in SIGMAS] if error >= ALIKE else [0.0]
    if error >= ALIKE:
        # Where MACs fall in steps, or few images say how fast, the slope deceives, and a first dial that fails would refuse the budget.
        steps = [safe for safe in SAFE if safe > steps[0]] + steps
    return _Placed(best.family, best.dial, [best.dial * math.exp(step) for step in steps], list(best.tried))


@dataclass(frozen=True, eq=False)
class _Placement:
    """A family with the dial that meets the budget on the fitting images, its evaluation there, and all that was tried."""

    family: Family
    dial: float
    evaluation: Evaluation
    tried: tuple[OperatingPoint, ...]

    @property
    def weighted_drift(self) -> float:
        """Mean drift, as it would be if the time that deciding takes had to be saved in MACs."""
        drift = float(self.evaluation.drift_kl.mean()) + IMPERCEPTIBLE * self.family.decisions
        return drift * math.exp(DRIFT_RATE * self.family.deciding_time)


def _slope(points: Sequence[OperatingPoint], near: float) -> float:
    """How fast a family's kept MACs fall with the logarithm of the dial around ``near``; a cautious guess where too little was measured."""
    close = {(math.log(point.dial), point.macs) for point in points if abs(point.macs - near) < 0.1}
    if len({x for x, _ in close}) < 2:
        return 0.1
    mean_x, mean_y = (sum(values) / len(close) for values in zip(*close, strict=True))
    variance = sum((x - mean_x) ** 2 for x, _ in close)
    slope = -sum((x - mean_x) * (y - mean_y) for x, y in close) / variance
    return float(max(slope, 0.01))


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
            if dial >= LARGEST_DIAL:
                break
            flat = mild is not None and best is None and mild[1] - kept < FLAT
            mild = (dial, kept)
            if flat:
                dial = LARGEST_DIAL  # either nothing more can be had, or the next step is far away
                continue
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


def _place_risk(families: Sequence[Family], budget: Budget, tune: Callable[[Family], Trial]) -> _Placed:
    """The family that saves most at the budget on the fitting images, and a ladder of dials around the place where it is met."""
    best: tuple[float, float, Family, list[OperatingPoint]] | None = None
    for family in families:
        if best is not None and _refines_nothing(family, best[2], best[1] * 2 ** LADDER[-1]):
            continue
        trial, tried = tune(family), list[OperatingPoint]()
        dial, high, macs = 1e-8, LARGEST_DIAL, 1.0
        for _ in range(STEPS):
            middle = math.sqrt(dial * high)
            evaluation = trial(family.at(middle))
            tried.append(_point(middle, evaluation))
            if _risk(budget, evaluation) <= budget.value:
                dial, macs = middle, evaluation.kept_macs.mean
            else:
                high = middle
        spent = macs + family.deciding_time
        if best is None or spent < best[0]:
            best = (spent, dial, family, tried)
    assert best is not None
    _, dial, family, tried = best
    return _Placed(family, dial, [dial * 2**step for step in LADDER], tried)


def _refines_nothing(family: Family, best: Family, dial: float) -> bool:
    """Whether cutting heads too need not be tried: it decides otherwise than the best, or at ``dial`` no head is cheap enough for good."""
    if family.heads == "none" or not family.blocks:
        return False
    return (family.blocks, family.rounds) != (best.blocks, best.rounds) or (family.heads == "static" and not family.head_cuts(dial))


def _risk(budget: Budget, evaluation: Evaluation) -> float:
    return float(evaluation.drift_kl.mean()) if budget.kind == "loss" else 1 - float(evaluation.agreement.mean())


@dataclass(frozen=True)
class _Verdict:
    """Whether a plan provably keeps its budget, the promise, what was found, and the smallest budget these images would prove."""

    holds: bool
    statement: str
    found: str
    provable: float


def _verdict(budget: Budget, evaluation: Evaluation) -> _Verdict:
    limit, confidence, n = budget.value, budget.confidence, evaluation.n
    if budget.kind == "disagreement":
        changed = n - int(evaluation.agreement.sum())
        p = disagreement_p_value(changed, n, limit)
        statement = (
            f"Changes at most {limit:g} of the top-1 decisions with confidence {confidence:g} "
            f"(exact binomial test, distribution-free, p = {p:.3g}, measured {changed} of {n} images)."
        )
        provable = provable_disagreement(changed, n, confidence)
        return _Verdict(p <= 1 - confidence, statement, f"{changed} decisions changed", provable)
    mean = evaluation.kept_macs if budget.kind == "macs" else estimate(evaluation.drift_kl)
    values = evaluation.macs if budget.kind == "macs" else evaluation.drift_kl
    bound = mean_upper_bound(mean.mean, mean.stderr, n, confidence, skewness(values))
    promise = f"Keeps at most {limit:g} of the dense MACs" if budget.kind == "macs" else f"Drifts at most {limit:g} nats"
    statement = f"{promise} on average with confidence {confidence:g} (asymptotic bound {bound:.4g}, {n} images)."
    found = f"it keeps {mean.mean:.4g} of the MACs" if budget.kind == "macs" else f"it drifts {mean.mean:.4g} nats"
    return _Verdict(bound <= limit, statement, f"{found} on average, with an upper bound of {bound:.4g}", bound)


def _rounded_up(value: float) -> float:
    """To three digits, so that what is advised is not less than what is needed."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2) if 0 < value < math.inf else 1.0
    return float(f"{math.ceil(value / step * (1 - 1e-12)) * step:.3g}") if math.isfinite(value) else value


def _point(dial: float, evaluation: Evaluation, verified: bool = False) -> OperatingPoint:
    agreement = float(evaluation.agreement.mean())
    return OperatingPoint(dial, evaluation.kept_macs.mean, float(evaluation.drift_kl.mean()), agreement, evaluation.n, verified)


def _measured(evaluation: Evaluation, statement: str) -> Measured:
    return Measured(evaluation.kept_macs, estimate(evaluation.drift_kl), estimate(evaluation.agreement), statement)


def _sorted(points: Sequence[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    return tuple(sorted(set(points), key=lambda point: (point.dial, point.n)))
