"""Turn a dial in nats into fixed counts or a symmetric schedule, by looking at calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from hesper.curvature import Batch
from hesper.graft import GraftedViT, graft
from hesper.graft.deciders import Decider, State
from hesper.graft.linkage import most_removed, share
from hesper.plan import Anatomy, Plan, Schedule, TokenCut

Calibration = Callable[[Plan], tuple[TokenCut, ...]]


def calibration(
    module: nn.Module, tensors: Mapping[str, Tensor], batches: Callable[[], Iterable[Batch]], counts: str, schedule: Schedule
) -> Calibration | None:
    """How plans of adaptive, asymmetric cuts become what was asked for; None where they are that already.

    * fixed: every block removes the number that the adaptive plan removes on average;
    * symmetric: every block removes the same share, such that as many tokens as before reach the end. With adaptive counts each
      block's threshold is the typical price (geometric mean over images) of the last token of that share.
    """
    if counts == "adaptive" and schedule == "asymmetric":
        return None

    def cuts(plan: Plan) -> tuple[TokenCut, ...]:
        if not plan.tokens:
            return ()
        smooth = replace(plan, tokens=tuple(replace(cut, multiple=1) for cut in plan.tokens))
        removed = mean_removed(graft(module, smooth, tensors, check_weights=False), batches())
        if schedule == "symmetric":
            removed = _same_share(plan, removed)
        fixed = as_counts(plan, removed)
        if counts == "fixed":
            return fixed
        return _as_thresholds(plan, fixed, graft(module, replace(plan, tokens=fixed, dial=None), tensors, check_weights=False), batches())

    return cuts


def mean_removed(cut: GraftedViT, batches: Iterable[Batch]) -> list[float]:
    """Mean number of tokens each cut block removes."""
    total, images = np.zeros(cut.plan.model.anatomy.depth), 0
    with torch.inference_mode():
        for batch in batches:
            traffic = cut.run(batch.images).traffic
            blocks = [token_cut.block for token_cut in cut.plan.tokens]
            total[blocks] += (traffic.attended[:, blocks] - traffic.fed[:, blocks]).sum(0)
            images += len(batch.images)
    return [float(total[token_cut.block] / max(images, 1)) for token_cut in cut.plan.tokens]


def _same_share(plan: Plan, removed: list[float]) -> list[float]:
    patches = plan.model.anatomy.tokens - plan.model.anatomy.prefix_tokens
    left_at_end = max(patches - sum(removed), 1.0)
    share = 1 - (left_at_end / patches) ** (1 / len(removed))
    return [patches * (1 - share) ** index * share for index in range(len(removed))]


def as_counts(plan: Plan, removed: list[float]) -> tuple[TokenCut, ...]:
    """Whole numbers whose running sum follows the running sum of the means, so that roundings do not add up.

    A merge takes what its rounds can, a drop leaves at least one.
    """
    rounds = 1 if plan.pricing is None else plan.pricing.rounds
    left = plan.model.anatomy.tokens - plan.model.anatomy.prefix_tokens
    cuts, due = [], 0.0
    for cut, mean in zip(plan.tokens, removed, strict=True):
        due += mean
        step = max(0, min(round(due), most_removed(left, rounds) if cut.combine == "merge" else left - 1))
        due, left = due - step, left - step
        cuts.append(replace(cut, threshold=None, remove=step, multiple=1))
    return tuple(cuts)


def landed(cuts: tuple[TokenCut, ...], plan: Plan, anatomy: Anatomy, landing: Callable[[int], int]) -> tuple[TokenCut, ...]:
    """Fixed counts moved up to where ``landing`` says that a device takes no longer; thresholds stay as they are.

    Example:
        >>> from hesper.plan import empty_plan
        >>> tiny = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
        >>> cuts = (TokenCut(3, "drop", remove=40), TokenCut(6, "drop", remove=40))
        >>> [cut.remove for cut in landed(cuts, empty_plan("tiny", tiny), tiny, lambda count: -(-count // 16) * 16)]
        [37, 32]
    """
    if any(cut.remove is None for cut in cuts):
        return cuts
    rounds = 1 if plan.pricing is None else plan.pricing.rounds
    wanted = left = anatomy.tokens
    moved = []
    for cut in cuts:
        wanted -= cut.remove or 0
        patches = left - anatomy.prefix_tokens
        most = most_removed(patches, rounds) if cut.combine == "merge" else patches - 1
        remove = max(0, min(left - landing(wanted), most))
        left -= remove
        moved.append(replace(cut, remove=remove))
    return tuple(moved)


def _as_thresholds(plan: Plan, fixed: tuple[TokenCut, ...], cut: GraftedViT, batches: Iterable[Batch]) -> tuple[TokenCut, ...]:
    """Geometric mean over images of the price of the last token each block removes."""
    prices: dict[int, list[Tensor]] = {}
    hooks = []
    for block, decider in cut.deciders.items():
        token_cut = next(c for c in fixed if c.block == int(block))
        rounds = plan.pricing.rounds if plan.pricing is not None and token_cut.combine == "merge" else 1
        count = share(token_cut.remove or 0, 0, rounds)  # what the first round takes; later ones find the same threshold

        def note(decider: nn.Module, inputs: tuple[State], _: object, block: int = int(block), count: int = count) -> None:
            if count:
                price = cast(Decider, decider).prices(inputs[0])[0]
                last = price.kthvalue(min(count, price.shape[-1]), -1).values
                prices.setdefault(block, []).append(last[last.isfinite() & (last > 0)].log())

        hooks.append(decider.register_forward_hook(note))
    with torch.inference_mode():
        for batch in batches:
            cut.run(batch.images)
    limits = {block: float(torch.cat(logs).mean().exp()) for block, logs in prices.items() if len(torch.cat(logs))}
    return tuple(replace(token_cut, threshold=limits.get(token_cut.block, 0.0), remove=None) for token_cut in plan.tokens)
