"""What a budget limits of an image's work, as a share of the dense model's: MACs, or the time or energy that a device takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hesper.errors import UsageError
from hesper.measure.evaluate import Column, Evaluation, estimate
from hesper.measure.stairs import Stairs
from hesper.plan import Budget, Estimate, Plan, on_device

__all__ = ["Spending", "spending_of"]


@dataclass(frozen=True, eq=False)
class Spending:
    """How much of the dense model's work a plan takes, image by image, and the limit on the mean.

    Of MACs without ``stairs``. With them of a device's time, as they foretell it, times ``correction``: what was measured of whole models
    by what was foretold of them. Energy is taken to follow time until it is measured, which a correction then says.
    """

    budget: Budget
    stairs: Stairs | None = None
    correction: float = 1.0

    @property
    def limits(self) -> bool:
        """Whether the budget limits work at all, and not what a cut may cost."""
        return self.budget.kind == "macs" or on_device(self.budget)

    @property
    def knows_deciding(self) -> bool:
        """Whether the time that deciding on tokens takes is part of it; gates of heads are not timed."""
        return self.stairs is not None

    @property
    def limit(self) -> float:
        """The largest mean share that keeps the budget."""
        if self.budget.kind == "latency_ms" and self.stairs is not None:
            return self.budget.value / 1000 / self.stairs.dense
        return self.budget.value

    def shares(self, plan: Plan, evaluation: Evaluation) -> Column:
        """The share that each image takes, ``[images]``."""
        if self.stairs is None:
            return evaluation.macs / evaluation.macs_dense
        return self.correction * self.stairs.seconds(plan, evaluation.tokens, evaluation.heads) / self.stairs.dense

    def of(self, plan: Plan, evaluation: Evaluation) -> Estimate:
        """The mean share."""
        return estimate(self.shares(plan, evaluation))

    def corrected(self, correction: float) -> Spending:
        """The same with another correction."""
        return replace(self, correction=correction)

    def out_of_reach(self, least: float) -> str:
        """That no plan keeps the budget, and the least that was found, a share; without a full stop."""
        value, kind = self.budget.value, self.budget.kind
        if self.stairs is None or kind == "macs":
            return f"No plan keeps {value:g} of the MACs; the least that can be had is {least:.3f}"
        if kind == "latency_ms":
            ms = 1000 * self.stairs.dense
            had = f"the least that can be had is {least * ms:.3g} ms"
            return f"No plan takes {value:g} ms here, where the dense model takes {ms:.3g} ms; {had}"
        what = "time" if kind == "latency" else "energy"
        return f"No plan takes {value:g} of the dense model's {what} here; the least that can be had is {least:.3f}"


def spending_of(budget: Budget, stairs: Stairs | None) -> Spending:
    """What ``budget`` limits; ``stairs`` are needed, and heeded, only by a budget that is about a device.

    Raises:
        UsageError: the dense model takes no longer than so many milliseconds.
    """
    found = Spending(budget, stairs if on_device(budget) else None)
    if budget.kind == "latency_ms" and stairs is not None and found.limit >= 1:
        raise UsageError(
            f"The dense model takes {1000 * stairs.dense:.3g} ms here already, so {budget.value:g} ms is no budget; give less."
        )
    return found
