"""Letting tokens of a rectangular batch go without scattering: sorted, gathered, and summed by a matrix of zeros and ones.

Runtimes for edge devices refuse scatters, or run them wrongly, and want to know how many tokens leave before they see an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Count", "join", "kept_after", "pick", "ranks", "sort_by"]

Count = int | Tensor
"""How many tokens of every image stay among the candidates: a number, or for one image a scalar tensor that its prices decide."""


def pick(values: Tensor, where: Tensor) -> Tensor:
    """Of ``values`` ``[images, n, ...]`` the places ``where`` ``[images, m]``: ``[images, m, ...]``.

    As one gather of whole rows, since gathering element by element takes an index as large as the values.

    >>> pick(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1], [0]])).flatten().tolist()
    [2.0, 3.0]
    """
    if isinstance(values.shape[0], int) and values.shape[0] == 1:
        return values.index_select(1, where[0])
    first = torch.arange(values.shape[0], device=where.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (where + first).flatten()).unflatten(0, where.shape)


def sort_by(price: Tensor) -> Tensor:
    """Candidates ``[images, n]``, dearest first.

    >>> sort_by(torch.tensor([[3.0, 1.0, 5.0]])).tolist()
    [[2, 0, 1]]
    """
    return price.topk(price.shape[-1], dim=-1).indices


def ascending(places: Tensor) -> Tensor:
    """Whole numbers ``[images, n]`` in order, compared in single precision, which holds each exactly: not every runtime sorts integers."""
    return places.to(torch.float32).topk(places.shape[-1], dim=-1, largest=False).values.to(torch.int64)


def ranks(order: Tensor) -> Tensor:
    """At which place of ``order`` ``[images, n]`` each number stands.

    >>> ranks(torch.tensor([[2, 0, 1]])).tolist()
    [[1, 2, 0]]
    """
    return order.to(torch.float32).topk(order.shape[-1], dim=-1, largest=False).indices


def kept_after(dearest: Tensor, stay: int, first: int, step: int, tokens: int) -> Tensor:
    """Places ``[images, m]``, ascending, of the tokens left when only ``stay`` of the candidates do.

    Candidates are the tokens ``first``, ``first + step``, ... of ``tokens``; all others stay.

    >>> kept_after(torch.tensor([[1, 0]]), 1, first=1, step=2, tokens=4).tolist()
    [[0, 2, 3]]
    """
    staying = dearest.narrow(1, 0, stay) * step + first
    if step > 1:
        others = torch.arange(0, tokens, step, device=dearest.device).expand(dearest.shape[0], -1)
        staying = torch.cat([others, staying], 1)
    return ascending(staying)


def join(values: Tensor, dearest: Tensor, to: Tensor, stay: int, fixed: bool) -> Tensor:
    """``values`` ``[images, n, ...]`` with those of odd tokens that go added to where they go, without those that went.

    Args:
        values: sums, such as sizes and rows times sizes, so that joining is adding.
        dearest: odd tokens, dearest first, ``[images, n // 2]``.
        to: the even token each odd one would join, counted in tokens, ``[images, n // 2]``.
        stay: how many odd tokens stay.
        fixed: whether ``stay`` is known beforehand; then only those that go are multiplied.

    Example:
        >>> values = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> join(values, torch.tensor([[1, 0]]), torch.tensor([[2, 2]]), 1, True).flatten().tolist()
        [1.0, 6.0, 8.0]
    """
    even, odd = values[:, ::2], values[:, 1::2]
    homes = torch.arange(even.shape[1], device=values.device)[:, None]
    if fixed:
        gone = dearest[:, stay:]
        target, moved = torch.gather(to, 1, gone), pick(odd, gone)
        arrives = (target // 2)[:, None] == homes
    else:
        arrives, moved = ((to // 2)[:, None] == homes) & (ranks(dearest) >= stay)[:, None], odd
    even = even + arrives.to(values.dtype) @ moved
    places = kept_after(dearest, stay, 1, 2, values.shape[1])
    where = torch.where(places % 2 == 0, places // 2, places // 2 + even.shape[1])
    return pick(torch.cat([even, odd], 1), where)
