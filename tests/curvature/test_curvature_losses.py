"""Losses against their definitions: value, gradient, Hessian in the logits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesper.curvature import CrossEntropy, DenseKL, ImageBatch, Loss, draw_classes
from hesper.errors import UsageError
from oracles import output_hessians

BATCH = ImageBatch(torch.zeros(4, 1), torch.tensor([0, 4, 2, 1]))
LOSSES = (CrossEntropy(), DenseKL(), DenseKL(4.0), DenseKL(0.5))


def logits(seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_output_hessian_is_the_second_derivative_of_the_loss(loss: Loss) -> None:
    z, v, dense = logits(0), logits(1), logits(2)
    hessian = torch.autograd.functional.hessian(lambda x: loss.per_image(x, BATCH, dense).sum(), z)
    oracle = torch.einsum("ncmd,md->nc", hessian, v)
    assert torch.allclose(loss.output_hessian_product(z, BATCH, v), oracle, rtol=0, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_output_gradients_are_those_of_minus_log_probability(loss: Loss) -> None:
    z, classes = logits(0).requires_grad_(), torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    temperature = getattr(loss, "temperature", 1.0)
    for row, found in zip(classes, loss.output_gradients(z, classes), strict=True):
        picked = -(z / temperature).log_softmax(1)[torch.arange(4), row].sum()
        (oracle,) = torch.autograd.grad(picked, z)
        assert torch.allclose(found, oracle, rtol=0, atol=1e-14)
        assert not found.requires_grad


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_covariance_of_output_gradients_is_the_output_hessian(loss: Loss) -> None:
    z = logits(3)
    every = loss.output_gradients(z, torch.arange(5)[:, None].expand(5, 4))
    p = loss.probabilities(z).T
    assert float((p[:, :, None] * every).sum(0).abs().max()) < 1e-14
    covariance = torch.einsum("kn,knc,knd->ncd", p, every, every)
    assert torch.allclose(covariance, output_hessians(z, getattr(loss, "temperature", 1.0)), rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.01, 50), st.floats(0.25, 16), st.sampled_from(["float32", "float64"]))
def test_drift_is_exactly_zero_with_zero_gradient_at_the_dense_logits(seed: int, spread: float, temperature: float, dtype: str) -> None:
    dense = logits(seed, spread).to(getattr(torch, dtype))
    z = dense.clone().requires_grad_()
    drift = DenseKL(temperature).per_image(z, BATCH, dense)
    (slope,) = torch.autograd.grad(drift.mean(), z)
    assert bool((drift == 0).all()) and bool((slope == 0).all())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), temperature=st.floats(0.5, 8))
def test_drift_equals_its_definition(seed: int, temperature: float) -> None:
    z, dense = logits(seed), logits(seed + 1)
    p, p0 = (z / temperature).softmax(1), (dense / temperature).softmax(1)
    oracle = (p0 * (p0.log() - p.log())).sum(1)
    found = DenseKL(temperature).per_image(z, BATCH, dense)
    assert torch.allclose(found, oracle, rtol=1e-12, atol=1e-14)
    assert bool((found >= 0).all())


def test_small_drift_survives_single_precision() -> None:
    dense = logits(0).float()
    moved = dense + 1e-2 * logits(1).float()
    double = DenseKL().per_image(moved.double(), BATCH, dense.double())
    assert float((DenseKL().per_image(moved, BATCH, dense) - double).abs().max()) < 1e-6


@pytest.mark.parametrize("labels", [[0, 1, 2, 5], [0, -1, 2, 3], [-100, 0, 0, 0]])
def test_labels_out_of_range_are_refused(labels: list[int]) -> None:
    with pytest.raises(UsageError, match=r"labels run from -?\d+ to \d, the model has classes 0 to 4"):
        CrossEntropy().per_image(logits(0), ImageBatch(BATCH.images, torch.tensor(labels)))


def test_missing_and_misshapen_labels_are_refused() -> None:
    with pytest.raises(UsageError, match="needs labels"):
        CrossEntropy().per_image(logits(0), ImageBatch(BATCH.images))
    with pytest.raises(UsageError, match="4 images need 4 whole numbers"):
        CrossEntropy().per_image(logits(0), ImageBatch(BATCH.images, torch.tensor([0, 1])))
    with pytest.raises(UsageError, match="float"):
        CrossEntropy().per_image(logits(0), ImageBatch(BATCH.images, torch.zeros(4)))


def test_drift_refuses_missing_dense_logits_and_bad_temperatures() -> None:
    with pytest.raises(UsageError, match="was given none"):
        DenseKL().per_image(logits(0), BATCH)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="must be positive"):
            DenseKL(temperature)


def test_classes_are_drawn_with_their_probabilities() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    drawn = draw_classes(p, 1000, torch.Generator().manual_seed(0))
    assert drawn.shape == (1000, 2)
    assert set(drawn[:, 0].tolist()) == {0, 1} and set(drawn[:, 1].tolist()) == {2}
    assert abs(float((drawn[:, 0] == 0).double().mean()) - 0.5) < 0.1
    with pytest.raises(UsageError, match="at least one draw"):
        draw_classes(p, 0, torch.Generator())
