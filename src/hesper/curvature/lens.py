"""Curvature of what: a lens names the variables, the point, the loss, and how images add up."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hesper.curvature.batches import Batch
from hesper.curvature.differentiable import refuse_stochastic
from hesper.curvature.losses import Loss
from hesper.curvature.points import Point
from hesper.errors import JobError, UsageError

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, eq=False)
class Lens:
    """A loss as a function of named variables, ``L(x) = sum_n l(z_n(x))`` or its mean over the images.

    at: where derivatives are taken, and where the dense logits of `DenseKL` come from.
    logits: from the variables and a batch to [images, classes]; it must treat images one by one.
    reduction: "sum" when every image has its own entries (gates, activations): the first dimension of each
        tensor in ``at`` then counts the images of all batches, in their order; "mean" when all images share
        the variables (weights).

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import DenseKL
    >>> images = torch.eye(2)
    >>> lens = Lens({"gate": torch.ones(2, 2)}, lambda x, batch: batch.images * x["gate"], DenseKL(), "sum")
    >>> lens.value(lens.at, ImageBatch(images)).item()
    0.0
    """

    at: Point
    logits: Callable[[Point, Batch], Tensor]
    loss: Loss
    reduction: Reduction

    def dense(self, batch: Batch) -> Tensor | None:
        """The logits at ``at`` without graph, [images, classes], or None when the loss does not compare with them."""
        if not self.loss.needs_dense:
            return None
        with torch.no_grad():
            return self.logits(self.at, batch)

    def per_image(self, point: Point, batch: Batch) -> Tensor:
        """Loss of each image at ``point`` in nats, [images]."""
        return self.loss.per_image(self.logits(point, batch), batch, self.dense(batch))

    def value(self, point: Point, batch: Batch) -> Tensor:
        """The loss at ``point`` in nats, a scalar: sum or mean over the images of this batch."""
        losses = self.per_image(point, batch)
        return losses.sum() if self.reduction == "sum" else losses.mean()

    def restrict(self, rows: slice) -> Lens:
        """The lens on the images ``rows`` only; a "mean" lens is its own restriction."""
        if self.reduction == "mean":
            return self
        return replace(self, at={name: tensor[rows] for name, tensor in self.at.items()})


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of a walk: its place, the lens on its images, and which rows of all images these are."""

    index: int
    rows: slice
    batch: Batch
    lens: Lens

    @property
    def images(self) -> int:
        """Number of images in the batch."""
        return int(self.rows.stop - self.rows.start)

    def part(self, point: Point) -> Point:
        """What of ``point`` concerns this batch: its rows for a "sum" lens, all of it for a "mean" lens."""
        if self.lens.reduction == "mean":
            return point
        return {name: tensor[self.rows] for name, tensor in point.items()}

    def require_finite(self, values: Tensor, what: str) -> None:
        """Raise JobError naming the batch and its images when ``values`` [images, ...] hold NaN or infinity."""
        faulty = (~torch.isfinite(values.detach().reshape(values.shape[0], -1)).all(-1)).nonzero().flatten().tolist()
        if faulty:
            count = f"{len(faulty)} of its {self.images} images"
            raise JobError(f"the {what} of batch {self.index} is not finite for {count}, first for image {faulty[0]}")

    def logits(self, point: Point) -> Tensor:
        """The lens' logits for this batch, [images, classes]; raises UsageError when they have another shape."""
        logits = self.lens.logits(point, self.batch)
        if logits.dim() != 2 or logits.shape[0] != self.images:
            raise UsageError(f"the model must give [images, classes] for {self.images} images, it gave {tuple(logits.shape)}")
        return logits


def walk(lens: Lens, batches: Iterable[Batch]) -> Iterator[Step]:
    """Yield one `Step` for each batch; raises UsageError for one-shot iterators, for no images, and for a wrong number of images.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import DenseKL
    >>> lens = Lens({"gate": torch.ones(3, 2)}, lambda x, batch: x["gate"], DenseKL(), "sum")
    >>> [step.rows for step in walk(lens, [ImageBatch(torch.zeros(2, 1)), ImageBatch(torch.zeros(1, 1))])]
    [slice(0, 2, None), slice(2, 3, None)]
    """
    if iter(batches) is batches:
        raise UsageError("the batches are passed over more than once: give a list or a data loader, not an iterator")
    expected = _images_of(lens)
    start = 0
    for index, batch in enumerate(batches):
        rows = slice(start, start + int(batch.images.shape[0]))
        if rows.stop == start:
            raise UsageError(f"batch {index} has no images")
        if expected is not None and rows.stop > expected:
            raise UsageError(f"the lens has entries for {expected} images, the batches hold more")
        yield Step(index, rows, batch, lens.restrict(rows))
        start = rows.stop
    if start == 0:
        raise UsageError("there are no batches")
    if expected is not None and start < expected:
        raise UsageError(f"the lens has entries for {expected} images, the batches hold {start}")


def _images_of(lens: Lens) -> int | None:
    if not lens.at:
        raise UsageError("the lens has no variables")
    if lens.reduction == "mean":
        return None
    counts = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in lens.at.items()}
    count = next(iter(counts.values()))
    if count is None or set(counts.values()) != {count}:
        raise UsageError(f"in a 'sum' lens every tensor's first dimension counts the images, but it is {counts}")
    return count


def weight_lens(model: nn.Module, loss: Loss, parameters: Iterable[str] | None = None) -> Lens:
    """The loss as a function of a model's weights, ``L(w) = mean_n l(model(x_n; w))``.

    ``parameters`` selects by name; the others stay constant. The point shares the model's memory: it is the
    model's weights at the time of use, not a copy. Raises UsageError for unknown names; the lens itself raises
    it when the model draws at random or couples images (see `refuse_stochastic`).

    >>> from hesper.curvature.losses import CrossEntropy
    >>> sorted(weight_lens(nn.Linear(3, 2), CrossEntropy()).at)
    ['bias', 'weight']
    """
    everything = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = list(everything) if parameters is None else list(parameters)
    for name in names:
        if name not in everything:
            near = difflib.get_close_matches(name, everything, n=1)
            raise UsageError(f"the model has no parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    chosen = {name: everything[name] for name in names}
    # Constants are passed detached as well: otherwise their gradients would be built only to be thrown away.
    constants = {name: tensor for name, tensor in everything.items() if name not in chosen}

    def logits(point: Point, batch: Batch) -> Tensor:
        refuse_stochastic(model)
        output: Tensor = functional_call(model, {**constants, **point}, (batch.images,))
        return output

    return Lens(chosen, logits, loss, "mean")
