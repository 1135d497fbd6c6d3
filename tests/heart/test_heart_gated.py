from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesper.heart.gated import HEAD_GATES, HEAD_SHIFTS, TOKEN_GATES, TOKEN_SHIFTS, gated_forward, ones
from hesper.hosts import open_host
from vits import KINDS, attention_by_hand, feed_by_hand, logits_by_hand, pictures, vit

ALL = (TOKEN_GATES, HEAD_GATES, TOKEN_SHIFTS, HEAD_SHIFTS)
DOUBLE = torch.float64


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_at_ones_it_is_the_host_bit_for_bit(kind: str) -> None:
    model, images = vit(kind), pictures(3)
    host = open_host(model)
    assert torch.equal(gated_forward(host, images).logits, model(images))
    for name in ALL:
        assert torch.equal(gated_forward(host, images, ones(host, 3, name, like=images)).logits, model(images)), name
    assert torch.equal(gated_forward(host, images, ones(host, 3, *ALL, like=images)).logits, model(images))


def without(model: torch.nn.Module, image: Tensor, deleted: dict[int, list[int]]) -> Tensor:
    """Logits of one image whose patches ``deleted[block]`` are physically taken out after that block's attention."""
    stream = open_host(model).embed(image[None])[0]
    left = list(range(len(stream)))
    for index, block in enumerate(model.blocks):
        stream = attention_by_hand(block, stream, torch.ones(len(stream), dtype=DOUBLE))
        gone = {patch + model.num_prefix_tokens for patch in deleted.get(index, [])}
        keep = [place for place, token in enumerate(left) if token not in gone]
        left = [left[place] for place in keep]
        stream = feed_by_hand(block, stream[keep])
    return logits_by_hand(model, stream, torch.ones(len(stream), dtype=DOUBLE))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_gate_of_zero_deletes_the_token_after_its_block(kind: str) -> None:
    model, images = vit(kind, DOUBLE), pictures(2, DOUBLE)
    host = open_host(model)
    deleted = [{0: [2, 7], 2: [5]}, {1: [0, 1, 2, 3], 3: [11]}]
    gates = ones(host, 2, TOKEN_GATES, like=images)
    for image, cuts in enumerate(deleted):
        for block, patches in cuts.items():
            gates[TOKEN_GATES][image, block, patches] = 0
    expected = torch.stack([without(model, image, cuts) for image, cuts in zip(images, deleted, strict=True)])
    torch.testing.assert_close(gated_forward(host, images, gates).logits, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_after_the_last_block_only_a_pooling_classifier_misses_a_token() -> None:
    for kind, misses in (("plain", False), ("pooled", True)):
        model, images = vit(kind, DOUBLE), pictures(1, DOUBLE)
        gates = ones(open_host(model), 1, TOKEN_GATES, like=images)
        gates[TOKEN_GATES][:, -1, 4] = 0
        assert (not torch.allclose(gated_forward(open_host(model), images, gates).logits, model(images))) == misses


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "pooled"])
@torch.no_grad()
def test_an_integer_gate_counts_a_token_that_many_times(kind: str) -> None:
    model, image = vit(kind, DOUBLE), pictures(1, DOUBLE)
    host = open_host(model)
    gates = ones(host, 1, TOKEN_GATES, like=image)
    gates[TOKEN_GATES][0, 0, 3], gates[TOKEN_GATES][0, 1, 3] = 3, 2
    copies = torch.ones(host.anatomy.tokens, dtype=DOUBLE)
    stream = host.embed(image)[0]
    for index, block in enumerate(model.blocks):
        stream = feed_by_hand(block, attention_by_hand(block, stream, copies))
        copies[host.anatomy.prefix_tokens + 3] = (3, 6, 6, 6)[index]
    expected = logits_by_hand(model, stream, copies)
    torch.testing.assert_close(gated_forward(host, image, gates).logits[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "layer_scale", "wide_heads", "pooled"])
@torch.no_grad()
def test_a_head_gate_of_zero_is_a_head_without_projection_and_speaks_for_its_image_alone(kind: str) -> None:
    model, images = vit(kind, DOUBLE), pictures(2, DOUBLE)
    gates = ones(open_host(model), 2, HEAD_GATES, like=images)
    gates[HEAD_GATES][0, 1, 1] = 0
    logits = gated_forward(open_host(model), images, gates).logits
    silent = vit(kind, DOUBLE)
    size = silent.blocks[1].attn.head_dim
    silent.blocks[1].attn.proj.weight[:, size : 2 * size] = 0
    torch.testing.assert_close(logits, torch.stack([silent(images)[0], model(images)[1]]), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_shifts_move_what_the_trace_shows_and_nothing_before() -> None:
    host, images = open_host(vit("registers", DOUBLE)), pictures(2, DOUBLE)
    dense = gated_forward(host, images)
    point = ones(host, 2, TOKEN_SHIFTS, HEAD_SHIFTS, like=images)
    point[TOKEN_SHIFTS][1, 1, 6, 2] = 0.5  # one channel: a norm removes a shift of all
    moved = gated_forward(host, images, point)
    torch.testing.assert_close(moved.streams[1] - dense.streams[1], point[TOKEN_SHIFTS][:, 1], rtol=0, atol=1e-12)
    assert torch.equal(moved.streams[0], dense.streams[0]) and torch.equal(moved.logits[0], dense.logits[0])
    assert not torch.allclose(moved.logits[1], dense.logits[1])
    point = ones(host, 2, TOKEN_SHIFTS, HEAD_SHIFTS, like=images)
    point[HEAD_SHIFTS][0, 2, 1, 3] = 0.5
    moved = gated_forward(host, images, point)
    torch.testing.assert_close(moved.head_outputs[2] - dense.head_outputs[2], point[HEAD_SHIFTS][:, 2], rtol=0, atol=1e-12)
    assert torch.equal(moved.streams[1], dense.streams[1]) and not torch.allclose(moved.logits[0], dense.logits[0])


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "pooled"])
@pytest.mark.parametrize("name", ALL)
def test_derivatives_agree_with_finite_differences(kind: str, name: str) -> None:
    host, images = open_host(vit(kind, DOUBLE)), pictures(2, DOUBLE)
    at = ones(host, 2, name, like=images)[name]
    generator = torch.Generator().manual_seed(3)
    along = torch.randn(at.shape, generator=generator, dtype=DOUBLE)
    along /= along.norm()
    weights = torch.randn(2, 5, generator=generator, dtype=DOUBLE)

    def value(point: Tensor) -> Tensor:
        return (gated_forward(host, images, {name: point}).logits * weights).sum()

    with sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(value(at.requires_grad_()), at)
    step = 1e-4
    with torch.no_grad():
        expected = (
            8 * (value(at + step * along) - value(at - step * along)) - value(at + 2 * step * along) + value(at - 2 * step * along)
        ) / (12 * step)
    assert (slope * along).sum().item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-9)
    assert expected.abs() > 1e-6


def test_head_outputs_and_streams_have_the_shapes_they_promise() -> None:
    host, images = open_host(vit("wide_heads")), pictures(2)
    trace = gated_forward(host, images)
    assert {tuple(stream.shape) for stream in trace.streams} == {(2, 13, 24)} and len(trace.streams) == 4
    assert {tuple(heads.shape) for heads in trace.head_outputs} == {(2, 2, 13, 12)} and len(trace.head_outputs) == 4
