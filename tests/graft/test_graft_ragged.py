"""Ways of running ragged attention: each against its definition, image by image, and against the others within a whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hesper.graft.attention
from hesper.graft import graft
from hesper.graft.attention import attend, attend_readers, reader_attention
from hesper.graft.buckets import side_by_side, together
from hesper.graft.layout import Layout
from hesper.graft.ragged import Strategy, bucketed, choose, run_by_run, varlen, varlen_runs, widened
from hesper.hosts import Projected
from vits import cuts_of, pictures, plan_for, tables, vit

HEADS, WIDE, PREFIX = 2, 6, 1
SCALE = WIDE**-0.5
BATCHES = {
    "two counts": (5, 3, 5, 3, 3),
    "all different": (2, 41, 17, 33, 64, 9),
    "one keeps the minimum": (40, 40, 1, 40),
    "all keep everything": (12, 12, 12),
    "one image": (9,),
    "many tiny images": tuple(1 + image % 3 for image in range(64)),
}
KINDS = ["none", "per token", "per head"]


def tokens(rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Projected:
    generator = torch.Generator().manual_seed(rows)
    query, key, value = (torch.randn(rows, HEADS, WIDE, generator=generator).to(device, dtype) for _ in range(3))
    return Projected(query, query, key, value)


def bias(kind: str, rows: int, device: str = "cpu") -> Tensor | None:
    generator = torch.Generator().manual_seed(rows + 1)
    shape = {"none": (0,), "per token": (rows,), "per head": (rows, HEADS)}[kind]
    return None if kind == "none" else torch.randint(1, 30, shape, generator=generator).float().log().to(device)


def by_hand(query: Tensor, key: Tensor, value: Tensor, log_size: Tensor | None) -> Tensor:
    """One image, softmax written out in float64: ``[queries, heads * head_dim]``."""
    logits = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * SCALE
    if log_size is not None:
        logits = logits + log_size.double().reshape(len(key), -1).T[:, None]
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), value.double()).flatten(1)


def check(
    strategy: Strategy, counts: tuple[int, ...], kind: str, error: float, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """All queries, and the readers' alone, of a batch that is run ragged even where it need not be."""
    layout = Layout(counts, PREFIX, torch.device(device))
    layout.__dict__["rectangular"] = False
    projected, log_size = tokens(layout.rows, dtype, device), bias(kind, layout.rows, device)
    mixed = attend(projected, log_size, layout, SCALE, strategy)
    prefix = torch.stack([own[:PREFIX] for own in layout.split(projected.query)])
    read = attend_readers(Projected(projected.normed, prefix, projected.key, projected.value), log_size, layout, SCALE, strategy)
    assert mixed.shape == (layout.rows, HEADS * WIDE) and mixed.dtype is dtype
    for image, (first, last) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False)):
        own = slice(first, last)
        expected = by_hand(projected.query[own], projected.key[own], projected.value[own], None if log_size is None else log_size[own])
        torch.testing.assert_close(mixed[own].double(), expected, rtol=error, atol=error)
        torch.testing.assert_close(read[image].double(), expected[:PREFIX], rtol=error, atol=error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("strategy", [run_by_run, bucketed])
def test_every_image_attends_to_its_own_tokens_alone(strategy: Strategy, counts: tuple[int, ...], kind: str) -> None:
    check(strategy, counts, kind, 1e-5)


def test_neighbours_of_equal_counts_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []

    def noted(query: Tensor, *more: Any, **options: Any) -> Tensor:
        shapes.append((query.shape[0], query.shape[2]))
        assert options["attn_mask"] is None or options["attn_mask"].stride(-1) == 1
        return torch.nn.functional.scaled_dot_product_attention(query, *more, **options)

    monkeypatch.setattr("hesper.graft.ragged.scaled_dot_product_attention", noted)
    for kind in KINDS:
        layout = Layout((3, 3, 5, 5, 5, 3), PREFIX)
        attend(tokens(layout.rows), bias(kind, layout.rows), layout, SCALE, run_by_run)
        assert shapes == [(2, 3), (3, 5), (1, 3)]
        shapes.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [BATCHES["two counts"], BATCHES["one image"]])
def test_a_bias_per_head_is_that_of_each_head_alone(counts: tuple[int, ...], kind: str) -> None:
    """Rectangular batches and the reader's attention take both shapes of a bias."""
    layout, projected = Layout(counts, PREFIX), tokens(sum(counts))
    log_size = bias(kind, layout.rows)
    wide = torch.zeros(layout.rows, HEADS) if log_size is None else log_size.reshape(layout.rows, -1).expand(-1, HEADS)
    read = reader_attention(projected, log_size, layout, SCALE)
    mixed = attend(projected, log_size, layout, SCALE).unflatten(1, (HEADS, WIDE))
    for head in range(HEADS):
        own = Projected(projected.normed, *(getattr(projected, name)[:, head : head + 1] for name in ("query", "key", "value")))
        torch.testing.assert_close(read[:, head : head + 1], reader_attention(own, wide[:, head], layout, SCALE), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[:, head], attend(own, wide[:, head], layout, SCALE), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 64))
def test_buckets_hold_every_row_once_and_waste_less_than_a_step_an_image(counts: list[int], step: int) -> None:
    layout = Layout(tuple(counts), 0)
    members = together(counts, step)
    held = side_by_side(layout.bounds, members)
    rows = torch.arange(layout.rows)
    assert sorted(image for images in members for image in images) == list(range(len(counts)))
    assert torch.equal(held.gather(held.spread(rows)), rows)
    empty = torch.zeros(len(held.row), dtype=torch.bool) if held.empty is None else held.empty
    assert (held.empty is None or bool(empty.any())) and int((~empty).sum()) == layout.rows
    for images, own, gaps, (_, most) in zip(members, held.spread(rows), held.cut(empty), held.shapes, strict=True):
        assert most == max(counts[image] for image in images) and most - min(counts[image] for image in images) < step
        for image, row, gap in zip(images, own, gaps, strict=True):
            assert row[~gap].tolist() == list(range(layout.bounds[image], layout.bounds[image + 1]))
            assert ((row >= layout.bounds[image]) & (row < layout.bounds[image + 1])).all()


@given(st.integers(1, 12), st.sampled_from([3, 6, 8, 24, 48, 64]), st.sampled_from(KINDS), st.floats(0.02, 2.0), st.integers(0, 2**20))
def test_widened_queries_and_keys_carry_the_bias_of_the_mask(rows: int, width: int, kind: str, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(rows, HEADS, width, generator=generator) for _ in range(3))
    log_size = bias(kind, rows)
    heads_first = [t.transpose(0, 1)[None] for t in (query, key, value)]
    mask = None if log_size is None else log_size.reshape(rows, -1).T[None, :, None]
    expected = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
    wide = widened(query, key, value, log_size, scale)
    assert len({t.shape for t in wide}) == 1 and wide[0].shape[-1] % 8 == 0 and wide[0].shape[-1] - width < 10
    found = scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in wide), scale=scale)
    torch.testing.assert_close(found[..., :width], expected, rtol=1e-5, atol=1e-5)
    assert not found[..., width:].any()


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 5e-5), (torch.float16, 1e-6)])
@pytest.mark.parametrize("scale", [64**-0.5, 48**-0.5])
def test_half_precision_keeps_the_bias_to_twice_its_digits(dtype: torch.dtype, error: float, scale: float) -> None:
    log_size = torch.arange(1, 198).float().log()
    nothing = torch.zeros(197, 1, 8, dtype=dtype)
    query, key, _ = (t.double() for t in widened(nothing, nothing, nothing, log_size, scale))
    found = (query * key).sum(-1)[:, 0] * scale
    assert (found - log_size.double()).abs().max() < error < (log_size.to(dtype) - log_size).abs().max()


@pytest.mark.parametrize("how", [{"remove": 3}, {"threshold": 64.0}])
@pytest.mark.parametrize("combine", ["merge", "drop"])
@torch.no_grad()
def test_a_model_gives_the_same_logits_by_every_way(monkeypatch: pytest.MonkeyPatch, combine: Any, how: dict[str, Any]) -> None:
    model, images = vit(), pictures(6)
    cut = graft(model, plan_for(model, cuts_of(combine, [0, 1], **how), skip_unread=True), tables(model))
    expected, used = cut.run(images), []

    def buckets(*_: object) -> Strategy:
        used.append(1)
        return bucketed

    monkeypatch.setattr(hesper.graft.attention, "choose", buckets)
    found = cut.run(images)
    assert bool(used) == (len(np.unique(expected.traffic.fed)) > 2 and "threshold" in how)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert (found.traffic.fed == expected.traffic.fed).all()


def test_each_device_and_precision_gets_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(torch.device("cpu"), torch.bfloat16, 64, False) is run_by_run
    assert choose(torch.device("meta"), torch.bfloat16, 64, False) is bucketed
    monkeypatch.setattr(hesper.graft.ragged, "varlen_runs", lambda device, dtype, width: dtype is torch.float16 and width <= 64)
    device = torch.device("cuda")
    assert choose(device, torch.float16, 64, False) is varlen
    assert choose(device, torch.float32, 64, False) is bucketed
    assert choose(device, torch.float16, 128, False) is bucketed
    assert choose(device, torch.float16, 64, True) is bucketed


def test_no_variable_length_kernel_is_found_where_there_is_none() -> None:
    assert not varlen_runs(torch.device("cpu"), torch.float16, 64)


def kernel(query: Tensor, key: Tensor, value: Tensor, of_query: Tensor, of_key: Tensor, most: int, of_most: int, *, scale: float) -> Tensor:
    """What a variable-length kernel computes, and what it insists on."""
    assert query.shape[1:] == key.shape[1:] == value.shape[1:] and query.shape[-1] % 8 == 0
    assert of_query.dtype is of_key.dtype is torch.int32
    assert most == of_query.diff().max() and of_most == of_key.diff().max()
    out = torch.empty_like(query)
    for asked, own in zip(of_query.tolist()[:-1], of_key.tolist()[:-1], strict=True):
        image = of_query.tolist().index(asked)
        to, last = of_query[image + 1], of_key[image + 1]
        heads_first = (t.transpose(0, 1)[None] for t in (query[asked:to], key[own:last], value[own:last]))
        out[asked:to] = scaled_dot_product_attention(*heads_first, scale=scale)[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES.keys())
def test_the_variable_length_kernel_is_asked_for_the_right_thing(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], kind: str
) -> None:
    varlen_module = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")
    monkeypatch.setattr(varlen_module, "varlen_attn", kernel)
    check(varlen, counts, kind, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: variable-length kernels run nowhere else")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_variable_length_kernel_attends_as_written_out(counts: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    if not varlen_runs(torch.device("cuda"), dtype, WIDE):
        pytest.skip("this torch or this device has no variable-length kernel")
    check(varlen, counts, kind, 2e-2, dtype, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES.keys())
def test_buckets_attend_as_written_out_on_cuda(counts: tuple[int, ...], kind: str) -> None:
    check(bucketed, counts, kind, 1e-4, device="cuda")
