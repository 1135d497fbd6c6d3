"""The metric in few dimensions, the ridge, and the price of a plan."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesper.curvature import CrossEntropy, DenseKL, ImageBatch, gradient
from hesper.graft import graft
from hesper.heart.gated import TOKEN_GATES, gated_forward, ones
from hesper.heart.lenses import gated_lens
from hesper.heart.metric import metric_root
from hesper.heart.price import group_mean, plan_price, plan_step
from hesper.heart.ridge import Ridge
from hesper.hosts import open_host
from hesper.plan import HeadCut
from oracles import dense_hessian
from vits import cuts_of, pictures, plan_for, tables, tiny_batch, tiny_host, vit


def positive(width, seed):
    factor = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


@given(seed=st.integers(0, 1000), width=st.integers(2, 7))
def test_full_rank_distances_are_half_the_quadratic_form(seed, width):
    metric, covariance = positive(width, seed), positive(width, seed + 1)
    root = metric_root(metric, covariance, width)
    assert torch.allclose(root @ root.T, metric / 2, atol=1e-9 * float(metric.norm()))


@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
def test_no_projection_of_the_same_rank_keeps_more_of_the_expected_price(seed, rank):
    metric, covariance = positive(6, seed), positive(6, seed + 1)
    root = metric_root(metric, covariance, rank)
    kept = torch.trace(root.T @ covariance @ root)
    values, vectors = torch.linalg.eigh(metric / 2)
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    assert kept <= torch.trace(metric @ covariance) / 2 + 1e-9
    for other in range(20):
        noise = torch.randn(6, rank, generator=torch.Generator().manual_seed(other), dtype=torch.float64)
        basis, _ = torch.linalg.qr(noise)
        assert torch.trace(basis.T @ half @ covariance @ half @ basis) <= kept + 1e-9


def test_ridge_in_batches_equals_the_closed_form_on_everything():
    generator = torch.Generator().manual_seed(0)
    features, noise = torch.randn(60, 4, generator=generator), torch.randn(60, generator=generator)
    target = features @ torch.tensor([1.0, -2.0, 0.0, 3.0]) + 5 + 0.1 * noise
    fit = Ridge(4)
    for start in range(0, 60, 7):
        fit.add(features[start : start + 7], target[start : start + 7])
    weights, offset, explained = fit.solve(ridge=2.0)
    centred, mean = (features - features.mean(0)).double(), target.mean().double()
    expected = torch.linalg.solve(centred.T @ centred + 2 * torch.eye(4, dtype=torch.float64), centred.T @ (target - mean).double())
    residual = target - (features.double() @ weights + offset)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert explained == pytest.approx(float(1 - residual.square().sum() / (target - mean).double().square().sum()), abs=1e-6)
    assert offset == pytest.approx(float(mean - features.mean(0).double() @ expected), abs=1e-5)


def test_a_feature_that_never_varies_gets_no_weight():
    fit = Ridge(2)
    fit.add(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([0.0, 2.0, 4.0]))
    weights, offset, _ = fit.solve(ridge=0.0)
    assert torch.allclose(weights, torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert offset == pytest.approx(0.0)


@pytest.mark.parametrize("loss", [DenseKL(4.0), CrossEntropy()], ids=["kl", "ce"])
def test_price_of_a_dropping_plan_is_the_dense_quadratic_form(loss):
    host, batch = tiny_host(), tiny_batch(1)
    plan = plan_for(host.module, cuts_of("drop", [0], remove=2), criterion="cls")
    cut = graft(host.module, plan)
    step = plan_step(host, cut, batch.images)
    assert set(step) == {TOKEN_GATES}
    assert float(step[TOKEN_GATES].sum()) == -2.0
    lens = gated_lens(host, 1, loss, TOKEN_GATES, like=batch.images)
    v, slope = step[TOKEN_GATES].flatten(), gradient(lens, [batch])[TOKEN_GATES].flatten()
    expected = slope @ v + v @ dense_hessian(lens, [batch]) @ v / 2
    assert torch.allclose(plan_price(host, cut, batch, loss), expected[None], atol=1e-12)


@pytest.mark.parametrize("criterion", ["kl", "tome"])
def test_step_of_a_merging_plan_carries_tokens_to_where_their_group_goes(criterion):
    model = vit("plain")
    host, images = open_host(model.requires_grad_(False)), pictures(3)
    cut = graft(model, plan_for(model, cuts_of("merge", [1], remove=3), criterion), tables(model))
    step = plan_step(host, cut, images)
    with torch.no_grad():
        place = cut.run(images, trace=True).sources[1]
        stream = gated_forward(host, images).streams[1][:, 1:]
    (name,) = step
    for image in range(3):
        for patch in range(12):
            group = [other for other in range(12) if place[image, other] == place[image, patch]]
            mean = stream[image, group].mean(0)
            if criterion == "kl":
                mean = mean / mean.norm() * stream[image, group].norm(dim=1).mean()
            moved = mean - stream[image, patch]
            assert torch.allclose(step[name][image, 1, patch + 1], moved, atol=1e-5)


def test_removed_heads_are_priced_with_their_interaction():
    host, batch = tiny_host(), tiny_batch(2)
    both = plan_for(host.module, heads=[HeadCut(0, (0,)), HeadCut(1, (1,))])
    prices = {}
    for name, heads in (("both", both.heads), ("first", both.heads[:1]), ("second", both.heads[1:])):
        cut = graft(host.module, dataclasses.replace(both, heads=heads))
        prices[name] = plan_price(host, cut, batch, DenseKL())
    assert bool((prices["first"] > 0).all())
    assert bool(((prices["both"] - prices["first"] - prices["second"]).abs() > 1e-9).all())


def test_price_predicts_the_loss_of_a_nearly_closed_gate():
    """The quadratic form is the limit of the true loss: a small step costs what it says."""
    host, batch = tiny_host(), ImageBatch(tiny_batch(1).images)
    gates = ones(host, 1, TOKEN_GATES, like=batch.images)
    lens = gated_lens(host, 1, DenseKL(), TOKEN_GATES, like=batch.images)
    v = torch.zeros_like(gates[TOKEN_GATES])
    v[0, 0, 1:3] = -1e-3
    hessian = dense_hessian(lens, [batch_with_label(batch)])
    expected = float(v.flatten() @ hessian @ v.flatten() / 2)
    assert float(lens.value({TOKEN_GATES: gates[TOKEN_GATES] + v}, batch)) == pytest.approx(expected, rel=0.02)


def batch_with_label(batch):
    return ImageBatch(batch.images, torch.zeros(len(batch.images), dtype=torch.long))


def test_group_mean_ignores_dropped_tokens():
    tokens = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert group_mean(tokens, torch.tensor([[0, 0, -1]]))[0, :2].flatten().tolist() == [2.0, 2.0]
