"""How the tokens of a batch lie in memory: rows packed image after image, no padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hesper.graft.buckets import Buckets, side_by_side, together


@dataclass(frozen=True)
class Layout:
    """Counts of tokens per image; the ``prefix`` tokens of an image come first in its run of rows.

    ``images`` says which image of the batch each run of rows is, None where they lie as in the batch. Everything here that is
    "per image" is so in the order in which the images lie, unless it says otherwise.

    Example:
        >>> import torch
        >>> layout = Layout((3, 2), prefix=1)
        >>> layout.rows, layout.bounds, layout.rectangular
        (5, (0, 3, 5), False)
        >>> layout.padded(torch.tensor([10.0, 11.0, 12.0, 20.0, 21.0])).tolist()
        [[11.0, 12.0], [21.0, 21.0]]
    """

    counts: tuple[int, ...]
    prefix: int
    device: torch.device | None = None
    images: tuple[int, ...] | None = None

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """First row of every image, and one past the last."""
        out = [0]
        for count in self.counts:
            out.append(out[-1] + count)
        return tuple(out)

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.bounds[-1]

    @cached_property
    def rectangular(self) -> bool:
        """Whether all images have equally many tokens."""
        return min(self.counts) == max(self.counts)

    @cached_property
    def lengths(self) -> Tensor:
        """``[images]`` tokens per image."""
        return self._held(self.counts)

    @cached_property
    def first(self) -> Tensor:
        """``[images]`` first row of each image."""
        return self._held(self.bounds[:-1])

    @cached_property
    def ends(self) -> Tensor:
        """``[images + 1]`` :attr:`bounds` as variable-length kernels take them, 32-bit."""
        return self._held(self.bounds, torch.int32)

    @cached_property
    def together(self) -> list[tuple[int, ...]]:
        """Images of about equal counts."""
        return together(self.counts)

    @cached_property
    def buckets(self) -> Buckets:
        """Where rows lie when images of about equal counts stand side by side."""
        return side_by_side(self.bounds, self.together, self.device)

    def _held(self, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        # From the host without waiting for what the device still has to do.
        return torch.tensor(numbers, dtype=dtype).to(self.device, non_blocking=True)

    @cached_property
    def patches(self) -> Tensor:
        """``[images]`` patch tokens per image."""
        return self.lengths - self.prefix

    @cached_property
    def _steps(self) -> Tensor:
        return torch.arange(max(self.counts) - self.prefix, device=self.device)

    @cached_property
    def valid(self) -> Tensor:
        """``[images, most patches]``: which places of the padded form hold a token."""
        return self._steps[None] < self.patches[:, None]

    @cached_property
    def gaps(self) -> Tensor | None:
        """Where the padded form holds no token, ``[images, most patches]``, or None where every place holds one."""
        return None if self.rectangular else ~self.valid

    @cached_property
    def first_patch(self) -> Tensor:
        """``[images]`` row of each image's first patch."""
        return self.first + self.prefix

    @cached_property
    def index(self) -> Tensor:
        """``[images, most patches]`` row of each patch token; places past an image's end repeat its last row."""
        return self.first_patch[:, None] + torch.minimum(self._steps[None], (self.patches[:, None] - 1).clamp_min(0))

    @cached_property
    def image(self) -> Tensor:
        """``[rows]`` which image each row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.device), self.lengths, output_size=self.rows)

    @cached_property
    def places(self) -> Tensor:
        """``[rows]`` the place of each row among its image's."""
        return torch.arange(self.rows, device=self.device) - self.spread(self.first)

    def by_image(self, rows: Tensor) -> Tensor:
        """Rows ``[rows, ...]`` as a view ``[images, tokens, ...]``; for rectangular layouts only."""
        return rows.view(len(self.counts), self.counts[0], *rows.shape[1:])

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """A view of each image's rows, which lie along ``dim``."""
        return torch.split(rows, list(self.counts), dim)

    def spread(self, values: Tensor) -> Tensor:
        """One value per image ``[images, ...]`` repeated for each of its rows, ``[rows, ...]``."""
        return values.expand(self.rows, *values.shape[1:]) if len(self.counts) == 1 else values.index_select(0, self.image)

    def padded(self, rows: Tensor) -> Tensor:
        """Patch rows ``[rows, ...]`` as ``[images, most patches, ...]``; a view where nothing is ragged."""
        if self.rectangular:
            return self.by_image(rows)[:, self.prefix :]
        return rows[self.index]

    def prefix_rows(self, rows: Tensor) -> Tensor:
        """Prefix rows ``[images, prefix, ...]``."""
        if self.rectangular:
            return self.by_image(rows)[:, : self.prefix]
        return rows[self.first[:, None] + torch.arange(self.prefix, device=self.device)]

    def with_counts(self, counts: Sequence[int]) -> Layout:
        """The same images with other counts."""
        return replace(self, counts=tuple(int(c) for c in counts))

    def arranged(self, order: Sequence[int]) -> Layout:
        """The images in another ``order``."""
        images = range(len(self.counts)) if self.images is None else self.images
        return replace(self, counts=tuple(self.counts[i] for i in order), images=tuple(images[i] for i in order))

    def listed(self, values: Sequence[int]) -> tuple[int, ...]:
        """One number per image, in the order of the batch.

        >>> Layout((3, 2), prefix=1, images=(1, 0)).listed((3, 2))
        (2, 3)
        """
        return tuple(values) if self._found is None else tuple(values[where] for where in self._found)

    def restored(self, values: Tensor) -> Tensor:
        """One value per image ``[images, ...]``, in the order of the batch."""
        return values if self._found is None else values.index_select(0, self._places_found)

    @cached_property
    def _places_found(self) -> Tensor:
        assert self._found is not None
        return self._held(self._found)

    @cached_property
    def _found(self) -> list[int] | None:
        """Where each image of the batch lies, None where that is its own place."""
        return None if self.images is None else sorted(range(len(self.images)), key=self.images.__getitem__)


def checkerboard(grid: tuple[int, int]) -> list[int]:
    """Patches in an order in which neighbours on the grid, across and down, stand at odd and even places.

    Matching odd with even places can then join any two neighbours; in reading order, where the width is even, no two of a column.

    Example:
        >>> checkerboard((2, 4))
        [0, 1, 2, 3, 5, 4, 7, 6]
    """
    height, width = grid
    swap = [column ^ 1 for column in range(width)] if width % 2 == 0 else list(range(width))
    return [row * width + (swap[column] if row % 2 else column) for row in range(height) for column in range(width)]
