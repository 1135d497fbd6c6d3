"""Letting tokens of a rectangular batch go without scattering: sorted, gathered, and summed by a matrix of zeros and ones.

Runtimes for edge devices refuse scatters, or run them wrongly, and want to know how many tokens leave before they see an image. And each
operator costs them a few microseconds however little it does, so there are few here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["WardPrices", "and_one", "ascending", "dearest_first", "fates", "gathering", "pick", "ranks", "stayers"]


def pick(values: Tensor, where: Tensor) -> Tensor:
    """Of ``values`` ``[images, n, ...]`` the places ``where`` ``[images, m]``: ``[images, m, ...]``.

    As one gather of whole rows, since gathering element by element takes an index as large as the values.

    >>> pick(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1], [0]])).flatten().tolist()
    [2.0, 3.0]
    """
    if values.dim() == 2:
        return values.gather(1, where)
    if isinstance(values.shape[0], int) and values.shape[0] == 1:
        return values.index_select(1, where[0])
    first = torch.arange(values.shape[0], device=where.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (where + first).flatten()).view(*where.shape, *values.shape[2:])


def dearest_first(price: Tensor) -> Tensor:
    """Candidates ``[images, n]`` in order of price, the dearest first.

    >>> dearest_first(torch.tensor([[3.0, 1.0, 5.0]])).tolist()
    [[2, 0, 1]]
    """
    return price.topk(price.shape[-1], dim=-1).indices


def ascending(places: Tensor) -> Tensor:
    """Whole numbers ``[images, n]`` in order, compared in single precision, which holds each exactly: not every runtime sorts integers.

    >>> ascending(torch.tensor([[4, 0, 2]])).tolist()
    [[0, 2, 4]]
    """
    return places.to(torch.float32).topk(places.shape[-1], dim=-1, largest=False).values.to(torch.int64)


def ranks(order: Tensor) -> Tensor:
    """At which place of ``order`` ``[images, n]`` each number stands.

    >>> ranks(torch.tensor([[2, 0, 1]])).tolist()
    [[1, 2, 0]]
    """
    return order.to(torch.float32).topk(order.shape[-1], dim=-1, largest=False).indices


class WardPrices(nn.Module):
    """As :func:`hesper.graft.tokens.ward_prices`, of tokens that are all there, in few operators.

    What a token brings into a pair are its traits: its point y, log w, |y|^2, w / s and 1 / s (w alone where no sizes differ), and one.
    Squared distances and the sums of w / s and of 1 / s over both are bilinear in the traits of the odd and the even token, so that each
    is a product of matrices, with a matrix of constants between them.

    Args:
        rank: of the points.

    Example:
        >>> prices, y = WardPrices(1), torch.tensor([[[0.0], [0.1], [9.0], [5.0]]])
        >>> prices(prices.traits(y, torch.zeros(1, 4, 1), None))[1].tolist()
        [[0, 1]]
    """

    alike_distance: Tensor
    alike_ratio: Tensor
    sized_distance: Tensor
    sized_ratio: Tensor
    sized_inverse: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        norm, ratio, inverse = rank + 1, rank + 2, rank + 3
        for name, one, factor in (("alike", rank + 3, 0.25), ("sized", rank + 4, 1.0)):
            distance = torch.zeros(one + 1, one + 1)
            distance[range(rank), range(rank)] = -2.0
            distance[norm, one] = distance[one, norm] = 1.0
            self.register_buffer(f"{name}_distance", distance, persistent=False)
            self.register_buffer(f"{name}_ratio", _both(ratio, one, factor), persistent=False)
        self.register_buffer("sized_inverse", _both(inverse, one, 1.0), persistent=False)

    def traits(self, points: Tensor, log_weight: Tensor, size: Tensor | None) -> Tensor:
        """``[images, n, traits]`` from ``[images, n, rank]`` and twice ``[images, n, 1]``; without sizes where each is one."""
        weight = log_weight.exp()
        if size is not None:
            weight = and_one(weight) / size
        return and_one(torch.cat([points, log_weight, points.square().sum(-1, keepdim=True), weight], -1))

    def forward(self, traits: Tensor, prefix: int = 0) -> tuple[Tensor, Tensor]:
        """Prices of all odd tokens ``[images, odd]`` after ``prefix`` others, and the place among the even ones of where each would go."""
        odd, even = traits[:, prefix + 1 :: 2], traits[:, prefix::2]

        def paired(constants: Tensor) -> Tensor:
            return odd @ (even @ constants.to(even.dtype)).transpose(-2, -1)

        if traits.shape[-1] == len(self.alike_ratio):
            cost = paired(self.alike_distance) * paired(self.alike_ratio)
        else:
            inverse = paired(self.sized_inverse)
            cost = paired(self.sized_distance) * paired(self.sized_ratio) / (inverse * inverse)
        price, to = cost.min(-1)
        return price.clamp_min(0), to

    def merged(self, traits: Tensor, size: Tensor | None, gathering: Tensor) -> tuple[Tensor, Tensor]:
        """Traits and sizes ``[images, left, 1]`` of what a ``gathering`` leaves: every group at its mean, its weight the geometric mean."""
        sums = gathering @ (traits if size is None else traits * size)
        size = sums[..., -1:]
        means = sums[..., : self.rank + 1] / size
        return self.traits(means[..., : self.rank], means[..., self.rank :], size), size


def _both(trait: int, one: int, factor: float) -> Tensor:
    """What makes ``factor`` times the sum of a trait over both tokens of a pair."""
    constants = torch.zeros(one + 1, one + 1)
    constants[trait, one] = constants[one, trait] = factor
    return constants


def and_one(columns: Tensor) -> Tensor:
    """``columns`` ``[..., c]`` and one more, of ones."""
    return nn.functional.pad(columns, (0, 1), value=1.0)


def fates(dearest: Tensor, to: Tensor, stay: int, tokens: int, prefix: int = 0) -> Tensor:
    """For each of ``tokens`` the place among those left of the one that stands for it, as whole numbers of floating point.

    Args:
        dearest: odd tokens, dearest first, ``[images, odd]``, as :func:`dearest_first` gives them.
        to: the place among the even tokens of the one each odd one would join, likewise.
        stay: how many odd tokens stay.
        tokens: in all, with the ``prefix`` that comes before those that are counted and stays as it is.

    Example:
        >>> fates(torch.tensor([[1, 0]]), torch.tensor([[1, 1]]), 1, 4).tolist()
        [[0.0, 1.0, 1.0, 2.0]]
    """
    order, first = _evens_first(tokens, prefix, dearest.device), tokens - dearest.shape[1]
    stays = ranks(dearest) < stay
    # As many as come before it, if it stays: what is even all, what is odd as far as it stays.
    before = (order[first:, None] < order).to(torch.float32)
    evens = torch.arange(first, device=dearest.device)
    place = stays.to(torch.float32) @ before + torch.cat([evens, evens[prefix : prefix + dearest.shape[1]] + 1])
    home, own = place[:, :first], place[:, first:]
    fate = torch.cat([home, torch.where(stays, own, home.gather(1, to + prefix))], 1)
    return fate.index_select(1, order.topk(tokens, largest=False).indices)


def stayers(dearest: Tensor, stay: int, tokens: int, prefix: int = 0) -> Tensor:
    """Where the tokens that are left stood, ``[images, left]``; arguments as of :func:`fates`.

    >>> stayers(torch.tensor([[1, 0]]), 1, 4).tolist()
    [[0, 2, 3]]
    """
    every = torch.arange(tokens, device=dearest.device)
    always = torch.cat([every[:prefix], every[prefix::2]]).expand(dearest.shape[0], -1)
    return ascending(torch.cat([always, dearest.narrow(1, 0, stay) * 2 + (prefix + 1)], 1))


def gathering(fate: Tensor, left: int) -> Tensor:
    """The matrix of zeros and ones ``[images, left, tokens]`` that adds up what shares a fate.

    >>> gathering(torch.tensor([[0.0, 1.0, 1.0]]), 2).tolist()
    [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]]
    """
    return (fate[:, None] == torch.arange(left, device=fate.device)[:, None]).to(torch.float32)


def _evens_first(tokens: int, prefix: int, device: torch.device) -> Tensor:
    """Places ``[tokens]``: the prefix, what is even after it, what is odd."""
    every = torch.arange(tokens, device=device).to(torch.float32)
    return torch.cat([every[:prefix], every[prefix::2], every[prefix + 1 :: 2]])
