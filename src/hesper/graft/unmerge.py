"""Back to the full grid: every original patch gets the row of the token that stands for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hesper.graft.layout import Layout


def stand_ins(where: Tensor, grid: tuple[int, int]) -> Tensor:
    """Where each original patch finds its row: ``where`` ``[images, patches]``, with dropped patches (-1) sent to their neighbour's.

    A dropped patch has no token any more, so it takes the row of the nearest patch of the grid that has one (Euclidean distance
    between their places, the first in reading order where several are as near).

    >>> stand_ins(torch.tensor([[0, -1, -1, 1]]), (1, 4)).tolist()
    [[0, 0, 1, 1]]
    """
    dropped = where < 0
    if not bool(dropped.any()):
        return where
    row, column = (t.flatten() for t in torch.meshgrid(*(torch.arange(n, device=where.device) for n in grid), indexing="ij"))
    distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    far = distance.max() + 1
    nearest = torch.stack([distance.masked_fill(own, far).argmin(1) for own in dropped])
    return where.gather(1, nearest)


def full_grid(rows: Tensor, layout: Layout, where: Tensor) -> Tensor:
    """Packed ``rows`` ``[rows, width]`` as ``[images, prefix + patches, width]``; patch i is patch ``where[:, i]`` of its image's rows."""
    prefix, first = layout.restored(layout.prefix_rows(rows)), layout.restored(layout.first_patch)
    return torch.cat([prefix, rows[first[:, None] + where]], 1)
