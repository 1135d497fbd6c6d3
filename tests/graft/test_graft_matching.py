from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesper.graft.matching import WardPrices, fates, gathering, pick, stayers
from hesper.graft.tokens import ward_prices


@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 2), st.integers(0, 10**6), st.data())
def test_a_fate_is_the_place_among_those_left(images: int, tokens: int, prefix: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, prefix + tokens, 3, generator=generator)
    sources, homes = tokens // 2, (tokens + 1) // 2
    dearest = torch.stack([torch.randperm(sources, generator=generator) for _ in range(images)])
    to = torch.randint(homes, (images, sources), generator=generator)
    stay = data.draw(st.integers(0, sources))
    left = stayers(dearest, stay, prefix + tokens, prefix)
    found = gathering(fates(dearest, to, stay, prefix + tokens, prefix), left.shape[1]) @ values
    for image in range(images):
        rows = {place: values[image, place].clone() for place in range(prefix + tokens)}
        for source in dearest[image, stay:].tolist():
            rows[prefix + 2 * int(to[image, source])] += rows.pop(prefix + 2 * source + 1)
        assert left[image].tolist() == sorted(rows)
        torch.testing.assert_close(found[image], torch.stack([rows[place] for place in sorted(rows)]))


@pytest.mark.parametrize("sized", [False, True])
@given(st.integers(1, 3), st.integers(2, 12), st.integers(0, 2), st.integers(0, 10**6))
def test_prices_are_those_of_the_packed_model(sized: bool, images: int, tokens: int, prefix: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(images, prefix + tokens, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 6, (images, prefix + tokens, 1), generator=generator).double() if sized else None
    log_weight = torch.randn(images, prefix + tokens, 1, generator=generator, dtype=torch.float64)
    prices = WardPrices(4)
    price, to = prices(prices.traits(points, log_weight, size), prefix)
    patches, weight, many = (own[:, prefix:] for own in (points, log_weight.exp(), torch.ones_like(log_weight) if size is None else size))
    expected, where = ward_prices(patches, many[..., 0], weight[..., 0])
    torch.testing.assert_close(price, expected)
    assert torch.equal(to * 2, where)


@pytest.mark.parametrize("sized", [False, True])
@given(st.integers(2, 9), st.integers(0, 10**6), st.data())
def test_what_has_merged_has_the_traits_of_its_mean(sized: bool, tokens: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, log_weight = (torch.randn(1, tokens, wide, generator=generator, dtype=torch.float64) for wide in (4, 1))
    size = torch.randint(1, 6, (1, tokens, 1), generator=generator).double() if sized else torch.ones(1, tokens, 1, dtype=torch.float64)
    left = data.draw(st.integers(1, tokens))
    fate = torch.cat([torch.arange(left), torch.randint(left, (tokens - left,), generator=generator)])
    prices = WardPrices(4)
    traits = prices.traits(points, log_weight, size if sized else None)
    found, total = prices.merged(traits, size if sized else None, gathering(fate[None].float(), left).double())
    share = [size[0, fate == group] / size[0, fate == group].sum() for group in range(left)]
    means = [torch.stack([(share[group] * own[0, fate == group]).sum(0) for group in range(left)])[None] for own in (points, log_weight)]
    totals = torch.stack([size[0, fate == group].sum(0) for group in range(left)])[None]
    torch.testing.assert_close(total, totals)
    torch.testing.assert_close(found, prices.traits(*means, totals))


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_picking_is_indexing(images: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for values in (torch.randn(images, tokens, generator=generator), torch.randn(images, tokens, 2, 3, generator=generator)):
        where = torch.randint(tokens, (images, 4), generator=generator)
        assert torch.equal(pick(values, where), torch.stack([own[places] for own, places in zip(values, where, strict=True)]))
