from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hesper.graft import tokens
from hesper.graft.decision import Decision, grouped_mean
from hesper.graft.layout import Layout
from hesper.graft.tokens import alternate_distances, cheapest, in_steps, similarity_prices, ward_prices

INF = float("inf")


@st.composite
def sets(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Points, sizes, weights and how many of them exist, of a few images."""
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = (len(counts), max(counts))
    points = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 6, shape, generator=generator).double()
    weight = torch.rand(shape, generator=generator, dtype=torch.float64) * 3 + 0.01
    return points, size, weight, counts


@given(sets())
def test_ward_prices_are_the_displacements_both_sides_suffer(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]) -> None:
    points, size, weight, counts = case
    valid = torch.arange(points.shape[1])[None] < torch.tensor(counts)[:, None]
    price, to = ward_prices(points, size, weight, ~valid)
    for image, count in enumerate(counts):
        for place, source in enumerate(range(1, points.shape[1], 2)):
            if source >= count:
                assert price[image, place] == INF
                continue
            costs = {}
            for other in range(0, count, 2):
                (x, y), (s, t) = points[image, [source, other]], size[image, [source, other]]
                mean = (s * x + t * y) / (s + t)
                v, w = weight[image, [source, other]]
                costs[other] = float(s * v * (x - mean).square().sum() + t * w * (y - mean).square().sum())
            assert price[image, place].item() == pytest.approx(min(costs.values()), rel=1e-9, abs=1e-12)
            assert costs[int(to[image, place])] == pytest.approx(min(costs.values()), rel=1e-9, abs=1e-12)


@given(sets())
def test_similarity_prices_are_one_minus_the_best_cosine(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]) -> None:
    points, _, _, counts = case
    valid = torch.arange(points.shape[1])[None] < torch.tensor(counts)[:, None]
    price, to = similarity_prices(points, ~valid)
    for image, count in enumerate(counts):
        for place, source in enumerate(range(1, points.shape[1], 2)):
            x, others = points[image, source], points[image, :count:2]
            cosines = [float(x @ y / (x.norm() * y.norm())) for y in others]
            expected = 1 - max(cosines) if source < count else INF
            assert price[image, place].item() == pytest.approx(expected, abs=1e-12)
            assert source >= count or cosines[int(to[image, place]) // 2] == max(cosines)


def test_prices_are_padding_blind() -> None:
    points, size, weight = torch.randn(1, 7, 3), torch.ones(1, 7), torch.ones(1, 7)
    alone = ward_prices(points, size, weight, torch.zeros(1, 7, dtype=torch.bool))
    junk = torch.cat([points, points[:, -1:].expand(1, 4, 3)], 1)
    more = torch.ones(1, 11)
    padded = ward_prices(junk, more, more, torch.arange(11)[None] >= 7)
    assert torch.equal(padded[0][:, :3], alone[0]) and torch.equal(padded[1][:, :3], alone[1])
    assert padded[0][:, 3:].eq(INF).all()


def test_prices_are_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(1, 4)
    monkeypatch.setattr(tokens, "alternate_distances", lambda points, gaps: torch.full((1, 2, 2), -1e-6))  # as rounding may leave them
    assert ward_prices(one[..., None], one, one)[0].tolist() == [[0.0, 0.0]]


def test_distances_to_gaps_are_infinite_and_others_are_distances() -> None:
    points = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = alternate_distances(points, torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
    expected = (points[:, 1::2, None] - points[:, None, ::2]).square().sum(-1)
    expected[1, :, 2] = INF
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_that_vanish_price_pairs_at_nothing_and_not_at_nan(dtype: torch.dtype) -> None:
    points, size = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype), torch.ones(1, 6, dtype=dtype)
    price, _ = ward_prices(points, size, torch.zeros(1, 6, dtype=dtype), torch.tensor([[False] * 4 + [True] * 2]))
    assert price[:, :2].lt(1e-3).all() and price[:, 2].eq(INF).all()


@given(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=9), st.integers(0, 12))
def test_fixed_counts_take_exactly_that_many_of_the_cheapest_even_among_ties(prices: list[float], remove: int) -> None:
    gone = cheapest(torch.tensor([prices]), threshold=None, remove=remove)[0]
    taken = [price for price, out in zip(prices, gone.tolist(), strict=True) if out]
    assert sorted(taken) == sorted(prices)[: min(remove, len(prices))]


def test_a_threshold_takes_what_is_below_it_and_zero_takes_nothing() -> None:
    price = torch.tensor([[0.0, 1.0, 2.0, INF]])
    assert cheapest(price, threshold=1.0, remove=None).tolist() == [[True, False, False, False]]
    assert not cheapest(price, threshold=0.0, remove=None).any()


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_counts_come_in_steps_and_the_dearest_of_what_would_go_stays(images: list[tuple[list[float], int]], multiple: int) -> None:
    """Against every subset: as many go as leave a multiple, none dearer than one that stays; and no image minds those beside it."""
    most = max(len(prices) for prices, _ in images)
    price = torch.tensor([prices + [INF] * (most - len(prices)) for prices, _ in images])
    go, counts = price < 3, torch.tensor([len(prices) + others for prices, others in images])
    gone = in_steps(go, price, counts, multiple)
    for image, (prices, _) in enumerate(images):
        own, candidates = gone[image, : len(prices)], go[image, : len(prices)]
        assert not gone[image, len(prices) :].any() and not (own & ~candidates).any()
        sizes = [size for size in range(int(candidates.sum()) + 1) if (counts[image] - size) % multiple == 0 or size == 0]
        assert int(own.sum()) == max(sizes)
        dearest = max((p for p, out in zip(prices, own.tolist(), strict=True) if out), default=-INF)
        assert all(p >= dearest for p, out, may in zip(prices, own.tolist(), candidates.tolist(), strict=True) if may and not out)
        alone = in_steps(candidates[None], torch.tensor([prices]), counts[image : image + 1], multiple)
        assert torch.equal(alone[0], own)


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_images_that_lie_otherwise_are_found_again(first: list[int], second: list[int]) -> None:
    layout = Layout((5, 2, 3, 9), prefix=1)
    moved = layout.arranged(first).arranged(second)
    assert moved.images == tuple(first[place] for place in second) and moved.counts == tuple(layout.counts[image] for image in moved.images)
    assert moved.listed(moved.counts) == layout.counts
    assert moved.restored(torch.tensor(moved.counts)).tolist() == list(layout.counts)
    assert moved.with_counts((1, 2, 3, 4)).images == moved.images


@given(sets())
def test_a_decision_by_count_keeps_the_same_rows_and_sends_them_to_the_same(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]],
) -> None:
    points, size, _, counts = case
    layout = Layout(tuple(counts), 0)
    rows = points.flatten(0, 1)[: layout.rows]
    odd = [row for image, count in enumerate(counts) for row in range(layout.bounds[image] + 1, layout.bounds[image] + count, 3)]
    assume(odd)
    left = tuple(count - len(range(1, count, 3)) for count in counts)
    plain = Decision(layout.rows, np.array(odd), np.array(odd) - 1, left)
    mean, mass = grouped_mean(rows, size.flatten()[: layout.rows], plain)
    other, moved = grouped_mean(rows, size.flatten()[: layout.rows], plain.by_count())
    after = layout.with_counts(left)
    order = plain.by_count().order
    arranged = after if order is None else after.arranged(order)
    assert list(arranged.counts) == sorted(left)
    images = arranged.listed(range(len(counts)))
    for image, place in enumerate(images):
        assert torch.equal(arranged.split(other)[place], after.split(mean)[image])
        assert torch.equal(arranged.split(moved)[place], after.split(mass)[image])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2))
def test_a_layout_lays_images_out_one_after_another(patches: list[int], prefix: int) -> None:
    layout = Layout(tuple(count + prefix for count in patches), prefix)
    rows = torch.arange(layout.rows)
    images = layout.split(rows)
    assert [len(own) for own in images] == list(layout.counts) and layout.rectangular == (len(set(patches)) == 1)
    assert layout.image.tolist() == [image for image, count in enumerate(layout.counts) for _ in range(count)]
    for image, own in enumerate(images):
        held = layout.padded(rows)[image][layout.valid[image]]
        assert torch.equal(held, own[prefix:]) and torch.equal(layout.prefix_rows(rows)[image], own[:prefix])
        assert torch.equal(layout.index[image][layout.valid[image]], own[prefix:])
        assert layout.padded(rows)[image, -1] == own[-1]
    assert torch.equal(layout.spread(torch.arange(len(patches))), layout.image)
