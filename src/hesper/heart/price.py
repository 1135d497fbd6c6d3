"""The price of a whole plan: one gradient and one Hessian-vector product, interactions included."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hesper.curvature import Batch, Hessian, gradient
from hesper.curvature.losses import Loss
from hesper.graft import GraftedViT
from hesper.graft.deciders import Decider
from hesper.graft.restoration import Restoration
from hesper.heart.gated import HEAD_GATES, TOKEN_GATES, TOKEN_SHIFTS, gated_forward
from hesper.heart.lenses import gated_lens
from hesper.hosts import Host


def plan_price(host: Host, cut: GraftedViT, batch: Batch, loss: Loss) -> Tensor:
    """The loss a plan is expected to cause on each image, in nats: ``[images]``.

        Delta L = grad L . v + v . H v / 2

    where the step v closes the gates of dropped tokens, of removed heads and of heads that sit out, and displaces merged tokens to
    what stands for their group (all as the plan decides on these images). One Hessian-vector product prices all cuts at once.
    Powers of sizes in attention are left out, and so is what a later block's restoration makes of members that had merged before.

    Args:
        host: the dense model.
        cut: the grafted model.
        batch: images, with labels if the loss needs them.
        loss: of the logits.
    """
    step = plan_step(host, cut, batch.images)
    lens = gated_lens(host, len(batch.images), loss, *step, like=batch.images)
    slope = gradient(lens, [batch])
    bend = Hessian(lens, [batch]) @ step
    terms = [(step[name] * (slope[name] + bend[name] / 2)).flatten(1).sum(1) for name in step]
    return torch.stack(terms).sum(0)


def plan_step(host: Host, cut: GraftedViT, images: Tensor) -> dict[str, Tensor]:
    """Where a plan moves gates and stream of the dense model: the step v of :func:`plan_price`, zero where nothing is cut."""
    anatomy = host.anatomy
    with torch.no_grad():
        outcome = cut.run(images, trace=True)
        streams = gated_forward(host, images).streams
    patches = anatomy.tokens - anatomy.prefix_tokens
    gates = images.new_zeros(len(images), anatomy.depth, patches)
    shifts = images.new_zeros(len(images), anatomy.depth, anatomy.tokens, anatomy.width)
    before = torch.arange(patches, device=images.device).expand(len(images), -1)
    restorations = {int(name): cast(Decider, decider).restoration for name, decider in cut.deciders.items()}
    for block, after in enumerate(outcome.sources or ()):
        gates[:, block][(after < 0) & (before >= 0)] = -1.0
        tokens = streams[block][:, anatomy.prefix_tokens :]
        own = restorations.get(block)
        moved = group_mean(tokens, after, own) - group_mean(tokens, before, own)
        shifts[:, block, anatomy.prefix_tokens :] = moved * (after >= 0)[..., None]
        before = after
    assert outcome.used is not None
    heads = -(~outcome.used).to(images.dtype)
    step = {TOKEN_GATES: gates, TOKEN_SHIFTS: shifts, HEAD_GATES: heads}
    return {name: value for name, value in step.items() if bool(value.any())} or {HEAD_GATES: heads}


def group_mean(tokens: Tensor, group: Tensor, restoration: Restoration | None = None) -> Tensor:
    """Every token's mean over the tokens of its group, restored where there are several: ``[images, n, width]``.

    ``group`` is ``[images, n]`` (negative: no group).

    Example:
        >>> group_mean(torch.tensor([[[1.0], [3.0], [7.0]]]), torch.tensor([[0, 0, 1]])).flatten().tolist()
        [2.0, 2.0, 7.0]
    """
    mean, several = _over_groups(tokens, group)
    if restoration is None:
        return mean
    length, _ = _over_groups(tokens.norm(dim=-1, keepdim=True), group)
    return torch.where(several, restoration(mean, length), mean)


def _over_groups(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The means, and ``[images, n, 1]`` which tokens share their group with others."""
    index = group.clamp_min(0)
    belongs = (group >= 0).to(values.dtype)[..., None]
    wide = index[..., None].expand_as(values)
    total = torch.zeros_like(values).scatter_add(1, wide, values * belongs)
    count = torch.zeros_like(belongs).scatter_add(1, index[..., None], belongs)
    return (total / count.clamp_min(1)).gather(1, wide), count.gather(1, index[..., None]) > 1
