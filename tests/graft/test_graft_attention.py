from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hesper.graft.attention import attend, attend_readers, reader_attention
from hesper.graft.layout import Layout
from hesper.hosts import Projected

HEADS, WIDE, SCALE = 2, 3, 0.4


def projected(rows: int, loud: float = 1.0) -> Projected:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, HEADS, WIDE, generator=generator, dtype=torch.float64) for _ in range(3))
    return Projected(query, query * loud, key * loud, value)


def weights(query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("qhd,khd->hqk", query, key).mul(SCALE).softmax(-1)


COUNTS = [(5, 3, 6), (4, 4), (1, 4), (7,)]


@pytest.mark.parametrize("counts", COUNTS)
def test_a_token_of_size_s_attends_and_is_attended_like_s_copies(counts: tuple[int, ...]) -> None:
    layout, tokens = Layout(counts, 1), projected(sum(counts))
    size = torch.arange(layout.rows) % 3 + 1
    mixed = attend(tokens, size.double().log(), layout, SCALE)
    readers = Projected(tokens.normed, layout.prefix_rows(tokens.query), tokens.key, tokens.value)
    read = attend_readers(readers, size.double().log(), layout, SCALE)
    for image, (first, last) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False)):
        key, value = (t[first:last].repeat_interleave(size[first:last], 0) for t in (tokens.key, tokens.value))
        expected = torch.einsum("hqk,khd->qhd", weights(tokens.query[first:last], key), value).flatten(1)
        torch.testing.assert_close(mixed[first:last], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(read[image, 0], expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loud", [1.0, 60.0])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_readers_attention_is_that_to_one_copy(counts: tuple[int, ...], prefix: int, loud: float) -> None:
    layout, tokens = Layout(counts, prefix), projected(sum(counts), loud)
    size = torch.arange(layout.rows) % 3 + 1
    plain = reader_attention(tokens, None, layout, SCALE)
    sized = reader_attention(tokens, size.double().log(), layout, SCALE)
    assert plain.isfinite().all() and sized.isfinite().all()
    for first, last in zip(layout.bounds, layout.bounds[1:], strict=False):
        reader = tokens.query[first : first + 1] if prefix else tokens.query[first:last].mean(0, keepdim=True)
        own, repeat = tokens.key[first:last], size[first:last]
        torch.testing.assert_close(plain[first:last].exp(), weights(reader, own)[:, 0].T, rtol=1e-9, atol=1e-12)
        copies = weights(reader, own.repeat_interleave(repeat, 0))[:, 0].T
        starts = repeat.cumsum(0) - repeat
        torch.testing.assert_close(sized[first:last].exp(), copies[starts], rtol=1e-9, atol=1e-12)


def test_a_batch_is_its_images_one_at_a_time() -> None:
    layout, tokens = Layout((5, 3, 6), 1), projected(14)
    size = torch.rand(14, dtype=torch.float64)
    for image, (first, last) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False)):
        own = Projected(*(getattr(tokens, name)[first:last] for name in ("normed", "query", "key", "value")))
        alone = Layout((layout.counts[image],), 1)
        for function in (attend, reader_attention):
            whole, part = function(tokens, size, layout, SCALE)[first:last], function(own, size[first:last], alone, SCALE)
            torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-12)


def test_of_halves_the_readers_attention_is_worked_out_in_single_precision() -> None:
    layout, tokens = Layout((1000, 900), 1), projected(1900)
    halves = Projected(*(getattr(tokens, name).bfloat16() for name in ("normed", "query", "key", "value")))
    exact = Projected(*(getattr(halves, name).double() for name in ("normed", "query", "key", "value")))
    found = reader_attention(halves, None, layout, SCALE)
    torch.testing.assert_close(found.double(), reader_attention(exact, None, layout, SCALE), rtol=0, atol=1e-5)
