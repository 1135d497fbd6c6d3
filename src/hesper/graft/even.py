"""Decisions that take equally many tokens from every image: made where the tokens are, so that nothing waits for the host.

Counts are known beforehand and shapes with them, so a whole model of such decisions can be captured as one graph of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hesper.graft.restoration import Restoration

__all__ = ["EvenDecision", "even_mean", "even_restored_mean"]


@dataclass(frozen=True, eq=False)
class EvenDecision:
    """What leaves a batch in which every image has ``tokens`` rows and loses equally many.

    ``gone`` ``[images, m]`` are the places, among its image's rows, of those that leave, in any order, ``into`` likewise the place of the
    row each merges into (None for drops), which never leaves itself. ``entered`` as in :class:`~hesper.graft.decision.Decision`.

    Example:
        >>> first = EvenDecision(3, torch.tensor([[1], [2]]), torch.tensor([[0], [1]]))
        >>> first.kept.tolist(), first.to.tolist(), first.left
        ([[0, 2], [0, 1]], [[0], [1]], (2, 2))
        >>> both = first.then(EvenDecision(2, torch.tensor([[0], [1]]), torch.tensor([[1], [0]])))
        >>> both.gone.tolist(), both.into.tolist()
        ([[1, 0], [2, 1]], [[2, 2], [0, 0]])
    """

    tokens: int
    gone: Tensor
    into: Tensor | None
    entered: tuple[tuple[int, ...], ...] = ()
    order: None = None

    @property
    def images(self) -> int:
        """How many."""
        return self.gone.shape[0]

    @property
    def stay(self) -> int:
        """How many rows every image keeps."""
        return self.tokens - self.gone.shape[1]

    @property
    def left(self) -> tuple[int, ...]:
        """Rows of every image that stay."""
        return (self.stay,) * self.images

    @property
    def nothing(self) -> bool:
        """Whether nothing leaves."""
        return self.gone.shape[1] == 0

    @cached_property
    def _stays(self) -> Tensor:
        return torch.ones(self.images, self.tokens, dtype=torch.bool, device=self.gone.device).scatter_(1, self.gone, False)

    @cached_property
    def _rank(self) -> Tensor:
        """``[images, tokens]`` for rows that stay, how many before them do."""
        return self._stays.cumsum(1) - 1

    @cached_property
    def kept(self) -> Tensor:
        """``[images, stay]`` places of the rows that stay, ascending."""
        places = torch.arange(self.tokens, device=self.gone.device).expand(self.images, -1)
        target = torch.where(self._stays, self._rank, self.stay)  # what leaves goes to one place too many
        return places.new_empty(self.images, self.stay + 1).scatter_(1, target, places)[:, : self.stay]

    @cached_property
    def to(self) -> Tensor:
        """``[images, m]`` where each row that leaves goes, counted among those of its image that stay; for merges."""
        assert self.into is not None
        return self._rank.gather(1, self.into)

    @cached_property
    def alike(self) -> Tensor:
        """``[images, m, m]`` which rows that leave go to the same one."""
        assert self.into is not None
        return self.into[:, :, None] == self.into[:, None, :]

    def _packed(self, places: Tensor, tokens: int) -> Tensor:
        """Places in images of so many ``tokens`` as rows of all images together."""
        return (places + torch.arange(0, self.images * tokens, tokens, device=places.device)[:, None]).flatten()

    @cached_property
    def staying(self) -> Tensor:
        """``[rows]`` of all images together, those that stay."""
        return self._packed(self.kept, self.tokens)

    @cached_property
    def leaving(self) -> Tensor:
        """``[images * m]`` of all images together, those that leave."""
        return self._packed(self.gone, self.tokens)

    @cached_property
    def joined(self) -> Tensor:
        """``[images * m]`` the row that each joins."""
        assert self.into is not None
        return self._packed(self.into, self.tokens)

    @cached_property
    def homes(self) -> Tensor:
        """``[images * m]`` the same, counted among those that stay."""
        return self._packed(self.to, self.stay)

    @cached_property
    def fate(self) -> Tensor:
        """``[rows]`` the place among the rows that stay of the one that now stands for each row, -1 where it was dropped."""
        shift = torch.arange(0, self.images * self.stay, self.stay, device=self.gone.device)[:, None]
        own = self._rank + shift
        lost = torch.full_like(self.gone, -1) if self.into is None else self.to + shift
        return own.scatter(1, self.gone, lost).flatten()

    def by_count(self) -> EvenDecision:
        """The same: all counts are equal."""
        return self

    def then(self, later: EvenDecision) -> EvenDecision:
        """Both merges as one, where ``later`` was decided on the rows this one leaves."""
        assert self.into is not None and later.into is not None
        gone, into = self.kept.gather(1, later.gone), self.kept.gather(1, later.into)
        fate = torch.arange(self.tokens, device=gone.device).repeat(self.images, 1).scatter_(1, gone, into)
        both = torch.cat([self.gone, gone], 1), torch.cat([fate.gather(1, self.into), into], 1)
        return EvenDecision(self.tokens, *both, self.entered + later.entered)


def even_mean(values: Tensor, size: Tensor, decision: EvenDecision) -> tuple[Tensor, Tensor]:
    """As :func:`~hesper.graft.decision.grouped_mean`: every row that leaves works out the mean of all that go where it goes.

    Example:
        >>> merge = EvenDecision(3, torch.tensor([[1]]), torch.tensor([[0]]))
        >>> mean, size = even_mean(torch.tensor([[1.0], [4.0], [9.0]]), torch.tensor([2.0, 1.0, 1.0]), merge)
        >>> mean.flatten().tolist(), size.tolist()
        ([2.0, 9.0], [3.0, 1.0])
    """
    _, mass, total = _masses(size, decision)
    home, moved = _pairs(values, decision)
    shift = torch.bmm(decision.alike.to(moved.dtype) * mass[:, None].to(moved.dtype), moved - home)
    return _carried(values, size, home + shift / total[..., None].to(shift.dtype), total, decision)


def even_restored_mean(values: Tensor, size: Tensor, decision: EvenDecision, restoration: Restoration) -> tuple[Tensor, Tensor]:
    """As :func:`~hesper.graft.restoration.restored_mean`.

    Example:
        >>> from hesper.graft.restoration import Restoration
        >>> merge = EvenDecision(2, torch.tensor([[1]]), torch.tensor([[0]]))
        >>> x, one = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.ones(2)
        >>> round(even_restored_mean(x, one, merge, Restoration(2))[0].norm().item(), 5)
        3.0
    """
    own, mass, total = _masses(size, decision)
    wide = torch.promote_types(values.dtype, torch.float32)  # sums over a large group need more digits than halves have
    home, moved = (part.to(wide) for part in _pairs(values, decision))
    parts = torch.cat([moved, torch.linalg.vector_norm(moved, dim=-1, keepdim=True)], -1)
    first = torch.cat([home, torch.linalg.vector_norm(home, dim=-1, keepdim=True)], -1)
    share = decision.alike.to(wide) * (mass / total)[:, None].to(wide)
    mean = torch.baddbmm(first * (own / total)[..., None].to(wide), share, parts)
    return _carried(values, size, restoration(mean[..., :-1], mean[..., -1:]), total, decision)


def _by_one(mean: Tensor, decision: EvenDecision) -> Tensor:
    """The same, with gradients through one of the rows alone that go to one place: each would be given all of them."""
    if not (torch.is_grad_enabled() and mean.requires_grad):
        return mean
    one = decision.alike.to(torch.uint8).argmax(-1) == torch.arange(mean.shape[1], device=mean.device)
    return torch.where(one[..., None], mean, mean.detach())


def _masses(size: Tensor, decision: EvenDecision) -> tuple[Tensor, Tensor, Tensor]:
    """For each row that leaves ``[images, m]``: the size of the row it joins, its own, and that of all that end there."""
    own, mass = (size.index_select(0, where).view_as(decision.gone) for where in (decision.joined, decision.leaving))
    total = own + torch.bmm(decision.alike.to(mass.dtype), mass[..., None])[..., 0]
    return own, mass, total


def _pairs(values: Tensor, decision: EvenDecision) -> tuple[Tensor, Tensor]:
    """``[images, m, ...]`` of each row that leaves the one it joins, and itself."""
    shape = (*decision.gone.shape, *values.shape[1:])
    return values.index_select(0, decision.joined).view(shape), values.index_select(0, decision.leaving).view(shape)


def _carried(values: Tensor, size: Tensor, mean: Tensor, total: Tensor, decision: EvenDecision) -> tuple[Tensor, Tensor]:
    """The rows that stay, and their sizes; rows that went to one place wrote the same there."""
    rows, sizes = (part.index_select(0, decision.staying) for part in (values, size))
    rows = rows.index_copy_(0, decision.homes, _by_one(mean, decision).flatten(0, 1).to(rows.dtype))
    return rows, sizes.index_copy_(0, decision.homes, total.flatten().to(sizes.dtype))
