"""What a merged token gets back of what averaging took from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hesper.graft.decision import Decision, grouped_mean
from hesper.graft.even import EvenDecision, even_mean

# A mean shorter than a quarter of its members is mostly what they disagree in, and is stretched no further.
MOST_STRETCHED = 4.0


class Restoration(nn.Module):
    """Stretches a mean towards its members' mean length, and gives every channel what averaging takes from it in general.

        x = (1 + gain) * m (l / |m|)^stretch

    with m the size-weighted mean of the members and l their mean length. Averaging shortens: tokens that differ cancel where they
    differ, and the updates of later blocks, whose size the norm fixes, would then turn the merged token further than any of
    its members. Without tables the stretch is one and the gain zero: a merged token has the mean length of its members.

    Args:
        width: of the stream.
        tables: ``restoration.stretch`` ``[]`` and ``restoration.gain`` ``[width]``, each where it was learned.

    Example:
        >>> Restoration(2)(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]])).norm().round(decimals=4).item()
        2.0
    """

    stretch: Tensor
    gain: Tensor

    def __init__(self, width: int, tables: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        tables = tables or {}
        self.register_buffer("stretch", tables.get("restoration.stretch", torch.ones(())).clone())
        self.register_buffer("gain", tables.get("restoration.gain", torch.zeros(width)).clone())

    def forward(self, mean: Tensor, length: Tensor) -> Tensor:
        """``[..., width]`` from means ``[..., width]`` and mean lengths ``[..., 1]``."""
        return mean * self.factor(mean.norm(dim=-1, keepdim=True), length) * (1 + self.gain)

    def factor(self, norm: Tensor, length: Tensor) -> Tensor:
        """(l / |m|)^stretch ``[..., 1]`` from |m| and l, each ``[..., 1]``."""
        # Where members cancel, what is left of them is rounding and has no direction to be stretched along.
        least = (length / MOST_STRETCHED).clamp_min(torch.finfo(length.dtype).tiny)
        ratio: Tensor = length.clamp_min(torch.finfo(length.dtype).tiny) / torch.maximum(norm, least)
        return ratio**self.stretch


def restored_mean(
    values: Tensor, size: Tensor, decision: Decision | EvenDecision, restoration: Restoration | None
) -> tuple[Tensor, Tensor]:
    """As :func:`~hesper.graft.decision.grouped_mean`, with what was merged restored; other rows stay as they are.

    Example:
        >>> import numpy as np
        >>> merge = Decision(2, np.array([1]), np.array([0]), (1,))
        >>> x, one = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.ones(2)
        >>> round(restored_mean(x, one, merge, Restoration(2))[0].norm().item(), 5)
        3.0
    """
    if restoration is None:
        return grouped_mean(values, size, decision)
    if isinstance(decision, EvenDecision):
        return even_mean(values, size, decision, restoration)
    groups = decision.groups
    wide = torch.promote_types(values.dtype, torch.float32)  # sums over a large group need more digits than halves have
    mass = size.index_select(0, groups.member).to(wide)
    own = torch.zeros_like(mass[: len(groups.hit)]).index_add_(0, groups.group, mass)
    share = mass / own.index_select(0, groups.group)
    parts = values.index_select(0, groups.member) * share[:, None]
    mean = parts.new_zeros(len(own), parts.shape[1]).index_add_(0, groups.group, parts)
    length = torch.zeros_like(own).index_add_(0, groups.group, torch.linalg.vector_norm(parts, dim=1))
    rows, sizes = (part.index_select(0, groups.kept) for part in (values, size))
    rows.index_copy_(0, groups.hit, restoration(mean, length[:, None]).to(rows.dtype))
    return rows, sizes.index_copy_(0, groups.hit, own.to(sizes.dtype))
