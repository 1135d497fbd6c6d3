"""Curvature as symmetric operators on points: exact Hessian, Gauss-Newton, and plain matrices."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp

from hesper.curvature.batches import Batch
from hesper.curvature.differentiable import twice_differentiable
from hesper.curvature.lens import Lens, Step, walk
from hesper.curvature.points import Point, flatten, require_same_structure, scale, size, unflatten, unit_vectors
from hesper.errors import UsageError

Mode = Literal["reverse-over-reverse", "forward-over-reverse"]
DENSE_LIMIT = 4096  # numbers; a float64 matrix of this size takes 128 MiB
_Product = Callable[[Point], Point]


class SymmetricOperator(Protocol):
    """A symmetric linear map from points to points, all that estimators and eigenvalue methods may know."""

    @property
    @abstractmethod
    def at(self) -> Point:
        """A point with the names, shapes, number types and devices of the vectors."""

    @abstractmethod
    def __matmul__(self, vector: Point) -> Point:
        """The product with a vector; raises UsageError when its names or shapes differ from ``at``."""

    def dense(self) -> Tensor:
        """The matrix [d, d], in the order of `flatten`; raises UsageError above `DENSE_LIMIT` numbers."""
        numbers = size(self.at)
        if numbers > DENSE_LIMIT:
            raise UsageError(f"a dense matrix is for small cases: {numbers} numbers are more than {DENSE_LIMIT}")
        return torch.stack([flatten(self @ unit) for unit in unit_vectors(self.at)], dim=1)


class MatrixOperator(SymmetricOperator):
    """A symmetric matrix [d, d] as an operator on points like ``at`` (by default one vector named "x").

    >>> (MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))) @ {"x": torch.ones(2)})["x"].tolist()
    [1.0, 2.0]
    """

    def __init__(self, matrix: Tensor, at: Point | None = None) -> None:
        """Keep the matrix; raises UsageError when it is not square or does not fit ``at``."""
        self._at = {"x": torch.zeros_like(matrix[0])} if at is None else at
        if matrix.shape != (size(self._at), size(self._at)):
            raise UsageError(f"a matrix of shape {tuple(matrix.shape)} does not act on points of {size(self._at)} numbers")
        self._matrix = matrix

    @property
    def at(self) -> Point:
        """The point that gives names and shapes."""
        return self._at

    def __matmul__(self, vector: Point) -> Point:
        """The product of the matrix with the flattened vector."""
        require_same_structure(vector, self._at)
        return unflatten(self._matrix @ flatten(vector), self._at)


class Gather:
    """Adds up per-batch results: side by side for a "sum" lens, total for a "mean" lens.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import DenseKL
    >>> lens = Lens({"w": torch.ones(1)}, lambda x, batch: x["w"] * batch.images, DenseKL(), "mean")
    >>> gather = Gather(lens)
    >>> for step in walk(lens, [ImageBatch(torch.zeros(2, 3)), ImageBatch(torch.zeros(2, 3))]):
    ...     gather.add(step, {"w": torch.tensor([6.0])})
    >>> gather.result()["w"].item()
    3.0
    """

    def __init__(self, lens: Lens) -> None:
        """Start with nothing."""
        self._reduction = lens.reduction
        self._parts: list[Point] = []
        self._images = 0

    def add(self, step: Step, part: Point) -> None:
        """Take the sum over the images of one batch."""
        self._images += step.images
        if self._reduction == "mean" and self._parts:
            self._parts = [{name: total + part[name] for name, total in self._parts[0].items()}]
        else:
            self._parts.append(part)

    def result(self, power: int = 1) -> Point:
        """All rows for a "sum" lens; for a "mean" lens the total over (number of images) ** power."""
        if self._reduction == "mean":
            return scale(1 / self._images**power, self._parts[0])
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}


def variables(point: Point) -> dict[str, Tensor]:
    """The point as fresh leaves of a graph.

    >>> variables({"a": torch.zeros(1)})["a"].requires_grad
    True
    """
    return {name: tensor.detach().requires_grad_() for name, tensor in point.items()}


def derivative(
    outputs: Sequence[Tensor],
    leaves: Point,
    weights: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """Gradient of ``sum_k weights_k . outputs_k`` in the leaves, zero where there is no path, also when there is none at all.

    >>> x = variables({"a": torch.ones(1), "unused": torch.ones(1)})
    >>> derivative([3 * x["a"].sum()], x)
    {'a': tensor([3.]), 'unused': tensor([0.])}
    """
    seeds = [torch.ones_like(output) for output in outputs] if weights is None else weights
    pairs = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(
        [output for output, _ in pairs],
        list(leaves.values()),
        [seed for _, seed in pairs],
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, gradients, strict=True))


def gradient(lens: Lens, batches: Iterable[Batch], point: Point | None = None) -> Point:
    """Gradient of the loss at ``point`` (default: the lens' own), summed or averaged over all images as the lens says.

    Raises JobError naming the batch when the loss is not finite.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import CrossEntropy
    >>> lens = Lens({"z": torch.zeros(1, 2)}, lambda x, batch: x["z"], CrossEntropy(), "sum")
    >>> gradient(lens, [ImageBatch(torch.zeros(1, 1), torch.tensor([0]))])["z"].tolist()
    [[-0.5, 0.5]]
    """
    if point is not None:
        require_same_structure(point, lens.at, "point")
    gather = Gather(lens)
    with twice_differentiable():
        for step in walk(lens, batches):
            leaves = variables(step.lens.at if point is None else step.part(point))
            logits = step.logits(leaves)
            dense = logits.detach() if point is None else step.lens.dense(step.batch)
            gather.add(step, derivative([_total_loss(step, logits, dense)], leaves))
    return gather.result()


def _total_loss(step: Step, logits: Tensor, dense: Tensor | None) -> Tensor:
    losses = step.lens.loss.per_image(logits, step.batch, dense)
    step.require_finite(losses, "loss")
    return losses.sum()


@dataclass(frozen=True, eq=False)
class _BatchedOperator(SymmetricOperator):
    """The walk that the operators of a lens share; each says what one batch's product is."""

    lens: Lens
    batches: Iterable[Batch]
    keep_graph: bool = field(default=False, kw_only=True)
    _kept: list[tuple[Step, _Product]] = field(default_factory=list, init=False, repr=False)

    @property
    def at(self) -> Point:
        """The point at which the curvature is taken."""
        return self.lens.at

    def __matmul__(self, vector: Point) -> Point:
        """The product with a vector, over all batches."""
        require_same_structure(vector, self.at)
        gather = Gather(self.lens)
        with twice_differentiable():
            for step, product in self._products():
                gather.add(step, product(step.part(vector)))
        return gather.result()

    def _products(self) -> Iterator[tuple[Step, _Product]]:
        if self._kept:
            yield from self._kept
            return
        fresh = ((step, self._product(step)) for step in walk(self.lens, self.batches))
        if self.keep_graph:
            # First complete, then kept: a batch that fails must not leave the ones before it behind as if they were all.
            self._kept.extend(list(fresh))
            yield from self._kept
        else:
            yield from fresh

    @abstractmethod
    def _product(self, step: Step) -> _Product:
        """Prepare one batch: the map from its part of a vector to the sum of its images' products."""


@dataclass(frozen=True, eq=False)
class Hessian(_BatchedOperator):
    """The exact Hessian of a lens' loss, ``H = d^2 L / dx^2`` at ``lens.at``, by Hessian-vector products.

    "reverse-over-reverse" differentiates the gradient's product with v; "forward-over-reverse" takes the
    directional derivative of the gradient (less memory on a GPU, slower for convolutions on a CPU).
    ``keep_graph`` builds each batch's graph once and keeps them all: about 1.5 times faster for repeated products
    on few batches, in reverse-over-reverse only. Batches are passed over once a product, in the same order
    each time. Raises UsageError for vectors of another shape, JobError naming the batch for a loss that is not finite.
    Source: Pearlmutter, Neural Computation 6(1), 1994.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import DenseKL
    >>> lens = Lens({"z": torch.zeros(1, 2)}, lambda x, batch: x["z"], DenseKL(), "sum")
    >>> Hessian(lens, [ImageBatch(torch.zeros(1, 1))]).dense().tolist()
    [[0.25, -0.25], [-0.25, 0.25]]
    """

    mode: Mode = "reverse-over-reverse"

    def __post_init__(self) -> None:
        """Refuse unknown modes, and kept graphs where there are none."""
        if self.mode not in ("reverse-over-reverse", "forward-over-reverse"):
            raise UsageError(f"there is no mode {self.mode!r}: choose 'reverse-over-reverse' or 'forward-over-reverse'")
        if self.keep_graph and self.mode != "reverse-over-reverse":
            raise UsageError("only reverse-over-reverse has a graph to keep")

    def _product(self, step: Step) -> _Product:
        return self._reverse(step) if self.mode == "reverse-over-reverse" else self._forward(step)

    def _reverse(self, step: Step) -> _Product:
        leaves = variables(step.lens.at)
        logits = step.logits(leaves)
        gradients = derivative([_total_loss(step, logits, logits.detach())], leaves, create_graph=True)
        names = list(leaves)
        return lambda v: derivative([gradients[k] for k in names], leaves, [v[k] for k in names], retain_graph=self.keep_graph)

    def _forward(self, step: Step) -> _Product:
        dense = step.lens.dense(step.batch)

        def total(point: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            losses = step.lens.loss.per_image(step.logits(point), step.batch, dense)
            return losses.sum(), losses

        def product(v: Point) -> Point:
            at, direction = dict(step.lens.at), {name: v[name] for name in step.lens.at}
            with warnings.catch_warnings():
                # On its first use torch scripts its own decompositions and warns about that.
                warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
                derivatives: Any = jvp(grad_and_value(total, has_aux=True), (at,), (direction,))
            (_, (_, losses)), (tangent, _) = derivatives
            step.require_finite(losses, "loss")
            return {name: part.detach() for name, part in tangent.items()}

        return product


@dataclass(frozen=True, eq=False)
class GaussNewton(_BatchedOperator):
    """The Gauss-Newton matrix ``G = sum_n J_n^T H_n J_n`` (or its mean), J = dz/dx, H_n the loss' Hessian in image n's logits.

    Positive semi-definite for the losses here, and equal to the Fisher matrix and to the Hessian of `DenseKL`.
    J v comes from differentiating ``u -> J^T u`` backwards, so no forward mode is needed. ``keep_graph`` as in `Hessian`.
    Raises UsageError for vectors of another shape, JobError naming the batch for logits that are not finite.
    Source: Schraudolph, Neural Computation 14(7), 2002; Martens, JMLR 21(146), 2020.

    >>> from hesper.curvature.batches import ImageBatch
    >>> from hesper.curvature.losses import CrossEntropy
    >>> lens = Lens({"z": torch.zeros(1, 2)}, lambda x, batch: 2 * x["z"], CrossEntropy(), "sum")
    >>> GaussNewton(lens, [ImageBatch(torch.zeros(1, 1))]).dense().tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """

    def _product(self, step: Step) -> _Product:
        leaves = variables(step.lens.at)
        logits = step.logits(leaves)
        step.require_finite(logits, "output")
        cotangent = torch.zeros_like(logits, requires_grad=True)
        pulled = derivative([logits], leaves, [cotangent], create_graph=True)
        names, constant = list(leaves), logits.detach()

        def product(v: Point) -> Point:
            pushed = derivative([pulled[k] for k in names], {"z": cotangent}, [v[k] for k in names], retain_graph=self.keep_graph)["z"]
            curved = step.lens.loss.output_hessian_product(constant, step.batch, pushed)
            return derivative([logits], leaves, [curved], retain_graph=self.keep_graph)

        return product
