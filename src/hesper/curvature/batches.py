"""What a batch is: images and, where the loss needs them, labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """Anything with ``images`` ([images, ...]) and ``labels`` ([images] class indices, or None)."""

    @property
    def images(self) -> Tensor:
        """The images, first dimension counts them."""

    @property
    def labels(self) -> Tensor | None:
        """The class index of each image, or None where there are no labels."""


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images [images, channels, height, width] and their class indices [images], if known.

    >>> import torch
    >>> ImageBatch(torch.zeros(2, 3, 8, 8)).labels is None
    True
    """

    images: Tensor
    labels: Tensor | None = None
