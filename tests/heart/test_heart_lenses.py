"""Derivatives of a real (tiny) vision transformer through every lens, against dense Hessians and finite differences."""

import pytest
import torch

from hesper.curvature import CrossEntropy, DenseKL, GaussNewton, Hessian, fisher_diagonal_exact, gradient, weight_lens
from hesper.curvature.points import flatten, random_normal
from hesper.heart.gated import HEAD_GATES, HEAD_SHIFTS, TOKEN_GATES, TOKEN_SHIFTS
from hesper.heart.lenses import gated_lens
from oracles import dense_hessian
from vits import tiny_batch, tiny_host

KINDS = (TOKEN_GATES, HEAD_GATES, TOKEN_SHIFTS, HEAD_SHIFTS)


def lens_of(kind, loss, host_kind="plain", images=2):
    host, batch = tiny_host(host_kind), tiny_batch(images)
    return gated_lens(host, images, loss, kind, like=batch.images), batch


@pytest.mark.parametrize("host_kind", ["plain", "pooled"])
@pytest.mark.parametrize("loss", [CrossEntropy(), DenseKL(4.0)], ids=["ce", "kl"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_the_dense_hessian(kind, loss, host_kind):
    lens, batch = lens_of(kind, loss, host_kind, images=1)
    dense = dense_hessian(lens, [batch])
    for mode in ("reverse-over-reverse", "forward-over-reverse"):
        v = random_normal(lens.at, torch.Generator().manual_seed(1))
        product = flatten(Hessian(lens, [batch], mode) @ v)
        assert (product - dense @ flatten(v)).norm() <= 1e-10 * max(1.0, float(dense.norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_products_follow_finite_differences_of_the_gradient(kind):
    lens, batch = lens_of(kind, CrossEntropy())
    v = random_normal(lens.at, torch.Generator().manual_seed(2))
    unit = {name: value / flatten(v).norm() for name, value in v.items()}
    step = 1e-5
    ahead, behind = (gradient(lens, [batch], {n: lens.at[n] + sign * step * unit[n] for n in unit}) for sign in (1, -1))
    difference = (flatten(ahead) - flatten(behind)) / (2 * step)
    assert torch.allclose(flatten(Hessian(lens, [batch]) @ unit), difference, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_label_free_hessian_is_the_gauss_newton_matrix_and_its_diagonal_the_fisher(kind):
    lens, batch = lens_of(kind, DenseKL(4.0), images=1)
    hessian = dense_hessian(lens, [batch])
    assert float(flatten(gradient(lens, [batch])).abs().max()) == 0.0
    assert torch.allclose(GaussNewton(lens, [batch]).dense(), hessian, atol=1e-12)
    assert torch.allclose(flatten(fisher_diagonal_exact(lens, [batch])), hessian.diagonal(), atol=1e-12)


def test_weight_lens_of_a_transformer_equals_its_dense_hessian():
    host, batch = tiny_host(), tiny_batch(2)
    lens = weight_lens(host.module, CrossEntropy(), ["head.weight", "blocks.1.norm1.weight"])
    dense = dense_hessian(lens, [batch])
    v = random_normal(lens.at, torch.Generator().manual_seed(3))
    assert (flatten(Hessian(lens, [batch]) @ v) - dense @ flatten(v)).norm() <= 1e-10 * float(dense.norm())
