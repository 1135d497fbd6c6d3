"""Losses of the logits: their value per image, their Hessian in the logits, and draws of their Fisher gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hesper.curvature.batches import Batch
from hesper.curvature.randomness import Randomness
from hesper.errors import UsageError


class Loss(Protocol):
    """A loss in nats whose Hessian in the logits is the Fisher matrix of the classes it predicts."""

    @property
    def needs_dense(self) -> bool:
        """Whether `per_image` compares with the logits of the uncut model."""

    def per_image(self, logits: Tensor, batch: Batch, dense: Tensor | None = None) -> Tensor:
        """Loss of each image, [images]; ``dense`` are the uncut model's logits without graph, if `needs_dense`."""

    def output_hessian_product(self, logits: Tensor, batch: Batch, v: Tensor) -> Tensor:
        """Hessian of each image's loss in its own logits times ``v``, all [images, classes]."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Predicted class probabilities, [images, classes], from which Fisher draws classes."""

    def output_gradients(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Gradients of ``-log p_c`` in the logits, without graph: classes [draws, images] -> [draws, images, classes]."""

    def sample_output_gradients(self, logits: Tensor, draws: int, generator: Randomness) -> Tensor:
        """`output_gradients` for classes drawn from `probabilities`, [draws, images, classes]."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with labels, ``L = -log softmax(z)_y`` in nats.

    >>> from hesper.curvature.batches import ImageBatch
    >>> CrossEntropy().per_image(torch.zeros(1, 2), ImageBatch(torch.zeros(1, 1), torch.tensor([0])))
    tensor([0.6931])
    """

    needs_dense: ClassVar[bool] = False

    def per_image(self, logits: Tensor, batch: Batch, dense: Tensor | None = None) -> Tensor:
        """Loss of each image, [images]; raises UsageError when a label is missing or is not one of the classes."""
        return F.cross_entropy(logits, _checked_labels(logits, batch), reduction="none")

    def output_hessian_product(self, logits: Tensor, batch: Batch, v: Tensor) -> Tensor:
        """``(diag p - p p^T) v`` for each image: the labels do not enter."""
        return _softmax_hessian_product(logits, v, 1.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """``softmax(z)``, [images, classes]."""
        return logits.detach().softmax(-1)

    def output_gradients(self, logits: Tensor, classes: Tensor) -> Tensor:
        """``p - e_c``, [draws, images, classes]."""
        return _score(logits, classes, 1.0)

    def sample_output_gradients(self, logits: Tensor, draws: int, generator: Randomness) -> Tensor:
        """``p - e_c`` with c drawn from p, [draws, images, classes]."""
        return self.output_gradients(logits, draw_classes(self.probabilities(logits), draws, generator))


@dataclass(frozen=True)
class DenseKL:
    """Drift from the uncut model, ``L = KL(softmax(z0/T) || softmax(z/T))`` in nats, without labels and without a factor T^2.

    z0 are the logits at the lens' own point, a constant. There, at z = z0, the gradient is exactly zero (bit for
    bit, not only to rounding), so the Hessian in anything behind the logits is exactly the Gauss-Newton matrix,
    which equals the Fisher matrix. Raises UsageError when the temperature is not positive.
    Source: Martens, JMLR 21(146), 2020, section 9; temperature as in Hinton et al., arXiv 1503.02531.

    >>> from hesper.curvature.batches import ImageBatch
    >>> z0 = torch.tensor([[0.0, 1.0]])
    >>> DenseKL(temperature=4.0).per_image(z0, ImageBatch(torch.zeros(1, 1)), dense=z0)
    tensor([0.])
    """

    temperature: float = 1.0
    needs_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse temperatures that are not positive."""
        if not self.temperature > 0:
            raise UsageError(f"the temperature must be positive, not {self.temperature}")

    def per_image(self, logits: Tensor, batch: Batch, dense: Tensor | None = None) -> Tensor:
        """Loss of each image, [images]; raises UsageError without ``dense``, the logits to compare with."""
        if dense is None:
            raise UsageError("DenseKL compares with the logits of the uncut model, and was given none")
        # KL as the Bregman divergence of logsumexp: its gradient is a difference of two terms that round alike at
        # z = z0, where sum_c p0_c (log p0_c - log p_c) would leave the rounding error of sum(p0) = 1. The common
        # shift keeps the value accurate when the drift is small.
        dense = dense.detach()
        shift = (dense / self.temperature).logsumexp(-1, keepdim=True)
        u, u0 = logits / self.temperature - shift, dense / self.temperature - shift
        log_total0 = u0.logsumexp(-1, keepdim=True)
        p0 = (u0 - log_total0).exp()
        return u.logsumexp(-1) - log_total0.squeeze(-1) - (p0 * (u - u0)).sum(-1)

    def output_hessian_product(self, logits: Tensor, batch: Batch, v: Tensor) -> Tensor:
        """``(diag p - p p^T) v / T^2`` with p = softmax(z/T), for each image."""
        return _softmax_hessian_product(logits, v, self.temperature)

    def probabilities(self, logits: Tensor) -> Tensor:
        """``softmax(z/T)``, [images, classes]."""
        return (logits.detach() / self.temperature).softmax(-1)

    def output_gradients(self, logits: Tensor, classes: Tensor) -> Tensor:
        """``(p - e_c) / T`` with p = softmax(z/T), [draws, images, classes]."""
        return _score(logits, classes, self.temperature)

    def sample_output_gradients(self, logits: Tensor, draws: int, generator: Randomness) -> Tensor:
        """``(p - e_c) / T`` with c drawn from p = softmax(z/T), [draws, images, classes]."""
        return self.output_gradients(logits, draw_classes(self.probabilities(logits), draws, generator))


def draw_classes(probabilities: Tensor, draws: int, generator: Randomness) -> Tensor:
    """Draw classes independently for every image: [images, classes] -> [draws, images]; raises UsageError for draws < 1.

    >>> draw_classes(torch.tensor([[0.0, 1.0]]), 3, torch.Generator().manual_seed(0)).tolist()
    [[1], [1], [1]]
    """
    if draws < 1:
        raise UsageError(f"at least one draw is needed, not {draws}")
    if isinstance(generator, torch.Generator):
        return _drawn(probabilities, draws, generator)
    rows = [_drawn(row[None], draws, each) for row, each in zip(probabilities, generator, strict=True)]
    return torch.cat(rows, 1)


def _drawn(probabilities: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    # Drawn on the generator's own device, so that one seed gives the same classes to every device.
    weights = probabilities.detach().to(generator.device, torch.float64)
    return torch.multinomial(weights, draws, replacement=True, generator=generator).T.to(probabilities.device)


def _checked_labels(logits: Tensor, batch: Batch) -> Tensor:
    labels, (images, classes) = batch.labels, logits.shape
    if labels is None:
        raise UsageError("cross-entropy needs labels and the batch has none; use a loss without labels (DenseKL) or label the images")
    if labels.shape != (images,) or labels.is_floating_point():
        raise UsageError(f"{images} images need {images} whole numbers as labels, not {tuple(labels.shape)} of {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(f"the labels run from {low} to {high}, the model has classes 0 to {classes - 1}")
    return labels.long()


def _softmax_hessian_product(logits: Tensor, v: Tensor, temperature: float) -> Tensor:
    p = (logits / temperature).softmax(-1)
    return p * (v - (p * v).sum(-1, keepdim=True)) / temperature**2


def _score(logits: Tensor, classes: Tensor, temperature: float) -> Tensor:
    p = (logits.detach() / temperature).softmax(-1)
    return (p - F.one_hot(classes, p.shape[-1]).to(p.dtype)) / temperature
