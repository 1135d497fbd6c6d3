"""Whether an exported file computes what the model in PyTorch does, on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.errors import JobError

__all__ = ["Parity", "compare_logits"]


@dataclass(frozen=True)
class Parity:
    """Images compared, the largest difference between logits, the largest logit beside it, and the share of equal top-1 decisions."""

    images: int
    max_error: float
    largest_logit: float
    agreement: float


def compare_logits(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    largest_batch: int | None,
    step: Callable[[int], None] | None = None,
) -> Parity:
    """Run both on the same images.

    Args:
        ours: the model in PyTorch, from images to logits ``[images, classes]``.
        theirs: the exported file, likewise.
        batches: images ``[images, channels, height, width]``.
        largest_batch: how many images ``theirs`` takes at most; None for any number.
        step: told how many images were compared.

    Raises:
        JobError: a logit is not finite, or another number of logits came back.

    Example:
        >>> compare_logits(lambda x: x, lambda x: x + 0.5, [torch.tensor([[1.0, 2.0], [4.0, 3.0]])], 1)
        Parity(images=2, max_error=0.5, largest_logit=4.0, agreement=1.0)
    """
    images, worst, largest, same = 0, 0.0, 0.0, 0
    for batch in batches:
        with torch.inference_mode():
            expected = ours(batch).float()
        parts = torch.split(batch, largest_batch or len(batch))
        found = torch.cat([theirs(part.contiguous()).float() for part in parts])
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            raise JobError(
                f"The exported file gave logits of shape {tuple(found.shape)}, or such as are not finite; the model's own differ."
            )
        images += len(batch)
        worst = max(worst, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        if step is not None:
            step(len(batch))
    return Parity(images, worst, largest, same / images)
