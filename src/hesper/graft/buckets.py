"""Images of about equally many tokens side by side, so that one call serves all of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Counts that round up to the same multiple share a bucket: at most seven calls for 197 tokens, for a sixth of the places empty on average.
STEP = 32


@dataclass(frozen=True, eq=False)
class Buckets:
    """Where packed rows lie when images are padded to the longest of their bucket.

    ``shapes`` holds images and places per image of every bucket. ``row`` ``[places]`` is the row at each place of all buckets, one
    after another; empty places repeat a row of their image. ``empty`` ``[places]`` says which those are (None where there are none),
    and ``place`` ``[rows]`` is where each row lies.

    Example:
        >>> both = side_by_side((0, 2, 5), [(0, 1)])
        >>> both.shapes, both.row.tolist(), both.place.tolist()
        (((2, 3),), [0, 1, 1, 2, 3, 4], [0, 1, 3, 4, 5])
        >>> [bucket.tolist() for bucket in both.spread(torch.tensor([1, 2, 3, 4, 5]))]
        [[[1, 2, 2], [3, 4, 5]]]
    """

    shapes: tuple[tuple[int, int], ...]
    row: Tensor
    empty: Tensor | None
    place: Tensor

    def spread(self, rows: Tensor) -> list[Tensor]:
        """Packed rows ``[rows, ...]`` as ``[images, places, ...]`` for every bucket."""
        return self.cut(rows.index_select(0, self.row))

    def cut(self, places: Tensor) -> list[Tensor]:
        """One value per place ``[places, ...]`` as ``[images, places, ...]`` for every bucket."""
        parts = torch.split(places, [images * most for images, most in self.shapes])
        return [part.view(*shape, *part.shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]

    def gather(self, buckets: Sequence[Tensor]) -> Tensor:
        """``[images, places, ...]`` of every bucket back to packed rows ``[rows, ...]``."""
        return torch.cat([bucket.flatten(0, 1) for bucket in buckets]).index_select(0, self.place)


def together(counts: Sequence[int], step: int = STEP) -> list[tuple[int, ...]]:
    """Which images share a bucket: those whose counts round up to the same multiple of ``step``.

    >>> together((5, 33, 64, 7))
    [(0, 3), (1, 2)]
    """
    members: dict[int, list[int]] = {}
    for image, count in enumerate(counts):
        members.setdefault(-(-count // step), []).append(image)
    return [tuple(members[length]) for length in sorted(members)]


def side_by_side(bounds: Sequence[int], members: Sequence[Sequence[int]], device: torch.device | None = None) -> Buckets:
    """The buckets of images whose rows begin at ``bounds`` (one past the last row at its end)."""
    edge = np.asarray(bounds)
    place, rows, shapes, begun = np.empty(edge[-1], dtype=np.int64), [], [], 0
    empty = []
    for images in members:
        first = edge[list(images)]
        count = edge[np.asarray(images) + 1] - first
        most = int(count.max())
        steps = np.arange(most)
        held = steps < count[:, None]
        row = first[:, None] + np.minimum(steps, count[:, None] - 1)
        place[row[held]] = begun + held.ravel().nonzero()[0]
        rows.append(row.ravel())
        empty.append(~held.ravel())
        shapes.append((len(images), most))
        begun += len(images) * most
    gaps = np.concatenate(empty)
    # One copy to the device carries everything: on an accelerator each waits in a queue of its own.
    packed = torch.from_numpy(np.concatenate([*rows, place, gaps])).to(device, non_blocking=True)
    row_at, place_of, missing = torch.split(packed, [begun, len(place), begun])
    return Buckets(tuple(shapes), row_at, missing.bool() if gaps.any() else None, place_of)
