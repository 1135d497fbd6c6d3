"""Decisions that take equally many tokens from every image: made where the tokens are, so that nothing waits for the host.

Counts are known beforehand and shapes with them, so a whole model of such decisions can be recorded and replayed as one graph of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hesper.precision import wide

__all__ = ["EvenDecision", "even_mean"]


@dataclass(frozen=True, eq=False)
class EvenDecision:
    """What leaves a batch of ``images`` that have ``tokens`` rows each and lose equally many.

    ``gone`` are the rows that leave, image after image, in any order within one, ``into`` the row each merges into (None for drops), which
    never leaves itself. ``entered`` and ``order`` as in :class:`~hesper.graft.decision.Decision`.

    Example:
        >>> first = EvenDecision(2, 3, torch.tensor([1, 5]), torch.tensor([0, 4]))
        >>> first.staying.tolist(), first.homes.tolist(), first.left
        ([0, 2, 3, 4], [0, 3], (2, 2))
        >>> both = first.then(EvenDecision(2, 2, torch.tensor([0, 3]), torch.tensor([1, 2])))
        >>> both.gone.tolist(), both.into.tolist()
        ([1, 0, 5, 4], [2, 2, 3, 3])
    """

    images: int
    tokens: int
    gone: Tensor
    into: Tensor | None
    entered: tuple[tuple[int, ...], ...] = ()
    order: None = None

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.images * self.tokens

    @property
    def many(self) -> int:
        """Rows of every image that leave."""
        return len(self.gone) // self.images

    @property
    def left(self) -> tuple[int, ...]:
        """Rows of every image that stay."""
        return (self.tokens - self.many,) * self.images

    @property
    def nothing(self) -> bool:
        """Whether nothing leaves."""
        return self.many == 0

    @cached_property
    def _stays(self) -> Tensor:
        return torch.ones(self.rows, dtype=torch.bool, device=self.gone.device).index_fill_(0, self.gone, False)

    @cached_property
    def _rank(self) -> Tensor:
        """``[rows]`` for those that stay, how many before them do."""
        return self._stays.cumsum(0) - 1

    @cached_property
    def staying_and_one(self) -> Tensor:
        """The rows that stay, ascending, and one more, whichever, as a place for what is not wanted."""
        many = self.rows - len(self.gone)
        target = torch.where(self._stays, self._rank, many)
        places = torch.arange(self.rows, device=self.gone.device)
        return places.new_zeros(many + 1).scatter_(0, target, places)

    @property
    def staying(self) -> Tensor:
        """The rows that stay, ascending."""
        return self.staying_and_one[:-1]

    @cached_property
    def homes(self) -> Tensor:
        """Where each row that leaves goes, counted among those that stay; for merges."""
        assert self.into is not None
        return self._rank.index_select(0, self.into)

    @cached_property
    def fate(self) -> Tensor:
        """``[rows]`` the place among the rows that stay of the one that now stands for each row, -1 where it was dropped."""
        lost = torch.full_like(self.gone, -1) if self.into is None else self.homes
        return self._rank.index_copy(0, self.gone, lost)

    @cached_property
    def number(self) -> Tensor:
        """One after the other the rows that leave."""
        return torch.arange(len(self.gone), device=self.gone.device)

    @cached_property
    def leader(self) -> Tensor:
        """For each row that leaves the number of one, the same for all, of those that go where it goes."""
        assert self.into is not None
        # Whichever is written last stays, and all of them read it.
        return self.number.new_empty(self.rows).index_copy_(0, self.into, self.number).index_select(0, self.into)

    def by_count(self) -> EvenDecision:
        """The same: all counts are equal."""
        return self

    def then(self, later: EvenDecision) -> EvenDecision:
        """Both merges as one, where ``later`` was decided on the rows this one leaves."""
        assert self.into is not None and later.into is not None
        gone, into = self.staying.index_select(0, later.gone), self.staying.index_select(0, later.into)
        fate = torch.arange(self.rows, device=gone.device).index_copy_(0, gone, into)
        every, targets = self._beside(self.gone, gone), self._beside(fate.index_select(0, self.into), into)
        return EvenDecision(self.images, self.tokens, every, targets, self.entered + later.entered)

    def _beside(self, first: Tensor, second: Tensor) -> Tensor:
        """Of every image the ``first`` and then the ``second``."""
        return torch.cat([first.view(self.images, -1), second.view(self.images, -1)], 1).flatten()


Restore = Callable[[Tensor, Tensor], Tensor]


def even_mean(values: Tensor, size: Tensor, decision: EvenDecision, restore: Restore | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`~hesper.graft.decision.grouped_mean`: of the rows that leave for one place one gathers the sums of all.

    ``restore`` turns means and the mean lengths of what was averaged into rows, as :class:`~hesper.graft.restoration.Restoration` does.

    Example:
        >>> merge = EvenDecision(1, 3, torch.tensor([1]), torch.tensor([0]))
        >>> mean, size = even_mean(torch.tensor([[1.0], [4.0], [9.0]]), torch.tensor([2.0, 1.0, 1.0]), merge)
        >>> mean.flatten().tolist(), size.tolist()
        ([2.0, 9.0], [3.0, 1.0])
    """
    if decision.nothing:
        return values, size
    assert decision.into is not None
    pairs = torch.cat([decision.into, decision.gone])
    own = wide(values.index_select(0, pairs))  # sums over a large group need more digits than halves have
    mass = size.index_select(0, pairs).to(own.dtype)[:, None]
    length = [] if restore is None else [torch.linalg.vector_norm(own, dim=1, keepdim=True)]
    parts = torch.cat([own, *length, torch.ones_like(mass)], 1) * mass
    home, moved = parts.view(2, len(decision.gone), parts.shape[1]).unbind()
    sums = home.index_add(0, decision.leader, moved)
    total, mean = sums[:, -1], sums[:, :-1] / sums[:, -1:]
    if restore is not None:
        mean = restore(mean[:, :-1], mean[:, -1:])
    # Of several that go to one place their leader writes there, and the others where nobody looks.
    home = torch.where(decision.leader == decision.number, decision.homes, decision.rows - len(decision.gone))
    rows, sizes = (part.index_select(0, decision.staying_and_one) for part in (values, size))
    return rows.index_copy_(0, home, mean.to(rows.dtype))[:-1], sizes.index_copy_(0, home, total.to(sizes.dtype))[:-1]
