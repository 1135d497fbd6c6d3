"""Gates from their fit to the family and the price of a plan."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hesper.cost import head_macs, token_macs
from hesper.curvature import DenseKL, ImageBatch, gradient
from hesper.errors import JobError, UsageError
from hesper.graft import graft
from hesper.heart.budget import _turns_to
from hesper.heart.criteria import Criterion, head_prices, sensitivity, stream_curvature
from hesper.heart.family import Family
from hesper.heart.fit import Atlas, FitSums, Tables, fit_tables
from hesper.heart.gate_fit import PENALTIES, ROUNDING, GateFit
from hesper.heart.gated import HEAD_GATES, TOKEN_SHIFTS, gated_forward, ones
from hesper.heart.lenses import gated_lens
from hesper.heart.price import plan_price, plan_step
from hesper.heart.settings import Settings
from hesper.hosts import open_host
from hesper.plan import Budget, HeadCut, HeadGate, empty_plan
from oracles import dense_hessian
from vits import cuts_of, gate_tables, pictures, plan_for, tables, tiny_batch, tiny_host, vit

KL = Criterion("kl", 4.0, 2)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def batches(count: int = 12) -> list[ImageBatch]:
    return [ImageBatch(part) for part in pictures(count).split(5)]


@pytest.mark.parametrize("kind", ["plain", "registers", "pooled"])
def test_prices_of_heads_are_the_same_alone_with_tokens_and_with_the_metric(kind: str) -> None:
    host, batch = open_host(vit(kind).requires_grad_(False)), batches()[0]
    expected = sensitivity(host, batch, KL, rng()).heads
    torch.testing.assert_close(head_prices(host, batch, KL, rng()), expected, rtol=1e-4, atol=1e-9)
    plain, found = stream_curvature(host, batch, KL, rng()), stream_curvature(host, batch, KL, rng(), with_heads=True)
    assert found.heads is not None and plain.heads is None
    torch.testing.assert_close(found.heads, expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(found.strength, plain.strength) and torch.equal(found.second_moment, plain.second_moment)


@given(seed=st.integers(0, 1000), heads=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_fit_in_batches_is_the_best_ridge_by_its_own_score_on_everything(seed: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row, noise = (torch.randn(30, width, generator=generator, dtype=torch.float64) for width in (6, heads))
    price = (row[:, :1] - 2 * row[:, 1:2] * torch.rand(heads, generator=generator) + noise - 5).exp()
    fit = GateFit(6, heads)
    for start in range(0, 30, 7):
        fit.add(row[start : start + 7], price[start : start + 7])
    direction, offset, explained = fit.solve()
    x, y = row - row.mean(0), price.log() - price.log().mean(0)
    alone = y.square().sum(0) / 29**2
    scored = [(1.0, torch.ones(heads, dtype=torch.float64), torch.zeros(6, heads, dtype=torch.float64))]
    for penalty in PENALTIES:
        unit = (x.T @ x).trace() / 6 + ROUNDING * row.square().sum() / 6
        gram = x.T @ x + penalty * unit * torch.eye(6, dtype=torch.float64)
        weights = torch.linalg.solve(gram, x.T @ y)
        free = 29 - torch.linalg.solve(gram, x.T @ x).trace()
        shares = (y - x @ weights).square().sum(0) / free**2 / alone
        scored.append((float(shares.mean()), shares, weights))
    _, shares, weights = min(scored, key=lambda found: found[0])
    torch.testing.assert_close(direction, weights, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(explained, 1 - shares, rtol=0, atol=1e-6)
    predicted = x @ weights
    expected = predicted + price.mean(0).log() - predicted.square().mean(0) / 2
    torch.testing.assert_close(row @ direction + offset, expected, rtol=1e-6, atol=1e-6)


def test_what_the_row_does_not_tell_is_priced_at_the_mean() -> None:
    """Whether the row is always the same, as the class token before the first block, or there is one image."""
    price = torch.tensor([[0.1, 4.0], [0.3, 2.0], [0.2, 0.0]])
    fit = GateFit(4, 2)
    fit.add(torch.full((3, 4), 1.7), price)
    direction, offset, explained = fit.solve()
    predicted = (torch.full((4,), 1.7, dtype=torch.float64) @ direction + offset).exp()
    torch.testing.assert_close(predicted, price.double().mean(0), rtol=1e-6, atol=0)
    assert explained.abs().max() < 1e-6
    alone = GateFit(4, 2)
    alone.add(torch.randn(1, 4, generator=rng()), price[:1])
    direction, offset, _ = alone.solve()
    assert not direction.any() and offset.exp().tolist() == pytest.approx([0.1, 4.0])


def test_predictions_that_are_log_normal_average_to_the_mean_price() -> None:
    """Exponentiated logs alone would lie a third below."""
    row, noise = torch.randn(20000, 3, generator=rng()), torch.randn(20000, 1, generator=rng())
    price = (0.6 * row[:, :1] + 0.8 * noise - 3).exp()
    fit = GateFit(3, 1)
    fit.add(row, price)
    direction, offset, explained = fit.solve()
    predicted = (row.double() @ direction + offset).exp().mean()
    assert float(predicted / price.mean()) == pytest.approx(1.0, abs=0.03)
    assert 0.3 < float(explained) < 0.5


@pytest.mark.parametrize("combine", ["merge", "drop", None])
@pytest.mark.parametrize("kind", ["plain", "pooled"])
def test_tables_have_gates_where_asked_for_and_are_otherwise_the_same(kind: str, combine: object) -> None:
    host = open_host(vit(kind).requires_grad_(False))
    found = fit_tables(host, batches(), KL, combine, 5, rng(), gates=True)  # type: ignore[arg-type]
    for block in range(4):
        assert found.tensors[f"{block}.gate.direction"].shape == (24, 3) and found.tensors[f"{block}.gate.offset"].shape == (3,)
    assert len(found.gates_explained) == 4 and all(-1e-9 <= share <= 1 for share in found.gates_explained)
    if combine is None:
        assert len(found.tensors) == 8 and found.explained == ()
        return
    without = fit_tables(host, batches(), KL, combine, 5, rng())  # type: ignore[arg-type]
    assert all(torch.equal(found.tensors[name], table) for name, table in without.tensors.items())
    assert not any("gate" in name for name in without.tensors) and without.gates_explained == ()


def test_a_fit_does_not_depend_on_batches_or_on_who_adds_them() -> None:
    host = open_host(vit().requires_grad_(False))
    together, parts = (FitSums(host, KL, "merge", rng(), gates=True) for _ in range(2))
    other = FitSums(host, KL, "merge", rng(), gates=True)
    for batch in batches():
        together.add(batch)
    for images in pictures(12).split(1)[::2]:
        parts.add(ImageBatch(images))
    for images in pictures(12).split(1)[1::2]:
        other.add(ImageBatch(images))
    assert together.tensors().keys() >= {"gate.0", "gate.0.price"}
    for name, tensor in parts.tensors().items():
        tensor += other.tensors()[name]
    expected, found = together.tables(5).tensors, parts.tables(5).tensors
    gates = [name for name in expected if "gate" in name]
    assert len(gates) == 8
    for name in gates:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    resumed = FitSums(host, KL, "merge", rng(), gates=True)
    for name, tensor in resumed.tensors().items():
        tensor.copy_(together.tensors()[name])
    assert all(torch.equal(table, expected[name]) for name, table in resumed.tables(5).tensors.items())


def test_prices_that_are_not_finite_are_refused() -> None:
    host, batch = open_host(vit().requires_grad_(False)), batches()[0]
    with pytest.raises(JobError, match="not finite"):
        FitSums(host, KL, None, rng(), gates=True).add_curvature(batch, None, None, torch.full((5, 4, 3), math.nan))


@pytest.mark.parametrize("name", ["ce", "heart"])
def test_criteria_with_prices_of_either_sign_do_not_gate(name: str) -> None:
    for refused in (
        lambda: Settings(Budget("macs", 0.9, 0.9), Criterion(name), heads="adaptive"),
        lambda: FitSums(open_host(vit()), Criterion(name), "merge", rng(), gates=True),
        lambda: stream_curvature(open_host(vit()), batches()[0], Criterion(name), rng(), with_heads=True),
    ):
        with pytest.raises(UsageError, match=f"criterion '{name}'.*use the criterion 'kl', or --heads static"):
            refused()


def test_fixed_counts_do_not_go_with_heads_that_adapt() -> None:
    with pytest.raises(UsageError, match="Fixed counts promise every image the same work"):
        Settings(Budget("macs", 0.9, 0.9), heads="adaptive", counts="fixed")


def family(blocks: tuple[int, ...] = (0, 1), heads: str = "adaptive") -> Family:
    host = open_host(vit())
    atlas = Atlas(torch.zeros(4, 12), torch.arange(12.0).view(4, 3), torch.zeros(4, 3), 8)
    blank = dataclasses.replace(empty_plan("tiny", host.anatomy), pricing=plan_for(host.module).pricing)
    return Family("f", blank, blocks, "merge", heads, atlas, Tables({}, ()))  # type: ignore[arg-type]


def test_gates_have_the_price_per_mac_at_which_static_heads_leave() -> None:
    anatomy = family().blank.model.anatomy
    plan = family().at(0.3)
    limit = 0.3 / token_macs(anatomy, (0, 1)) * head_macs(anatomy)
    assert plan.gates == tuple(HeadGate(block, pytest.approx(limit)) for block in range(4)) and plan.heads == () and plan.dial == 0.3
    assert family((), "adaptive").at(0.3).gates == tuple(HeadGate(block, pytest.approx(0.3)) for block in range(4))
    assert family((), "adaptive").at(0.3).dial == 0.3 and family((), "static").at(0.3).dial is None
    static = family(heads="static").at(2.5 * token_macs(anatomy, (0, 1)) / head_macs(anatomy))
    assert static.heads == (HeadCut(0, (0, 1)),) and static.gates == ()
    single = dataclasses.replace(anatomy, heads=1)
    lonely = family()
    lonely = dataclasses.replace(
        lonely, blank=dataclasses.replace(lonely.blank, model=dataclasses.replace(lonely.blank.model, anatomy=single))
    )
    assert lonely.at(0.3).gates == ()


def test_a_family_with_gates_is_one_dial() -> None:
    assert _turns_to(family().at(0.3), family().at(0.1), 0.1)
    assert not _turns_to(family().at(0.3), dataclasses.replace(family().at(0.1), gates=family().at(0.3).gates), 0.1)


@torch.no_grad()
def test_a_stronger_dial_lets_more_heads_sit_out() -> None:
    model, used = vit(), []
    own = {**tables(model), **gate_tables(model)}
    for dial in (1e-3, 1.0, 1e2, 1e6):
        used.append(graft(model, family(()).at(dial), own).run(pictures(6)).traffic.heads)
    assert all((more >= fewer).all() for more, fewer in zip(used, used[1:], strict=False))
    assert len({int(counts.sum()) for counts in used}) > 2 and (used[-1] == 1).all()


def test_the_price_of_a_gated_plan_closes_the_gates_of_the_images_where_heads_sit_out() -> None:
    host, batch = tiny_host(), tiny_batch(2)
    own = {f"{block}.gate.direction": torch.randn(6, 2, generator=rng()) for block in range(2)}
    own |= {f"{block}.gate.offset": torch.zeros(2) for block in range(2)}
    plan = plan_for(host.module, gates=[HeadGate(0, 1.0), HeadGate(1, 1e9)], heads=[HeadCut(0, (1,))])
    cut = graft(host.module, plan, own)
    used = cut.run(batch.images, trace=True).used
    assert used is not None
    step = plan_step(host, cut, batch.images)
    assert torch.equal(step[HEAD_GATES], -(~used).double()) and bool(step[HEAD_GATES][:, 0, 1].all())
    assert np.array_equal(step[HEAD_GATES][:, 1].sum(1).numpy(), [-1.0, -1.0])
    lens = gated_lens(host, 2, DenseKL(), HEAD_GATES, like=batch.images)
    v, slope = step[HEAD_GATES].flatten(), gradient(lens, [batch])[HEAD_GATES]
    bend = (dense_hessian(lens, [batch]) @ v).view_as(slope)
    expected = (step[HEAD_GATES] * (slope + bend / 2)).flatten(1).sum(1)
    torch.testing.assert_close(plan_price(host, cut, batch, DenseKL()), expected, rtol=1e-8, atol=1e-12)


def test_tokens_and_gates_are_priced_together() -> None:
    """The price of a step v is KL(dense || moved by t v) / t^2 for a small t, tokens and heads moving at once."""
    model, images = vit(dtype=torch.float64), pictures(3, torch.float64)
    host = open_host(model.requires_grad_(False))
    plan = plan_for(model, cuts_of("merge", [1], remove=3), gates=[HeadGate(2, 1.0)])
    cut = graft(model, plan, {**tables(model), **gate_tables(model)})
    step, small = plan_step(host, cut, images), 1e-4
    assert bool(step[TOKEN_SHIFTS].any()) and bool(step[HEAD_GATES].any())
    moved = {name: start + small * step[name] for name, start in ones(host, 3, *step, like=images).items()}
    with torch.no_grad():
        dense, near = (out.log_softmax(1) for out in (model(images), gated_forward(host, images, moved).logits))
    drift = (dense.exp() * (dense - near)).sum(1)
    torch.testing.assert_close(plan_price(host, cut, ImageBatch(images), DenseKL()), drift / small**2, rtol=1e-3, atol=1e-9)
