"""What a decider decides: which rows leave, where they go, and how one decision follows another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decision:
    """What leaves a stream of ``rows`` packed rows.

    ``gone`` ``[m]`` are the rows that leave, in ascending order, ``into`` ``[m]`` the row each merges into (None for drops), which
    never leaves itself; ``left`` counts the tokens of every image that stay. ``entered`` holds, for each round of matching, how many
    tokens of every image took part.

    Example:
        >>> first = Decision(6, torch.tensor([1, 3]), torch.tensor([2, 2]), (4,))
        >>> first.kept.tolist(), first.to.tolist()
        ([0, 2, 4, 5], [1, 1])
        >>> both = first.then(Decision(4, torch.tensor([1]), torch.tensor([2]), (3,)))
        >>> both.gone.tolist(), both.into.tolist()
        ([1, 2, 3], [4, 4, 4])
    """

    rows: int
    gone: Tensor
    into: Tensor | None
    left: tuple[int, ...]
    entered: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def kept(self) -> Tensor:
        """``[rows - m]`` the rows that stay, in ascending order."""
        stays = torch.ones(self.rows, dtype=torch.bool, device=self.gone.device)
        return stays.index_fill_(0, self.gone, False).nonzero()[:, 0]

    @cached_property
    def to(self) -> Tensor:
        """``[m]`` where each row that leaves goes, counted among those that stay; for merges."""
        assert self.into is not None
        return self.into - torch.searchsorted(self.gone, self.into)

    def then(self, later: Decision) -> Decision:
        """Both merges as one, where ``later`` was decided on the rows this one leaves."""
        if not len(later.gone):
            return Decision(self.rows, self.gone, self.into, self.left, self.entered + later.entered)
        assert self.into is not None and later.into is not None
        gone, into = self.kept[later.gone], self.kept[later.into]
        fate = torch.arange(self.rows, device=gone.device).index_copy_(0, gone, into)
        every, order = torch.cat([self.gone, gone]).sort()
        target = torch.cat([fate[self.into], into])[order]
        return Decision(self.rows, every, target, later.left, self.entered + later.entered)


def grouped_mean(values: Tensor, size: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
    """Size-weighted means of ``values`` ``[rows, ...]`` over what merges, and the summed sizes ``[rows]``, for the rows that stay.

    A destination of total size T that receives sources s becomes x_d + sum_s size_s (x_s - x_d) / T.

    Example:
        >>> merge = Decision(3, torch.tensor([1]), torch.tensor([0]), (2,))
        >>> mean, size = grouped_mean(torch.tensor([[1.0], [4.0], [9.0]]), torch.tensor([2.0, 1.0, 1.0]), merge)
        >>> mean.flatten().tolist(), size.tolist()
        ([2.0, 9.0], [3.0, 1.0])
    """
    assert decision.into is not None
    moved = size.index_select(0, decision.gone)
    total = size.index_select(0, decision.kept).index_add_(0, decision.to, moved)
    shift = values.index_select(0, decision.gone).sub_(values.index_select(0, decision.into))
    mean = values.index_select(0, decision.kept)
    return mean.index_add_(0, decision.to, shift.mul_((moved / total.index_select(0, decision.to))[:, None])), total
