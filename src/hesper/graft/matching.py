"""Letting tokens of a rectangular batch go without scattering: sorted, gathered, and summed by a matrix of zeros and ones.

Runtimes for edge devices refuse scatters, or run them wrongly, and want to know how many tokens leave before they see an image. And each
operator costs them a few microseconds however little it does, so there are few here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ascending", "dearest_first", "join", "pick", "ranks", "ward_prices_lean"]


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


def ward_prices_lean(points: Tensor, size: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`hesper.graft.tokens.ward_prices`, of tokens that are all there, in few operators.

    Args:
        points: ``[images, tokens, rank]``.
        size: ``[images, tokens]``; None where each is one.
        weight: ``[images, tokens]``.

    Example:
        >>> y, one = torch.tensor([[[0.0], [0.1], [9.0], [5.0]]]), torch.ones(1, 4)
        >>> ward_prices_lean(y, None, one)[1].tolist(), ward_prices_lean(y, one, one)[1].tolist()
        ([[0, 2]], [[0, 2]])
    """
    norm = points.square().sum(-1, keepdim=True)
    one = torch.ones_like(norm)
    left, right = torch.cat([points, norm, one], -1), torch.cat([points * -2, one, norm], -1)
    cost = left[:, 1::2] @ right[:, ::2].transpose(-2, -1)
    if size is None:
        cost = cost * (weight[:, 1::2, None] + weight[:, None, ::2]) * 0.25
    else:
        both = torch.stack([weight, torch.ones_like(size)], 1) / size[:, None]
        ratio, inverse = (both[:, :, 1::2, None] + both[:, :, None, ::2]).unbind(1)
        cost = cost * ratio / (inverse * inverse)
    price, to = cost.min(-1)
    return price.clamp_min(0), to * 2


def join(values: Tensor, dearest: Tensor, to: Tensor, stay: int, fixed: bool, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """``values`` ``[images, n, ...]`` with those of odd tokens that go added to where they go, without those that went; and what is left.

    Args:
        values: sums, such as sizes and rows times sizes, so that joining is adding.
        dearest: odd tokens, dearest first, ``[images, (n - prefix) // 2]``.
        to: the even token each odd one would join, counted in tokens, likewise.
        stay: how many odd tokens stay.
        fixed: whether ``stay`` is known beforehand; then only those that go are multiplied.
        prefix: how many rows come before the tokens that are counted, and stay as they are.

    Example:
        >>> values = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> [part.flatten().tolist() for part in join(values, torch.tensor([[1, 0]]), torch.tensor([[2, 2]]), 1, True)]
        [[1.0, 6.0, 8.0], [0, 2, 3]]
    """
    rows = values.shape[1]
    every = torch.arange(rows, device=values.device)
    places, homes = dearest * 2 + (prefix + 1), to + prefix
    if fixed:
        arrives, moved = pick(homes, dearest[:, stay:])[:, None] == every[:, None], pick(values, places[:, stay:])
    else:
        arrives = (homes[:, None] == every[:, None]) & (ranks(dearest) >= stay)[:, None]
        moved = values[:, prefix + 1 :: 2]
    always = torch.cat([every[:prefix], every[prefix::2]]).expand(dearest.shape[0], -1)
    left = ascending(torch.cat([always, places.narrow(1, 0, stay)], 1))
    return pick(values + arrives.to(values.dtype) @ moved, left), left
