from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesper.graft.matching import join, pick, ward_prices_lean
from hesper.graft.tokens import ward_prices


@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 2), st.booleans(), st.integers(0, 10**6), st.data())
def test_joining_is_adding_to_where_each_goes(images: int, tokens: int, prefix: int, fixed: bool, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, prefix + tokens, 3, generator=generator)
    sources, homes = tokens // 2, (tokens + 1) // 2
    dearest = torch.stack([torch.randperm(sources, generator=generator) for _ in range(images)])
    to = torch.randint(homes, (images, sources), generator=generator) * 2
    stay = data.draw(st.integers(0, sources))
    found, left = join(values, dearest, to, stay, fixed, prefix)
    for image in range(images):
        rows = {place: values[image, place].clone() for place in range(prefix + tokens)}
        for source in dearest[image, stay:].tolist():
            rows[prefix + int(to[image, source])] += rows.pop(prefix + 2 * source + 1)
        assert left[image].tolist() == sorted(rows)
        torch.testing.assert_close(found[image], torch.stack([rows[place] for place in sorted(rows)]))


@pytest.mark.parametrize("sized", [False, True])
@given(st.integers(1, 3), st.integers(2, 12), st.integers(0, 10**6))
def test_prices_are_those_of_the_packed_model(sized: bool, images: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(images, tokens, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 6, (images, tokens), generator=generator).double() if sized else None
    weight = torch.rand(images, tokens, generator=generator, dtype=torch.float64) * 3
    price, to = ward_prices_lean(points, size, weight)
    expected, where = ward_prices(points, torch.ones_like(weight) if size is None else size, weight)
    torch.testing.assert_close(price, expected)
    assert torch.equal(to, where)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_picking_is_indexing(images: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for values in (torch.randn(images, tokens, generator=generator), torch.randn(images, tokens, 2, 3, generator=generator)):
        where = torch.randint(tokens, (images, 4), generator=generator)
        assert torch.equal(pick(values, where), torch.stack([own[places] for own, places in zip(values, where, strict=True)]))
