"""Letting tokens of a rectangular batch go without scattering: sorted, gathered, and summed by a matrix of zeros and ones.

Runtimes for edge devices refuse scatters, or run them wrongly, and want to know how many tokens leave before they see an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join", "kept_after", "pick", "ranks", "sort_by"]


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


def kept_after(dearest: Tensor, stay: int) -> Tensor:
    """Places ``[images, stay]``, ascending, of the candidates that stay: the ``stay`` dearest.

    >>> kept_after(torch.tensor([[2, 0, 1]]), 2).tolist()
    [[0, 2]]
    """
    return ascending(dearest.narrow(1, 0, stay))


def alternate_after(dearest: Tensor, stay: int, even: int) -> tuple[Tensor, Tensor]:
    """Which tokens are left, in order, when of the odd ones only the ``stay`` dearest do: their places, and where they are in
    ``cat([even tokens, odd tokens])``; ``[images, even + stay]`` each.

    >>> [part.tolist() for part in alternate_after(torch.tensor([[1, 0]]), 1, 2)]
    [[[0, 2, 3]], [[0, 1, 3]]]
    """
    first = torch.arange(even, device=dearest.device).expand(dearest.shape[0], -1)
    staying = dearest.narrow(1, 0, stay)
    places = torch.cat([first * 2, staying * 2 + 1], 1)
    order = places.to(torch.float32).topk(places.shape[-1], dim=-1, largest=False).indices
    return pick(places, order), pick(torch.cat([first, staying + even], 1), order)


def join(values: Tensor, dearest: Tensor, to: Tensor, stay: int, fixed: bool) -> tuple[Tensor, Tensor]:
    """``values`` ``[images, n, ...]`` with those of odd tokens that go added to where they go, without those that went; and what is left.

    Args:
        values: sums, such as sizes and rows times sizes, so that joining is adding.
        dearest: odd tokens, dearest first, ``[images, n // 2]``.
        to: the even token each odd one would join, counted in tokens, ``[images, n // 2]``.
        stay: how many odd tokens stay.
        fixed: whether ``stay`` is known beforehand; then only those that go are multiplied.

    Example:
        >>> values = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> [part.flatten().tolist() for part in join(values, torch.tensor([[1, 0]]), torch.tensor([[2, 2]]), 1, True)]
        [[1.0, 6.0, 8.0], [0, 2, 3]]
    """
    even, odd = values[:, ::2], values[:, 1::2]
    homes = torch.arange(even.shape[1], device=values.device)[:, None] * 2
    if fixed:
        gone = dearest[:, stay:]
        arrives, moved = pick(to, gone)[:, None] == homes, pick(odd, gone)
    else:
        arrives, moved = (to[:, None] == homes) & (ranks(dearest) >= stay)[:, None], odd
    even = even + arrives.to(values.dtype) @ moved
    places, where = alternate_after(dearest, stay, even.shape[1])
    return pick(torch.cat([even, odd], 1), where), places
