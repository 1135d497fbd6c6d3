"""Estimators: unbiased by exact enumeration, with the variance theory promises and errors that match the spread."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from hesper.curvature import (
    CrossEntropy,
    DenseKL,
    MatrixOperator,
    diagonal,
    diagonal_from_probes,
    fisher_diagonal,
    fisher_diagonal_exact,
    flatten,
    quadratic_scores,
    trace,
    trace_from_probes,
    unflatten,
)
from hesper.errors import JobError, UsageError
from oracles import dense_gauss_newton, random_symmetric, sign_vectors
from tiny_models import CLASSES, tiny_batches, tiny_lens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_trace_over_all_sign_vectors_is_exact_with_the_variance_of_theory(d: int) -> None:
    a = random_symmetric(d, seed=d)
    found = trace_from_probes(MatrixOperator(a), sign_vectors(d))
    assert found.n == 2**d
    assert found.mean == pytest.approx(float(a.trace()), abs=1e-12)
    variance = found.stderr**2 * (found.n - 1)  # of one probe, over the whole population
    assert variance == pytest.approx(2 * float(a.square().sum() - a.diagonal().square().sum()), abs=1e-12)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_diagonal_over_all_sign_vectors_is_exact_with_the_variance_of_theory(d: int) -> None:
    a = random_symmetric(d, seed=d)
    found = diagonal_from_probes(MatrixOperator(a), sign_vectors(d))
    assert torch.allclose(found.mean["x"], a.diagonal(), rtol=0, atol=1e-12)
    variance = found.stderr["x"].square() * (found.n - 1)
    assert torch.allclose(variance, a.square().sum(1) - a.diagonal().square(), rtol=1e-10, atol=1e-12)


def test_quadratic_scores_are_unbiased_over_all_block_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"x": torch.zeros(2, 3, 2, dtype=torch.float64)}  # 6 blocks of 2 numbers
    a, z = random_symmetric(12, 0), torch.randn(12, generator=generator(), dtype=torch.float64)
    everything = iter([{"x": signs["x"].reshape(2, 3)} for signs in sign_vectors(6)])
    monkeypatch.setattr("hesper.curvature.estimators.random_signs", lambda like, _: next(everything))
    found = quadratic_scores(MatrixOperator(a, at), unflatten(z, at), 2, 2**6, generator())
    blocks, parts = a.reshape(6, 2, 6, 2), z.reshape(6, 2)
    oracle = torch.stack([parts[i] @ blocks[i, :, i] @ parts[i] for i in range(6)]).reshape(2, 3)
    assert torch.allclose(found.mean["x"], oracle, rtol=0, atol=1e-12)


def test_quadratic_scores_refuse_blocks_that_do_not_exist() -> None:
    point = {"x": torch.zeros(3)}
    with pytest.raises(UsageError, match="blocks of 2 leading dimensions"):
        quadratic_scores(MatrixOperator(torch.eye(3)), point, 2, 1, generator())


def test_random_probes_agree_with_the_truth_within_their_error() -> None:
    a = random_symmetric(6, 1)
    found = trace(MatrixOperator(a), 400, generator())
    assert abs(found.mean - float(a.trace())) < 4 * found.stderr
    spots = diagonal(MatrixOperator(a), 400, generator())
    assert bool(((spots.mean["x"] - a.diagonal()).abs() < 4 * spots.stderr["x"]).all())


def test_the_error_of_the_trace_matches_the_spread_of_repeated_runs() -> None:
    operator = MatrixOperator(random_symmetric(6, 2))
    runs = [trace(operator, 16, generator(seed)) for seed in range(200)]
    spread = float(torch.tensor([run.mean for run in runs]).std())
    claimed = float(torch.tensor([run.stderr for run in runs]).square().mean().sqrt())
    assert claimed == pytest.approx(spread, rel=0.2)


def test_one_sample_has_an_unknown_error_and_none_is_refused() -> None:
    operator = MatrixOperator(torch.eye(3))
    assert math.isnan(trace(operator, 1, generator()).stderr)
    with pytest.raises(UsageError, match="at least one probe"):
        trace(operator, 0, generator())


@dataclass(frozen=True)
class ChosenClasses(DenseKL):
    """A loss that "draws" the classes it is told, for one batch."""

    classes: tuple[int, ...] = ()

    def sample_output_gradients(self, logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        return self.output_gradients(logits, torch.tensor(self.classes).expand(draws, -1))


@pytest.mark.parametrize("kind", ["weights", "tokens", "heads"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_one_draw_of_the_fisher_diagonal_is_unbiased_over_all_draws(kind: str, temperature: float) -> None:
    images, batches = 2, tiny_batches(2)
    lens = tiny_lens(kind, DenseKL(temperature), images)
    p = lens.loss.probabilities(lens.logits(lens.at, batches[0]))
    average = torch.zeros_like(flatten(lens.at))
    for classes in product(range(CLASSES), repeat=images):
        told = tiny_lens(kind, ChosenClasses(temperature, classes), images)
        weight = math.prod(float(p[image, c]) for image, c in enumerate(classes))
        average += weight * flatten(fisher_diagonal(told, batches, 1, generator()).mean)
    exact = flatten(fisher_diagonal_exact(lens, batches))
    assert float((average - exact).norm()) <= 1e-12 * float(exact.norm())


@pytest.mark.parametrize("kind", ["weights", "tokens", "heads", "activations"])
@pytest.mark.parametrize("loss", [CrossEntropy(), DenseKL(4.0)], ids=str)
def test_the_exact_fisher_diagonal_is_that_of_gauss_newton(kind: str, loss: CrossEntropy | DenseKL) -> None:
    lens, batches = tiny_lens(kind, loss, 3), tiny_batches(2, 1)
    exact = flatten(fisher_diagonal_exact(lens, batches))
    oracle = dense_gauss_newton(lens, batches, getattr(loss, "temperature", 1.0)).diagonal()
    assert float((exact - oracle).norm()) <= 1e-12 * float(oracle.norm())


@pytest.mark.parametrize("kind", ["weights", "tokens"])
def test_the_error_of_the_fisher_diagonal_matches_the_spread(kind: str) -> None:
    lens, batches = tiny_lens(kind, DenseKL(), 3), tiny_batches(2, 1)
    runs = [fisher_diagonal(lens, batches, 8, generator(seed)) for seed in range(60)]
    spread = torch.stack([flatten(run.mean) for run in runs]).var(0).sum()
    claimed = torch.stack([flatten(run.stderr).square() for run in runs]).mean(0).sum()
    assert float(claimed) == pytest.approx(float(spread), rel=0.3)
    exact, average = flatten(fisher_diagonal_exact(lens, batches)), torch.stack([flatten(run.mean) for run in runs]).mean(0)
    assert float((average - exact).norm()) < 5 * float((spread / 60).sqrt())


def test_fisher_refuses_no_draws_and_names_the_faulty_batch() -> None:
    lens, batches = tiny_lens("tokens", DenseKL(), 3), tiny_batches(2, 1)
    with pytest.raises(UsageError, match="at least one draw"):
        fisher_diagonal(lens, batches, 0, generator())
    assert math.isnan(float(fisher_diagonal(lens, batches, 1, generator()).stderr["tokens0"][0, 0]))
    batches[1].images.fill_(float("nan"))
    with pytest.raises(JobError, match="batch 1 is not finite"):
        fisher_diagonal(lens, batches, 2, generator())
    with pytest.raises(JobError, match="batch 1 is not finite"):
        fisher_diagonal_exact(lens, batches)
