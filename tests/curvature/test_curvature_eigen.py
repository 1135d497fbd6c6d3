"""Power iteration and Lanczos against dense eigenvalues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hesper.curvature import CrossEntropy, Hessian, MatrixOperator, axpy, lanczos, norm, power_iteration
from hesper.errors import JobError, UsageError
from oracles import dense_hessian, random_symmetric, with_eigenvalues
from tiny_models import tiny_batches, tiny_lens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("values", [(1.0, 2.0, 5.0), (1.0, 2.0, -5.0), (-1e-3, -2e-3), (7.0,)])
def test_power_iteration_finds_the_largest_magnitude_with_its_sign(values: tuple[float, ...]) -> None:
    a = with_eigenvalues(values)
    pair = power_iteration(MatrixOperator(a), generator(), tolerance=1e-9)
    assert pair.converged and pair.iterations < 60
    assert pair.value == pytest.approx(max(values, key=abs), rel=1e-9)
    x = pair.vector["x"]
    assert float(x.norm()) == pytest.approx(1)
    assert float((a @ x - pair.value * x).norm()) == pytest.approx(pair.residual, abs=1e-14)
    assert pair.residual <= 1e-9 * abs(pair.value)


def test_power_iteration_says_when_it_did_not_converge() -> None:
    a = with_eigenvalues((3.0, -2.9, 1.0))
    pair = power_iteration(MatrixOperator(a), generator(), max_iterations=5)
    assert not pair.converged and pair.iterations == 5 and pair.residual > 0.1
    x = pair.vector["x"]
    assert float((a @ x - pair.value * x).norm()) == pytest.approx(pair.residual)
    assert float(x @ a @ x) == pytest.approx(pair.value)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), d=st.integers(1, 8), iterations=st.integers(1, 10))
def test_some_eigenvalue_lies_within_the_residual(seed: int, d: int, iterations: int) -> None:
    a = random_symmetric(d, seed)
    truth = torch.linalg.eigvalsh(a)
    pair = power_iteration(MatrixOperator(a), generator(seed), max_iterations=iterations)
    assert float((truth - pair.value).abs().min()) <= pair.residual + 1e-12
    spectrum = lanczos(MatrixOperator(a), iterations, generator(seed))
    for value, residual in zip(spectrum.values, spectrum.residuals, strict=True):
        assert float((truth - value).abs().min()) <= float(residual) + 1e-12


def test_the_zero_operator_has_eigenvalue_zero() -> None:
    zero = MatrixOperator(torch.zeros(3, 3, dtype=torch.float64))
    pair = power_iteration(zero, generator())
    assert (pair.value, pair.residual, pair.iterations, pair.converged) == (0.0, 0.0, 1, True)
    spectrum = lanczos(zero, 3, generator())
    assert spectrum.values.tolist() == [0.0] and spectrum.breakdown


@pytest.mark.parametrize("d", [1, 2, 7, 30])
def test_lanczos_at_full_dimension_gives_all_eigenvalues(d: int) -> None:
    a = random_symmetric(d, d)
    spectrum = lanczos(MatrixOperator(a), 2 * d, generator())
    assert len(spectrum.values) == d and not spectrum.breakdown
    assert torch.allclose(spectrum.values, torch.linalg.eigvalsh(a), rtol=0, atol=1e-11)
    for index in range(d):
        x = spectrum.vector(index)["x"]
        assert float((a @ x - spectrum.values[index] * x).norm()) < 1e-11


def test_lanczos_finds_the_ends_of_a_wide_spectrum_early() -> None:
    a = with_eigenvalues([-40.0, *torch.linspace(-1, 1, 58).tolist(), 90.0])
    spectrum = lanczos(MatrixOperator(a), 12, generator())
    assert float(spectrum.values[0]) == pytest.approx(-40, abs=1e-9)
    assert float(spectrum.values[-1]) == pytest.approx(90, abs=1e-9)
    assert float(spectrum.residuals[-1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_stops_cleanly_in_an_invariant_subspace(dtype: torch.dtype) -> None:
    a = with_eigenvalues([-2.0] * 4 + [1.0] * 4 + [3.0] * 4).to(dtype)
    spectrum = lanczos(MatrixOperator(a), 10, generator())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert spectrum.breakdown and len(spectrum.values) == 3
    assert torch.allclose(spectrum.values, torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64), rtol=0, atol=tolerance)
    assert float(spectrum.residuals.max()) < 10 * tolerance


def test_both_work_on_a_real_hessian() -> None:
    lens, batches = tiny_lens("tokens", CrossEntropy(), 2), tiny_batches(2)
    truth = torch.linalg.eigvalsh(dense_hessian(lens, batches))
    operator = Hessian(lens, batches, keep_graph=True)
    pair = power_iteration(operator, generator(), tolerance=1e-8, max_iterations=500)
    assert pair.converged and pair.value == pytest.approx(float(truth[truth.abs().argmax()]), rel=1e-8)
    spectrum = lanczos(operator, 12, generator())
    assert float(spectrum.values[0]) == pytest.approx(float(truth[0]), rel=1e-8)
    assert float(spectrum.values[-1]) == pytest.approx(float(truth[-1]), rel=1e-8)
    top = spectrum.vector(-1)
    assert float(norm(axpy(-float(spectrum.values[-1]), top, operator @ top))) < 1e-8


def test_bad_requests_and_products_are_refused() -> None:
    broken = MatrixOperator(torch.full((2, 2), float("nan")))
    for call in (power_iteration, lambda op, g: lanczos(op, 2, g)):
        with pytest.raises(JobError, match="not finite"):
            call(broken, generator())
    with pytest.raises(UsageError, match="at least one iteration"):
        power_iteration(broken, generator(), max_iterations=0)
    with pytest.raises(UsageError, match="at least one step"):
        lanczos(broken, 0, generator())
