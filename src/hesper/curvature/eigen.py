"""Extreme eigenvalues of a symmetric operator: power iteration and Lanczos, both with residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.curvature.operators import SymmetricOperator
from hesper.curvature.points import Point, axpy, dot, flatten, norm, random_normal, scale, size, unflatten
from hesper.errors import JobError, UsageError


@dataclass(frozen=True, eq=False)
class EigenPair:
    """An approximate eigenpair; some eigenvalue of the operator lies within ``residual`` of ``value``.

    value: the Rayleigh quotient, with its sign.  vector: of unit length.  residual: ``||A v - value v||``.
    iterations: products spent.  converged: whether the residual reached the tolerance.

    >>> EigenPair(2.0, {"x": torch.ones(1)}, residual=0.0, iterations=1, converged=True).value
    2.0
    """

    value: float
    vector: Point
    residual: float
    iterations: int
    converged: bool


def power_iteration(
    operator: SymmetricOperator, generator: torch.Generator, *, tolerance: float = 1e-4, max_iterations: int = 200
) -> EigenPair:
    """The eigenvalue of largest magnitude, which may be negative, by repeated products from a random start.

    Stops when ``||A v - lambda v|| <= tolerance * |lambda|`` (float32 products seldom allow less than 1e-5), or after
    ``max_iterations`` with ``converged`` False, as
    happens when two eigenvalues of nearly the same magnitude compete (Lanczos separates those). Raises JobError when a
    product is not finite. Source: Golub and Van Loan, Matrix Computations, section 8.2.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> pair = power_iteration(MatrixOperator(torch.diag(torch.tensor([1.0, -3.0]))), torch.Generator().manual_seed(0))
    >>> round(pair.value, 5), pair.converged
    (-3.0, True)
    """
    if max_iterations < 1:
        raise UsageError(f"at least one iteration is needed, not {max_iterations}")
    vector: Point = random_normal(operator.at, generator)
    vector = scale(1 / norm(vector), vector)
    for iteration in range(1, max_iterations + 1):
        product = operator @ vector
        value, length = float(dot(vector, product)), float(norm(product))
        _require_finite(length)
        residual = float(norm(axpy(-value, vector, product)))
        converged = residual <= tolerance * abs(value)
        if converged or iteration == max_iterations:
            break
        vector = scale(1 / length, product)
    return EigenPair(value, vector, residual, iteration, converged)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Ritz values of a Lanczos run, ascending, each with an eigenvalue within its residual.

    values, residuals: [steps], float64.  breakdown: the run met an invariant subspace before it was asked to stop; its
    Ritz values are then eigenvalues, though copies of a repeated one are found once only.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> spectrum = lanczos(MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), 2, torch.Generator().manual_seed(0))
    >>> [round(value, 5) for value in spectrum.values.tolist()]
    [1.0, 2.0]
    """

    values: Tensor
    residuals: Tensor
    breakdown: bool
    basis: Tensor
    coefficients: Tensor
    at: Point

    def vector(self, index: int) -> Point:
        """The Ritz vector of ``values[index]``, of unit length."""
        return unflatten(self.basis.T @ self.coefficients[:, index].to(self.basis), self.at)


def lanczos(operator: SymmetricOperator, steps: int, generator: torch.Generator) -> Spectrum:
    """Ritz values after ``steps`` products (fewer on breakdown), with residual bounds ``|beta_k s_ki|``.

    Every new direction is orthogonalised twice against all before it, so no false copies appear; memory is ``steps`` vectors.
    The run never takes more steps than there are numbers. Raises UsageError for steps < 1, JobError when a
    product is not finite. Source: Parlett, The Symmetric Eigenvalue Problem, chapter 13.

    >>> from hesper.curvature.operators import MatrixOperator
    >>> lanczos(MatrixOperator(torch.eye(5)), 3, torch.Generator().manual_seed(0)).breakdown
    True
    """
    if steps < 1:
        raise UsageError(f"at least one step is needed, not {steps}")
    steps = min(steps, size(operator.at))
    direction = flatten(random_normal(operator.at, generator))
    basis, diagonal, off_diagonal = [direction / direction.norm()], [], []
    rounding = 10 * float(torch.finfo(direction.dtype).eps) * size(operator.at) ** 0.5
    largest = 0.0
    while True:
        remainder = flatten(operator @ unflatten(basis[-1], operator.at))
        _require_finite(float(remainder.norm()))
        largest = max(largest, float(remainder.norm()))
        diagonal.append(float(basis[-1] @ remainder))
        known = torch.stack(basis)
        for _ in range(2):
            remainder = remainder - known.T @ (known @ remainder)
        beta = float(remainder.norm())
        invariant = beta <= rounding * largest
        if invariant or len(basis) == steps:
            break
        off_diagonal.append(beta)
        basis.append(remainder / beta)
    return _ritz(operator.at, known, diagonal, off_diagonal, beta, breakdown=invariant and len(basis) < steps)


def _ritz(at: Point, basis: Tensor, diagonal: list[float], off_diagonal: list[float], beta: float, *, breakdown: bool) -> Spectrum:
    off = torch.tensor(off_diagonal, dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, coefficients = torch.linalg.eigh(tridiagonal)
    return Spectrum(values, (beta * coefficients[-1]).abs(), breakdown, basis, coefficients, at)


def _require_finite(length: float) -> None:
    if not length < float("inf"):
        raise JobError("a product with the operator is not finite")
