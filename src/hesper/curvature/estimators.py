"""Estimates of trace, diagonal and quadratic scores from probes, and of the Fisher diagonal from drawn classes, each with its error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.curvature.batches import Batch
from hesper.curvature.differentiable import twice_differentiable
from hesper.curvature.lens import Lens, walk
from hesper.curvature.operators import Gather, SymmetricOperator, derivative, variables
from hesper.curvature.points import Point, dot, random_signs, require_same_structure
from hesper.curvature.randomness import Randomness
from hesper.errors import UsageError


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` samples and its standard error ``sqrt(variance / n)``, NaN ("unknown") for one sample.

    >>> Estimate(mean=3.0, stderr=0.5, n=16).mean
    3.0
    """

    mean: float
    stderr: float
    n: int


@dataclass(frozen=True, eq=False)
class PointEstimate:
    """Entry by entry a mean over ``n`` samples and its standard error, NaN ("unknown") for one sample.

    >>> PointEstimate({"gate": torch.ones(2)}, {"gate": torch.zeros(2)}, n=4).mean["gate"].tolist()
    [1.0, 1.0]
    """

    mean: Point
    stderr: Point
    n: int


class _Running:
    """Mean and sum of squared deviations of a stream (Welford, Technometrics 4(3), 1962)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, sample: Point) -> None:
        self.n += 1
        for name, value in sample.items():
            before = self.mean.get(name, torch.zeros_like(value))
            self.mean[name] = before + (value - before) / self.n
            step = (value - before) * (value - self.mean[name])
            self._squares[name] = self._squares[name] + step if name in self._squares else step

    def variance_of_mean(self) -> dict[str, Tensor]:
        if self.n == 1:
            return {name: torch.full_like(value, math.nan) for name, value in self.mean.items()}
        return {name: value / (self.n * (self.n - 1)) for name, value in self._squares.items()}

    def estimate(self) -> PointEstimate:
        if self.n == 0:
            raise UsageError("an estimate needs at least one probe")
        return PointEstimate(self.mean, _root(self.variance_of_mean()), self.n)


def trace(operator: SymmetricOperator, probes: int, generator: torch.Generator) -> Estimate:
    """Hutchinson's estimate of the trace, the mean of ``v^T A v`` over random signs v: unbiased.

    The variance of one probe is ``2 (||A||_F^2 - ||diag A||^2)``. Costs one product a probe.
    Source: Hutchinson, Communications in Statistics 19(2), 1990.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> trace(MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), 2, torch.Generator().manual_seed(0))
    Estimate(mean=3.0, stderr=0.0, n=2)
    """
    return trace_from_probes(operator, _sign_stream(operator.at, probes, generator))


def trace_from_probes(operator: SymmetricOperator, probes: Iterable[Point]) -> Estimate:
    """The mean of ``v^T A v`` over the given probes, unbiased for the trace when ``E[v v^T]`` is the identity.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> trace_from_probes(MatrixOperator(torch.eye(2)), [{"x": torch.tensor([1.0, -1.0])}]).mean
    2.0
    """
    running = _Running()
    for probe in probes:
        running.add({"trace": dot(probe, operator @ probe)})
    found = running.estimate()
    return Estimate(float(found.mean["trace"]), float(found.stderr["trace"]), found.n)


def diagonal(operator: SymmetricOperator, probes: int, generator: Randomness) -> PointEstimate:
    """Estimate of the diagonal, the mean of ``v * (A v)`` over random signs v: unbiased.

    One probe's variance at entry i is ``sum_(j != i) A_ij^2``. Costs one product a probe; in a "sum" lens images
    do not disturb each other. Source: Bekas, Kokiopoulou and Saad, Applied Numerical Mathematics 57, 2007.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> diagonal(MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), 2, torch.Generator().manual_seed(0)).mean["x"].tolist()
    [1.0, 2.0]
    """
    return diagonal_from_probes(operator, _sign_stream(operator.at, probes, generator))


def diagonal_from_probes(operator: SymmetricOperator, probes: Iterable[Point]) -> PointEstimate:
    """The mean of ``v * (A v)`` over the given probes, unbiased for the diagonal when ``E[v v^T]`` is the identity.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> diagonal_from_probes(MatrixOperator(torch.eye(2)), [{"x": torch.tensor([1.0, -1.0])}]).mean["x"].tolist()
    [1.0, 1.0]
    """
    running = _Running()
    for probe in probes:
        product = operator @ probe
        running.add({name: value * product[name] for name, value in probe.items()})
    return running.estimate()


def quadratic_scores(operator: SymmetricOperator, point: Point, block_dims: int, probes: int, generator: Randomness) -> PointEstimate:
    """Estimates of ``z_i^T A_ii z_i`` for every block i of ``point`` and its diagonal block of A: unbiased.

    A block is what shares the first ``block_dims`` indices of a tensor: with activations [images, tokens, width] and
    ``block_dims`` 2, a token. One sign per block scales the point, so one product scores all blocks at once:
    ``E[s_i z_i^T (A (s * z))_i] = z_i^T A_ii z_i``. Returns tensors of the leading shape.
    Source: the token score z^T H_z z of HEART-ViT, arXiv 2512.20120.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> z = {"x": torch.tensor([[1.0, 2.0]])}
    >>> quadratic_scores(MatrixOperator(torch.eye(2), z), z, 1, 1, torch.Generator().manual_seed(0)).mean["x"].tolist()
    [5.0]
    """
    require_same_structure(point, operator.at, "point")
    if block_dims < 0 or any(tensor.dim() < block_dims for tensor in point.values()):
        raise UsageError(f"blocks of {block_dims} leading dimensions do not exist in every tensor of the point")
    blocks = {name: tensor.new_zeros(tensor.shape[:block_dims]) for name, tensor in point.items()}
    running = _Running()
    for signs in _sign_stream(blocks, probes, generator):
        probe = {name: tensor * _widen(signs[name], tensor.dim()) for name, tensor in point.items()}
        product = operator @ probe
        running.add({name: (value * product[name]).reshape(*value.shape[:block_dims], -1).sum(-1) for name, value in probe.items()})
    return running.estimate()


def fisher_diagonal(lens: Lens, batches: Iterable[Batch], draws: int, generator: Randomness) -> PointEstimate:
    """Diagonal of the Fisher matrix, ``F_ii = sum_n E_(c ~ p_n) [(d log p_n,c / dx_i)^2]`` (or its mean): unbiased.

    Classes are drawn from what the model predicts, never taken from labels. One backward pass per draw and batch.
    In a "sum" lens each entry sees its own image only. In a "mean" lens the square of a batch's summed gradient stands
    for the sum of squares, rightly on average: images draw independently and ``E_c[d log p_c / dx] = 0``; smaller
    batches give a smaller error for the same work. The error counts the draws, not the choice of images.
    Raises UsageError for draws < 1, JobError naming the batch for logits that are not finite.
    Source: Kunstner, Balles and Hennig, NeurIPS 2019, equation 3.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import DenseKL
    >>> lens = Lens({"z": torch.zeros(1, 2)}, lambda x, batch: x["z"], DenseKL(), "sum")
    >>> fisher_diagonal(lens, [ImageBatch(torch.zeros(1, 1))], 4, torch.Generator().manual_seed(0)).mean["z"].tolist()
    [[0.25, 0.25]]
    """
    if draws < 1:
        raise UsageError(f"at least one draw is needed, not {draws}")
    means, variances = Gather(lens), Gather(lens)
    with twice_differentiable():
        for step in walk(lens, batches):
            leaves = variables(step.lens.at)
            logits = step.logits(leaves)
            step.require_finite(logits, "output")
            running = _Running()
            for weight in lens.loss.sample_output_gradients(logits, draws, generator):
                running.add(_squares(derivative([logits], leaves, [weight], retain_graph=running.n + 1 < draws)))
            means.add(step, running.mean)
            variances.add(step, running.variance_of_mean())
    return PointEstimate(means.result(), _root(variances.result(power=2)), draws)


def fisher_diagonal_exact(lens: Lens, batches: Iterable[Batch]) -> Point:
    """Diagonal of the Fisher matrix by enumerating all classes, each weighted by its probability.

    One backward pass per class and batch in a "sum" lens; in a "mean" lens one per class and image: for small cases.
    Raises JobError naming the batch for logits that are not finite.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import DenseKL
    >>> lens = Lens({"z": torch.zeros(1, 2)}, lambda x, batch: x["z"], DenseKL(), "sum")
    >>> fisher_diagonal_exact(lens, [ImageBatch(torch.zeros(1, 1))])["z"]
    tensor([[0.2500, 0.2500]])
    """
    gather = Gather(lens)
    with twice_differentiable():
        for step in walk(lens, batches):
            leaves = variables(step.lens.at)
            logits = step.logits(leaves)
            step.require_finite(logits, "output")
            total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
            for weight in _weighted_scores(lens, logits.detach()):
                squares = _squares(derivative([logits], leaves, [weight], retain_graph=True))
                total = {name: value + squares[name] for name, value in total.items()}
            gather.add(step, total)
    return gather.result()


def _weighted_scores(lens: Lens, logits: Tensor) -> Iterator[Tensor]:
    """Output gradients times sqrt(p_c), so that their squares add up to the expectation."""
    images, classes = logits.shape
    roots = lens.loss.probabilities(logits).sqrt()
    for c in range(classes):
        chosen = torch.full((1, images), c, device=logits.device)
        weighted = lens.loss.output_gradients(logits, chosen)[0] * roots[:, c : c + 1]
        if lens.reduction == "sum":
            yield weighted
            continue
        # Shared variables: squares of different images must not mix, so one image at a time.
        for image in range(images):
            alone = torch.zeros_like(weighted)
            alone[image] = weighted[image]
            yield alone


def _sign_stream(like: Point, probes: int, generator: Randomness) -> Iterator[Point]:
    return (random_signs(like, generator) for _ in range(probes))


def _widen(tensor: Tensor, dims: int) -> Tensor:
    return tensor.reshape(tensor.shape + (1,) * (dims - tensor.dim()))


def _squares(point: Point) -> dict[str, Tensor]:
    return {name: tensor.square() for name, tensor in point.items()}


def _root(point: Point) -> dict[str, Tensor]:
    return {name: tensor.sqrt() for name, tensor in point.items()}
