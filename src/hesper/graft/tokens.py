"""Pure arithmetic on token sets: price pairs, and select among them. Knows no host and no plan.

Tensors are ``[images, tokens, ...]`` of patch tokens only; ``gaps`` marks places without a token, so that images
with different counts can be decided together.
"""

from __future__ import annotations

import torch
from torch import Tensor

INFINITY = float("inf")


def ward_prices(points: Tensor, size: Tensor, weight: Tensor, gaps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prices of merging each odd token into its cheapest even token, by Ward's linkage with token curvatures.

    With sizes s, curvatures w and displacement towards the size-weighted mean, a merge of i and j costs

        s_i w_i |delta_i|^2 + s_j w_j |delta_j|^2 = |y_i - y_j|^2 s_i s_j (w_i s_j + w_j s_i) / (s_i + s_j)^2

    where y are the tokens in coordinates in which the curvature metric is the identity. Alternate tokens are sources
    (odd) and destinations (even), as in bipartite soft matching (ToMe, arXiv 2210.09461, section 3), so that no
    destination ever moves. Ward (1963), "Hierarchical grouping to optimize an objective function".

    Args:
        points: ``[images, tokens, rank]``.
        size: ``[images, tokens]``, how many original tokens each stands for.
        weight: ``[images, tokens]``, token curvature relative to the metric.
        gaps: ``[images, tokens]`` bool, where there is no token; None where there is one everywhere.

    Returns:
        Prices ``[images, sources]`` (infinite where source or every destination is missing; there they have no gradient) and the
        index of the destination, counted in tokens, of the same shape.

    Example:
        >>> y = torch.tensor([[[0.0], [0.1], [9.0], [5.0]]])
        >>> one = torch.ones(1, 4)
        >>> price, to = ward_prices(y, one, one)
        >>> to.tolist()
        [[0, 2]]
    """
    # Dividing by sizes first leaves few passes over the pairs: |y_i - y_j|^2 (w_i / s_i + w_j / s_j) / (1 / s_i + 1 / s_j)^2.
    inverse = size.reciprocal()
    ratio = (weight * inverse).clamp_min(torch.finfo(weight.dtype).tiny)  # the infinity of a gap times zero is no price
    cost = alternate_distances(points, gaps)
    cost = cost.mul_(ratio[:, 1::2, None] + ratio[:, None, ::2]).div_((inverse[:, 1::2, None] + inverse[:, None, ::2]).square_())
    price, to = cost.min(-1)
    return _present(price.clamp_min_(0), gaps), to * 2


def similarity_prices(points: Tensor, gaps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One minus the cosine of each odd token to its most similar even token (ToMe, arXiv 2210.09461, section 3.1).

    Returns:
        Prices ``[images, sources]`` and destinations, as :func:`ward_prices`.

    Example:
        >>> y = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
        >>> price, to = similarity_prices(y)
        >>> price.tolist(), to.tolist()
        ([[0.0]], [[2]])
    """
    cost = alternate_unlikeness(points)
    price, to = (cost if gaps is None else cost.masked_fill_(gaps[:, None, ::2], INFINITY)).min(-1)
    return _present(price, gaps), to * 2


def alternate_unlikeness(points: Tensor) -> Tensor:
    """One minus the cosine of odd to even rows, ``[images, odd, even]``."""
    unit = torch.nn.functional.normalize(points, dim=-1)
    return 1 - unit[:, 1::2] @ unit[:, ::2].transpose(-2, -1)


def _present(price: Tensor, gaps: Tensor | None) -> Tensor:
    """Prices of sources ``[images, sources]``, infinite where there is none."""
    return price if gaps is None else price.masked_fill(gaps[:, 1::2], INFINITY)


def alternate_distances(points: Tensor, gaps: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances ``[images, odd, even]`` of odd to even rows, infinite to gaps.

    |x - y|^2 = (x, |x|^2, 1) . (-2 y, 1, |y|^2), so that one matrix product is all that is done with pairs; rounding may leave it
    just below zero.
    """
    norm = points.square().sum(-1, keepdim=True)
    far = norm if gaps is None else norm.masked_fill(gaps[..., None], INFINITY)
    one = torch.ones_like(norm)
    odd = torch.cat([points[:, 1::2], norm[:, 1::2], one[:, 1::2]], -1)
    even = torch.cat([points[:, ::2] * -2, one[:, ::2], far[:, ::2]], -1)
    return torch.bmm(odd, even.transpose(-2, -1))


def in_steps(go: Tensor, price: Tensor, counts: Tensor, multiple: int) -> Tensor:
    """Of the candidates that ``go`` ``[images, candidates]`` the cheapest, as many as leave their image a ``multiple`` of tokens.

    Where too few go for that, none do. Of equal prices the first goes first, so that an image does not depend on those beside it.

    Args:
        go: which candidates are cheap enough.
        price: theirs, ``[images, candidates]``.
        counts: ``[images]`` tokens of each image, all it has.
        multiple: of which every count becomes one, if it changes; 1 leaves ``go`` as it is.

    Example:
        >>> price = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
        >>> in_steps(price < 5, price, torch.tensor([10]), 4).tolist()
        [[False, True, True, False]]
    """
    if multiple == 1:
        return go
    many = go.sum(-1)
    fewer = many - torch.minimum((many - counts) % multiple, many)
    order = torch.sort(price.masked_fill(~go, INFINITY), dim=-1, stable=True).indices
    return torch.zeros_like(go).scatter_(-1, order, torch.arange(go.shape[-1], device=go.device) < fewer[:, None])


def cheapest(price: Tensor, *, threshold: float | None, remove: int | None) -> Tensor:
    """Which candidates go: all priced below ``threshold``, or exactly the ``remove`` cheapest of each image.

    Example:
        >>> cheapest(torch.tensor([[3.0, 1.0, 2.0]]), threshold=None, remove=2).tolist()
        [[False, True, True]]
    """
    if threshold is not None:
        return price < threshold
    count = min(remove or 0, price.shape[-1])
    # Ties at the last place must not let more tokens go in one image than in another: counts are rectangular.
    order = price.topk(count, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(price, dtype=torch.bool).scatter(-1, order, True)
