"""The rules every plan obeys, beyond the types of its fields."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence

from hesper.errors import UsageError
from hesper.kinds import check_kinds
from hesper.plan.vocabulary import SCHEMA, Anatomy, Budget, HeadCut, HeadGate, Plan, TokenCut

__all__ = ["check_budget", "validate"]


def validate(plan: Plan) -> None:
    """Raise UsageError, naming the key and what to do, for the first rule the plan breaks; otherwise do nothing."""
    if plan.schema != SCHEMA:
        raise UsageError(f"the plan has schema {plan.schema}, but this hesper reads {SCHEMA}; make the plan again")
    for path, number in _floats(plan, ""):
        if not math.isfinite(number):
            raise UsageError(f"{path} is {number}; every number of a plan must be finite, leave out what was not measured")
    _check_anatomy(plan.model.anatomy)
    _check_blocks(plan.tokens, "tokens", plan.model.anatomy)
    _check_blocks(plan.heads, "heads", plan.model.anatomy)
    _check_blocks(plan.gates, "gates", plan.model.anatomy)
    for index, token_cut in enumerate(plan.tokens):
        _check_token_cut(token_cut, f"tokens[{index}]", plan)
    for index, head_cut in enumerate(plan.heads):
        _check_head_cut(head_cut, f"heads[{index}]", plan.model.anatomy)
    for index, gate in enumerate(plan.gates):
        _check_gate(gate, f"gates[{index}]", plan)
    _check_token_total(plan)
    _check_pricing(plan)
    turns = bool(plan.gates) or any(cut.threshold is not None for cut in plan.tokens)
    if plan.dial is not None and (plan.dial <= 0 or not turns):
        raise UsageError(f"dial is {plan.dial}; it must be above 0 and needs tokens or gates with a threshold, or be left out")
    check_budget(plan.budget)
    _check_evidence(plan)


def _floats(value: object, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, numbers.Real) and not isinstance(value, int):  # Real: numpy's floats count too
        yield path, float(value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _floats(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _floats(item, f"{path}[{index}]")


def _check_anatomy(anatomy: Anatomy) -> None:
    for name in ("depth", "width", "heads", "head_dim", "mlp_width", "tokens", "classes", "patch_values"):
        if getattr(anatomy, name) < 1:
            raise UsageError(f"model.anatomy.{name} is {getattr(anatomy, name)}; it must be at least 1")
    for name in ("readout_macs", "readout_token_macs"):
        if (getattr(anatomy, name) or 0) < 0:
            raise UsageError(f"model.anatomy.{name} is {getattr(anatomy, name)}; it must be 0 or more")
    if min(*anatomy.image_size, *anatomy.grid) < 1:
        raise UsageError("model.anatomy.image_size and grid must be at least 1 in both directions")
    if not 0 <= anatomy.prefix_tokens < anatomy.tokens:
        raise UsageError(f"model.anatomy.prefix_tokens is {anatomy.prefix_tokens}; it must be between 0 and {anatomy.tokens - 1}")


def _check_blocks(cuts: Sequence[TokenCut | HeadCut | HeadGate], name: str, anatomy: Anatomy) -> None:
    previous = -1
    for index, cut in enumerate(cuts):
        if not 0 <= cut.block < anatomy.depth:
            raise UsageError(f"{name}[{index}].block is {cut.block}, but the model has blocks 0 to {anatomy.depth - 1}; cut one of those")
        if cut.block == previous:
            raise UsageError(f"{name}[{index}] cuts block {cut.block} a second time; say it in one entry")
        if cut.block < previous:
            raise UsageError(f"{name}[{index}] (block {cut.block}) comes after block {previous}; sort the entries by block")
        previous = cut.block


def _check_token_cut(cut: TokenCut, path: str, plan: Plan) -> None:
    if (cut.threshold is None) == (cut.remove is None):
        raise UsageError(f"{path} needs either a threshold (a price in nats) or remove (a count), and not both")
    if cut.threshold is not None and cut.threshold < 0:
        raise UsageError(f"{path}.threshold is {cut.threshold}; a price in nats is 0 or more")
    if cut.threshold is not None and plan.pricing is None:
        raise UsageError(f"{path} has a threshold but the plan has no [pricing] to compare it with; add the table or remove by count")
    if cut.remove is not None and cut.remove < 0:
        raise UsageError(f"{path}.remove is {cut.remove}; a count of tokens is 0 or more")
    if not 1 <= cut.multiple < max(plan.model.anatomy.tokens, 2):
        raise UsageError(f"{path}.multiple is {cut.multiple}; it must be at least 1 (any count) and below the tokens of an image")
    if cut.remove is not None and cut.multiple != 1:
        raise UsageError(f"{path} removes exactly {cut.remove} tokens and cannot heed a multiple as well; leave one of them out")


def _check_token_total(plan: Plan) -> None:
    patches = plan.model.anatomy.tokens - plan.model.anatomy.prefix_tokens
    total = sum(cut.remove or 0 for cut in plan.tokens)
    if total >= patches:
        raise UsageError(f"tokens remove {total} in all, but the model has {patches} patch tokens and one must stay; remove fewer")


def _check_head_cut(cut: HeadCut, path: str, anatomy: Anatomy) -> None:
    if not cut.remove:
        raise UsageError(f"{path}.remove is empty; name the heads to remove or leave the entry out")
    if any(left >= right for left, right in zip(cut.remove, cut.remove[1:], strict=False)):
        raise UsageError(f"{path}.remove must name each head once, in ascending order, not {list(cut.remove)}")
    if cut.remove[0] < 0 or cut.remove[-1] >= anatomy.heads:
        raise UsageError(f"{path}.remove names heads {list(cut.remove)}, but block {cut.block} has heads 0 to {anatomy.heads - 1}")
    if len(cut.remove) == anatomy.heads:
        raise UsageError(f"{path} removes all {anatomy.heads} heads of block {cut.block}; keep at least one")


def _check_gate(gate: HeadGate, path: str, plan: Plan) -> None:
    if gate.threshold < 0:
        raise UsageError(f"{path}.threshold is {gate.threshold}; a price in nats is 0 or more")
    if plan.pricing is None:
        raise UsageError(f"{path} has a threshold but the plan has no [pricing] to compare it with; add the table or remove heads for good")


def _check_pricing(plan: Plan) -> None:
    pricing, width = plan.pricing, plan.model.anatomy.width
    if pricing is None:
        return
    if pricing.temperature <= 0:
        raise UsageError(f"pricing.temperature is {pricing.temperature}; it must be above 0 (1 leaves the logits as they are)")
    if pricing.draws < 1:
        raise UsageError(f"pricing.draws is {pricing.draws}; it must be at least 1")
    if not 0 <= pricing.rank <= width:
        raise UsageError(f"pricing.rank is {pricing.rank}; it must be between 0 and the model's width, {width}")
    if pricing.gamma < 0:
        raise UsageError(f"pricing.gamma is {pricing.gamma}; it must be 0 (no token curvature) or more")
    if pricing.rounds < 1:
        raise UsageError(f"pricing.rounds is {pricing.rounds}; a decision needs at least 1 round of matching")
    if pricing.refine < 0:
        raise UsageError(f"pricing.refine is {pricing.refine}; merging is refined in 0 (not at all) or more epochs")


def check_budget(budget: Budget) -> None:
    """Raise UsageError for a kind, a value or a confidence that no plan could mean."""
    check_kinds(budget, "budget's")
    value = budget.value
    if budget.kind == "macs" and not 0 < value <= 1:
        raise UsageError(f"the kept share of MACs must lie above 0 and be at most 1, not {value:g}; give for example 0.66")
    if budget.kind in ("latency", "energy") and not 0 < value <= 1:
        what = "time" if budget.kind == "latency" else "energy"
        raise UsageError(f"the share of the dense model's {what} must lie above 0 and be at most 1, not {value:g}; give for example 0.7")
    if budget.kind == "latency_ms" and not (value > 0 and math.isfinite(value)):
        raise UsageError(f"the latency must be above 0 ms, not {value:g}; give for example 5")
    if budget.kind == "loss" and not (value > 0 and math.isfinite(value)):
        raise UsageError(f"the loss budget must be above 0 nats, not {value:g}; give for example 0.02")
    if budget.kind == "disagreement" and not 0 < value < 1:
        raise UsageError(f"the share of changed decisions must lie between 0 and 1, not {value:g}; give for example 0.05")
    if not 0 < budget.confidence < 1:
        raise UsageError(f"the confidence must lie between 0 and 1, not {budget.confidence:g}; give for example 0.95")


def _check_evidence(plan: Plan) -> None:
    estimates = {"expected_loss": plan.expected_loss}
    if plan.measured is not None:
        measured = plan.measured
        estimates |= {"measured.macs": measured.macs, "measured.drift_kl": measured.drift_kl, "measured.agreement": measured.agreement}
    for path, estimate in estimates.items():
        if estimate is not None and (estimate.stderr < 0 or estimate.n < 1):
            raise UsageError(f"{path} has stderr {estimate.stderr} over n = {estimate.n}; it needs stderr >= 0 and n >= 1")
    if (device := plan.device) is not None:
        if min(device.batch_size, device.threads, device.processes) < 1:
            raise UsageError("device needs a batch_size, threads and processes of at least 1; measure it again")
        if not 0 < device.low <= device.measured <= device.high or min(device.foretold, device.expected) <= 0:
            raise UsageError("device.measured must lie between low and high, and all must be above 0; measure it again")
    for index, point in enumerate(plan.points):
        if point.n < 1 or point.macs < 0 or not 0 <= point.agreement <= 1:
            raise UsageError(f"points[{index}] needs n >= 1, macs >= 0 and an agreement between 0 and 1; measure it again")
    provenance = plan.provenance
    if min(provenance.seed, provenance.fit_images, provenance.verify_images) < 0:
        raise UsageError("provenance.seed, fit_images and verify_images must be 0 or more; mend the negative one")
