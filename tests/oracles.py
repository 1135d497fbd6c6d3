"""What the tests compare with: dense derivatives by other routes, and losses written from their definitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hesper.curvature import CrossEntropy, DenseKL, ImageBatch, Lens, Point, flatten, unflatten


def whole(batches: Sequence[ImageBatch]) -> ImageBatch:
    """All batches as one, so that the oracle knows nothing of batching."""
    return ImageBatch(torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches]))


def loss_value(lens: Lens, flat: Tensor, batch: ImageBatch) -> Tensor:
    """The loss from its definition, at a flat point."""
    logits = lens.logits(unflatten(flat, lens.at), batch)
    if isinstance(lens.loss, CrossEntropy):
        losses = -(logits.exp() / logits.exp().sum(1, keepdim=True)).log()[torch.arange(len(logits)), batch.labels]
    else:
        assert isinstance(lens.loss, DenseKL)
        p0 = (lens.logits(lens.at, batch).detach() / lens.loss.temperature).softmax(1)
        p = (logits / lens.loss.temperature).softmax(1)
        losses = (p0 * (p0.log() - p.log())).sum(1)
    return losses.sum() if lens.reduction == "sum" else losses.sum() / len(batch.images)


def dense_hessian(lens: Lens, batches: Sequence[ImageBatch]) -> Tensor:
    """The Hessian by torch.autograd.functional, in one batch."""
    batch = whole(batches)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda flat: loss_value(lens, flat, batch), flatten(lens.at))


def dense_jacobian(lens: Lens, batches: Sequence[ImageBatch]) -> Tensor:
    """The derivative of all logits, [images, classes, numbers]."""
    batch = whole(batches)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(lambda flat: lens.logits(unflatten(flat, lens.at), batch), flatten(lens.at))


def output_hessians(logits: Tensor, temperature: float) -> Tensor:
    """(diag p - p p^T) / T^2 of each image, [images, classes, classes]."""
    p = (logits / temperature).softmax(1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / temperature**2


def dense_gauss_newton(lens: Lens, batches: Sequence[ImageBatch], temperature: float) -> Tensor:
    """J^T H J from dense factors."""
    jacobian = dense_jacobian(lens, batches)
    middle = output_hessians(lens.logits(lens.at, whole(batches)).detach(), temperature)
    total = torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian)
    return total if lens.reduction == "sum" else total / len(jacobian)


def value_slope(lens: Lens, batches: Sequence[ImageBatch], direction: Point, step: float) -> Tensor:
    """Second directional derivative of the loss along a unit vector, by fourth-order central differences of values alone."""
    batch, at, along = whole(batches), flatten(lens.at), flatten(direction)

    def value(k: int) -> Tensor:
        return loss_value(lens, at + k * step * along, batch).detach()

    return (-value(2) + 16 * value(1) - 30 * value(0) + 16 * value(-1) - value(-2)) / (12 * step**2)


def sign_vectors(d: int) -> Iterator[dict[str, Tensor]]:
    """All 2^d sign vectors."""
    for signs in product((-1.0, 1.0), repeat=d):
        yield {"x": torch.tensor(signs, dtype=torch.float64)}


def random_symmetric(d: int, seed: int) -> Tensor:
    """A symmetric matrix with normal entries."""
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


def with_eigenvalues(values: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    d = len(values)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def counted_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of every matrix product and convolution torch runs: half of the counter's operations."""
    # Not every torch counts the processor's fused attention, but all count the products it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2
