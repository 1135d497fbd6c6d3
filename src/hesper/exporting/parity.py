"""Whether an exported file computes what the model in PyTorch does, on real images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.errors import JobError
from hesper.exporting.quiet import innermost

__all__ = ["Parity", "compare_logits"]


@dataclass(frozen=True)
class Parity:
    """Images compared, the largest difference between logits and that of the median image, the largest logit, equal top-1 decisions."""

    images: int
    max_error: float
    median_error: float
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
        JobError: a logit is not finite, another number of logits came back, or the file cannot be run.

    Example:
        >>> compare_logits(lambda x: x, lambda x: x + 0.5, [torch.tensor([[1.0, 2.0], [4.0, 3.0]])], 1)
        Parity(images=2, max_error=0.5, median_error=0.5, largest_logit=4.0, agreement=1.0)
    """
    errors, largest, same = list[float](), 0.0, 0
    for batch in batches:
        with torch.inference_mode():
            expected = ours(batch).float()
        parts = torch.split(batch, largest_batch or len(batch))
        try:
            found = torch.cat([theirs(part.contiguous()).float() for part in parts])
        except Exception as error:  # whatever a runtime raises
            raise JobError(f"The exported file cannot be run: {innermost(error)}") from error
        _check(expected, found)
        errors += (found - expected).abs().amax(1).tolist()
        largest = max(largest, float(expected.abs().max()))
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        if step is not None:
            step(len(batch))
    return Parity(len(errors), max(errors), statistics.median(errors), largest, same / len(errors))


def _check(expected: Tensor, found: Tensor) -> None:
    if not bool(expected.isfinite().all()):
        raise JobError("The model's own logits are not finite, so no file of it can be compared; look at its weights.")
    if found.shape != expected.shape:
        raise JobError(f"The exported file gave logits of shape {tuple(found.shape)} instead of {tuple(expected.shape)}.")
    if not bool(found.isfinite().all()):
        raise JobError("The exported file gave logits that are not finite; where it is in half precision, export with --precision fp32.")
