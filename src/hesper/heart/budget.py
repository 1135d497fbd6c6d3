"""From families to a plan: measurement on fitting images places the dial, measurement on images that fitted nothing decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hesper.errors import Interrupted, JobError, UsageError
from hesper.heart.family import Family
from hesper.heart.placement import DRIFT_RATE, Placed, Trial, finalists, place, point
from hesper.heart.spending import Spending
from hesper.measure.bounds import disagreement_p_value, images_needed, mean_upper_bound, provable_disagreement, skewness
from hesper.measure.evaluate import Evaluation, estimate
from hesper.plan import Budget, HeadGate, Measured, OperatingPoint, Plan, TokenCut, at_dial

FEWEST_IMAGES = 10
NEIGHBOURS = (1 / 8, 1 / 4, 1 / 2, 2.0)


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


@dataclass(frozen=True)
class Contender:
    """A family that was improved to see whether it is the best, and what it cost before and after.

    Costs are those of :class:`~hesper.heart.placement.Placed`.
    """

    family: str
    before: float
    after: float


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
    contenders: tuple[Contender, ...] = ()


def check_sample(budget: Budget, verify_images: int) -> None:
    """Refuse to prove a budget on too few images.

    Raises:
        UsageError: fewer verification images than the budget's confidence needs.
    """
    needed = FEWEST_IMAGES
    if budget.kind == "disagreement":
        needed = max(needed, images_needed(budget.value, budget.confidence))
    if needed > verify_images:
        units = {"macs": "of the MACs", "loss": "nats", "disagreement": "changed decisions", "latency_ms": "ms"}
        unit = units.get(budget.kind, "of what the dense model takes")
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
    spending: Spending | None = None,
    start: float | None = None,
) -> Chosen:
    """The plan of least drift that keeps the budget on the verification images.

    ``tune`` measures on fitting images and places the dial; ``verify`` measures on images that fitted nothing and has the last word.
    ``compare`` measures on more fitting images which family drifts least at a budget of MACs; a few images of great drift decide that.
    ``improvements`` are tried one after the other, and each is taken where it is one, on the families that come first: which of these
    is best is seen when all are improved. ``spending`` is what the budget limits; without it MACs, if anything. The search for the dial
    begins at ``start``.

    Raises:
        JobError: no member of any family keeps the budget; says what can be had.
    """
    spending = spending or Spending(budget)
    placed = place(families, budget, spending, tune, compare, start)
    improvable = any(improvement.obstacle(placed[0].family) is None for improvement in improvements)
    starters = finalists(placed) if improvable else placed[:1]
    improved = [_improved(each, budget, spending, tune, compare, improvements) for each in starters]
    contenders = tuple(Contender(one.family.name, one.cost, other.cost) for one, (other, _) in zip(starters, improved, strict=True))
    best, attempts = min(improved, key=lambda each: each[0].cost)
    trial = verify(best.family)
    chosen = _with_neighbours(_prove(best.family, best.dials, best.points, budget, spending, trial), trial)
    return replace(chosen, attempts=tuple(attempts), contenders=contenders)


def _improved(
    placed: Placed,
    budget: Budget,
    spending: Spending,
    tune: Callable[[Family], Trial],
    compare: Callable[[Family], Trial] | None,
    improvements: Sequence[Improvement],
) -> tuple[Placed, list[Attempt]]:
    """The family with what improves it, and what became of each improvement."""
    attempts = []
    for improvement in improvements:
        placed, attempt = _tried(placed, budget, spending, tune, compare, improvement)
        attempts.append(attempt)
    return placed, attempts


def _tried(
    placed: Placed,
    budget: Budget,
    spending: Spending,
    tune: Callable[[Family], Trial],
    compare: Callable[[Family], Trial] | None,
    improvement: Improvement,
) -> tuple[Placed, Attempt]:
    """The improved family where each at its own dial, and where both spend as much, it drifts less than the family as it was."""
    if (obstacle := improvement.obstacle(placed.family)) is not None:
        return placed, Attempt(improvement.name, False, obstacle)
    try:
        family = improvement.make(placed.family, placed.dial)
        (new,) = place([family], budget, spending, tune, compare, placed.dial)
        plans = [each.family.at(each.dial) for each in (placed, new)]
        results = [improvement.judge(each.family)(plan) for each, plan in zip((placed, new), plans, strict=True)]
    except Interrupted:
        raise
    except JobError as error:  # what was placed keeps the budget on the fitting images, whatever the other came to
        return placed, Attempt(improvement.name, False, f"given up: {error}")
    spent, other = (spending.of(plan, result).mean for plan, result in zip(plans, results, strict=True))
    before, after = (float(result.drift_kl.mean()) for result in results)
    after *= math.exp(DRIFT_RATE * (other - spent))  # as it would be where both spend as much
    why = f"drift {after:.3g} nats with it, {before:.3g} without, at {'equal time' if spending.knows_deciding else 'as many MACs'}"
    return new if after < before else placed, Attempt(improvement.name, after < before, why, before, after)


def _prove(
    family: Family, dials: Sequence[float], points: list[OperatingPoint], budget: Budget, spending: Spending, trial: Trial
) -> Chosen:
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
        verdict = _verdict(budget, spending, plan, evaluation)
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
    points = [*points, *(point(own, measured, _turns_to(plan, other, own)) for own, other, measured in proven)]
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
    points = [point(dial, trial(at_dial(chosen.plan, dial)), verified=True) for dial in dials]
    return replace(chosen, points=_sorted([*chosen.points, *points]))


@dataclass(frozen=True)
class _Verdict:
    """Whether a plan provably keeps its budget, the promise, what was found, and the smallest budget these images would prove."""

    holds: bool
    statement: str
    found: str
    provable: float


def _verdict(budget: Budget, spending: Spending, plan: Plan, evaluation: Evaluation) -> _Verdict:
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
    values = spending.shares(plan, evaluation) if spending.limits else evaluation.drift_kl
    mean, limit = estimate(values), spending.limit if spending.limits else limit
    bound = mean_upper_bound(mean.mean, mean.stderr, n, confidence, skewness(values))
    promise, found = _in_words(budget, limit)
    statement = f"{promise} on average with confidence {confidence:g} (asymptotic bound {bound:.4g}, {n} images)."
    provable = bound if budget.kind != "latency_ms" else budget.value * bound / limit
    return _Verdict(bound <= limit, statement, f"{found.format(mean.mean)} on average, with an upper bound of {bound:.4g}", provable)


def _in_words(budget: Budget, limit: float) -> tuple[str, str]:
    """The promise of a mean, and what was found, with a place for the number."""
    if budget.kind == "macs":
        return f"Keeps at most {limit:g} of the dense MACs", "it keeps {:.4g} of the MACs"
    if budget.kind == "loss":
        return f"Drifts at most {limit:g} nats", "it drifts {:.4g} nats"
    what = "energy" if budget.kind == "energy" else "time"
    return (
        f"Takes at most {limit:.4g} of the dense model's {what}, as foretold,",
        f"it takes {{:.4g}} of the dense model's {what}, as foretold,",
    )


def _rounded_up(value: float) -> float:
    """To three digits, so that what is advised is not less than what is needed."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2) if 0 < value < math.inf else 1.0
    return float(f"{math.ceil(value / step * (1 - 1e-12)) * step:.3g}") if math.isfinite(value) else value


def _measured(evaluation: Evaluation, statement: str) -> Measured:
    return Measured(evaluation.kept_macs, estimate(evaluation.drift_kl), estimate(evaluation.agreement), statement)


def _sorted(points: Sequence[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    return tuple(sorted(set(points), key=lambda point: (point.dial, point.n)))
