"""Prices against their definitions: dense Hessians, enumeration over classes and signs, true deletion."""

import itertools

import pytest
import torch

from hesper.curvature import CrossEntropy, DenseKL, ImageBatch, gradient
from hesper.errors import UsageError
from hesper.heart.criteria import Criterion, sensitivity, stream_curvature
from hesper.heart.gated import HEAD_GATES, HEAD_SHIFTS, TOKEN_GATES, TOKEN_SHIFTS, gated_forward
from hesper.heart.lenses import gated_lens
from oracles import dense_hessian
from vits import tiny_batch, tiny_host

COPIES = 100


def copies_of(batch):
    """The same image many times: as many independent draws at the cost of one batch."""
    return ImageBatch(batch.images.expand(COPIES, -1, -1, -1), batch.labels.expand(COPIES))


def agrees(found, truth):
    """Whether the mean over copies lies within five standard errors of the truth, everywhere."""
    error = found.std(0) / COPIES**0.5
    return bool(((found.mean(0) - truth).abs() <= 5 * error + 1e-12).all())


def diagonal_of(name, loss, host, batch):
    lens = gated_lens(host, 1, loss, name, like=batch.images)
    return dense_hessian(lens, [batch]).diagonal().view_as(lens.at[name]), gradient(lens, [batch])[name]


def test_label_free_price_is_half_the_fisher_diagonal_on_average():
    host, batch = tiny_host(), tiny_batch(1)
    found = sensitivity(host, copies_of(batch), Criterion("kl", 2.0, 20), torch.Generator().manual_seed(0))
    tokens, _ = diagonal_of(TOKEN_GATES, DenseKL(2.0), host, batch)
    heads, _ = diagonal_of(HEAD_GATES, DenseKL(2.0), host, batch)
    assert agrees(found.tokens, tokens[0] / 2)
    assert agrees(found.heads, heads[0] / 2)


def test_labelled_price_keeps_the_gradient_and_averages_to_the_hessian_diagonal():
    host, batch = tiny_host(), tiny_batch(1)
    found = sensitivity(host, copies_of(batch), Criterion("ce", draws=6), torch.Generator().manual_seed(0))
    for name, price in ((TOKEN_GATES, found.tokens), (HEAD_GATES, found.heads)):
        diagonal, slope = diagonal_of(name, CrossEntropy(), host, batch)
        assert agrees(price, (diagonal / 2 - slope)[0])
        assert float(slope.abs().max()) > 1e-4


def test_heart_score_averages_to_half_of_z_h_z_of_each_activation():
    host, batch = tiny_host(), tiny_batch(1)
    found = sensitivity(host, copies_of(batch), Criterion("heart", draws=6), torch.Generator().manual_seed(0))
    trace = gated_forward(host, batch.images)
    streams, outputs = torch.stack(trace.streams, 1), torch.stack(trace.head_outputs, 1)
    for name, z, price, skip in (
        (TOKEN_SHIFTS, streams, found.tokens, host.anatomy.prefix_tokens),
        (HEAD_SHIFTS, outputs, found.heads, 0),
    ):
        lens = gated_lens(host, 1, CrossEntropy(), name, like=batch.images)
        hessian = dense_hessian(lens, [batch])
        places = list(itertools.product(*(range(n) for n in z.shape[1:3])))
        index = torch.arange(z.numel()).view_as(z)
        truth = torch.zeros(z.shape[1:3], dtype=z.dtype)
        for a, b in places:
            own = index[0, a, b].flatten()
            vector = z[0, a, b].flatten()
            truth[a, b] = vector @ hessian[own][:, own] @ vector / 2
        assert agrees(price, truth[:, skip:])


def test_label_free_stream_curvature_is_the_trace_and_sum_of_the_fisher_blocks():
    host, batch = tiny_host(), tiny_batch(1)
    found = stream_curvature(host, copies_of(batch), Criterion("kl", 2.0, 20), torch.Generator().manual_seed(0))
    prefix, width = host.anatomy.prefix_tokens, host.anatomy.width
    lens = gated_lens(host, 1, DenseKL(2.0), TOKEN_SHIFTS, like=batch.images)
    hessian = dense_hessian(lens, [batch])
    index = torch.arange(len(hessian)).view(lens.at[TOKEN_SHIFTS].shape[1:])
    strength, moment = torch.zeros_like(found.strength[0]), torch.zeros_like(found.second_moment)
    for layer, token in itertools.product(range(host.anatomy.depth), range(prefix, host.anatomy.tokens)):
        own = hessian[index[layer, token]][:, index[layer, token]]
        strength[layer, token - prefix] = own.trace()
        moment[layer] += own
    assert agrees(found.strength, strength)
    assert torch.allclose(found.second_moment / COPIES, moment, atol=0.1 * float(moment.abs().max()))
    assert torch.allclose(found.second_moment.diagonal(dim1=1, dim2=2).sum(-1), found.strength.sum((0, 2)))
    # Nobody reads the patches of the last block: their curvature is exactly zero.
    assert float(found.strength[:, -1].abs().max()) == 0.0
    assert moment.shape[-1] == width


def test_labelled_stream_curvature_is_the_outer_product_of_label_gradients():
    host, batch = tiny_host(), tiny_batch(2)
    found = stream_curvature(host, batch, Criterion("ce"), torch.Generator())
    lens = gated_lens(host, 2, CrossEntropy(), TOKEN_SHIFTS, like=batch.images)
    slope = gradient(lens, [batch])[TOKEN_SHIFTS][:, :, host.anatomy.prefix_tokens :]
    assert torch.allclose(found.second_moment, torch.einsum("nlid,nlie->lde", slope, slope))
    assert torch.allclose(found.strength, slope.square().sum(-1))


def test_isotropic_curvature_of_heart_returns_the_score_along_the_activation():
    host, batch = tiny_host(), tiny_batch(1)
    price = sensitivity(host, batch, Criterion("heart", draws=2), torch.Generator().manual_seed(3)).tokens
    found = stream_curvature(host, batch, Criterion("heart", draws=2), torch.Generator().manual_seed(3))
    z = torch.stack(gated_forward(host, batch.images).streams, 1)[:, :, host.anatomy.prefix_tokens :]
    per_direction = found.strength / host.anatomy.width
    assert torch.allclose(per_direction * z.square().sum(-1), (2 * price).clamp_min(0))


def test_prices_predict_small_true_deletions():
    """Second order is exact in the limit: half-closing a gate costs a quarter of the price, up to third order."""
    host, batch = tiny_host(), tiny_batch(1)
    truth, _ = diagonal_of(HEAD_GATES, DenseKL(), host, batch)
    lens = gated_lens(host, 1, DenseKL(), HEAD_GATES, like=batch.images)
    step = 1e-3
    for head in range(host.anatomy.heads):
        gates = lens.at[HEAD_GATES].clone()
        gates[0, 0, head] -= step
        assert float(lens.value({HEAD_GATES: gates}, batch)) == pytest.approx(float(truth[0, 0, head]) * step**2 / 2, rel=0.05)


def test_labels_are_demanded_where_they_are_needed():
    host, batch = tiny_host(), tiny_batch(1)
    with pytest.raises(UsageError, match="labels"):
        sensitivity(host, ImageBatch(batch.images), Criterion("ce"), torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="did you mean 'heart'"):
        Criterion("hart")
