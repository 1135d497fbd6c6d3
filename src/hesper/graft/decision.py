"""What a decider decides: which rows leave, where they go, and how one decision follows another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesper.graft.even import EvenDecision, even_mean

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Decision:
    """What leaves a stream of ``rows`` packed rows.

    ``gone`` ``[m]`` are the rows that leave, in ascending order, ``into`` ``[m]`` the row each merges into (None for drops), which
    never leaves itself; ``left`` counts the tokens of every image that stay. ``entered`` holds, for each round of matching, how many
    tokens of every image took part. ``device`` is where the rows are; the decision itself is kept on the host, where a few hundred
    numbers are sorted out sooner than an operator starts. ``order`` is how the images lie afterwards, None where as before.

    Example:
        >>> first = Decision(6, np.array([1, 3]), np.array([2, 2]), (4,))
        >>> first.kept.tolist(), first.to.tolist()
        ([0, 2, 4, 5], [1, 1])
        >>> both = first.then(Decision(4, np.array([1]), np.array([2]), (3,)))
        >>> both.gone.tolist(), both.into.tolist()
        ([1, 2, 3], [4, 4, 4])
    """

    rows: int
    gone: Rows
    into: Rows | None
    left: tuple[int, ...]
    entered: tuple[tuple[int, ...], ...] = ()
    device: torch.device | None = None
    order: Sequence[int] | None = None

    @property
    def nothing(self) -> bool:
        """Whether nothing leaves."""
        return not len(self.gone)

    @cached_property
    def fate(self) -> Tensor:
        """``[rows]`` the place among the rows that stay of the one that now stands for each row, -1 where it was dropped."""
        where = np.full(self.rows, -1)
        where[self.kept] = np.arange(len(self.kept))
        if self.into is not None:
            where[self.gone] = self.to
        return _held([where], self.device)[0]

    @cached_property
    def _stays(self) -> npt.NDArray[np.bool_]:
        stays = np.ones(self.rows, dtype=bool)
        stays[self.gone] = False
        return stays

    @cached_property
    def kept(self) -> Rows:
        """``[rows - m]`` the rows that stay, image after image in their new order, ascending in each."""
        rows: Rows = self._stays.nonzero()[0]
        if self.order is None:
            return rows
        ends = np.cumsum(self.left)
        return np.concatenate([rows[ends[image] - self.left[image] : ends[image]] for image in self.order])

    @cached_property
    def to(self) -> Rows:
        """``[m]`` where each row that leaves goes, counted among those that stay; for merges."""
        assert self.into is not None
        where = np.empty(self.rows, dtype=np.int64)
        where[self.kept] = np.arange(len(self.kept))
        return where[self.into]

    @cached_property
    def staying(self) -> Tensor:
        """:attr:`kept` where the rows are."""
        return _held([self.kept], self.device)[0] if self.into is None else self.moves.kept

    @cached_property
    def moves(self) -> Moves:
        """The merge where the rows are."""
        assert self.into is not None
        return Moves(*_held([self.gone, self.into, self.to, self.kept], self.device))

    @cached_property
    def groups(self) -> Groups:
        """What merges with what, where the rows are."""
        hit = np.zeros(len(self.kept), dtype=bool)
        hit[self.to] = True
        homes = hit.nonzero()[0]
        member = np.concatenate([self.kept[homes], self.gone])
        group = np.concatenate([np.arange(len(homes)), np.cumsum(hit)[self.to] - 1])
        return Groups(*_held([homes, member, group, self.kept], self.device))

    def by_count(self) -> Decision:
        """The same, with images of fewer tokens before those of more, so that those of equal counts lie side by side.

        >>> Decision(5, np.array([1]), np.array([0]), (3, 1)).by_count().kept.tolist()
        [4, 0, 2, 3]
        """
        order = sorted(range(len(self.left)), key=self.left.__getitem__)
        return self if order == list(range(len(order))) else replace(self, order=order)

    def then(self, later: Decision) -> Decision:
        """Both merges as one, where ``later`` was decided on the rows this one leaves."""
        assert self.order is None  # ``later`` speaks of the rows in the order in which they are left
        gone, into = self.gone, self.into
        if len(later.gone):
            assert into is not None and later.into is not None
            fate = np.arange(self.rows)
            fate[self.kept[later.gone]] = self.kept[later.into]
            fate[gone] = fate[into]
            gone = (fate != np.arange(self.rows)).nonzero()[0]
            into = fate[gone]
        return Decision(self.rows, gone, into, later.left, self.entered + later.entered, self.device)


@dataclass(frozen=True, eq=False)
class Moves:
    """A merge as indices on the device: the decision's ``gone``, ``into``, ``to`` and ``kept``."""

    gone: Tensor
    into: Tensor
    to: Tensor
    kept: Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """A merge as groups: ``hit`` are those of the ``kept`` that receive something, ``member`` the rows that merge, destinations first.

    ``group`` says for each member into which of ``hit`` it goes.
    """

    hit: Tensor
    member: Tensor
    group: Tensor
    kept: Tensor


def _held(parts: list[Rows], device: torch.device | None) -> list[Tensor]:
    """Host numbers as tensors on ``device``."""
    if device is None or device.type == "cpu":
        return [torch.from_numpy(part) for part in parts]
    # One copy carries everything: on an accelerator each waits in a queue of its own.
    whole = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    return list(torch.split(whole, [len(part) for part in parts]))


def grouped_mean(values: Tensor, size: Tensor, decision: Decision | EvenDecision) -> tuple[Tensor, Tensor]:
    """Size-weighted means of ``values`` ``[rows, ...]`` over what merges, and the summed sizes ``[rows]``, for the rows that stay.

    A destination of total size T that receives sources s becomes x_d + sum_s size_s (x_s - x_d) / T.

    Example:
        >>> merge = Decision(3, np.array([1]), np.array([0]), (2,))
        >>> mean, size = grouped_mean(torch.tensor([[1.0], [4.0], [9.0]]), torch.tensor([2.0, 1.0, 1.0]), merge)
        >>> mean.flatten().tolist(), size.tolist()
        ([2.0, 9.0], [3.0, 1.0])
    """
    if isinstance(decision, EvenDecision):
        return even_mean(values, size, decision)
    moves = decision.moves
    moved = size.index_select(0, moves.gone)
    total = size.index_select(0, moves.kept).index_add_(0, moves.to, moved)
    shift = values.index_select(0, moves.gone).sub_(values.index_select(0, moves.into))
    mean = values.index_select(0, moves.kept)
    return mean.index_add_(0, moves.to, shift.mul_((moved / total.index_select(0, moves.to))[:, None])), total
