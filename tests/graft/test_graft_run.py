from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from by_hand import ADAPTIVE, DECIDERS, DOUBLE, Watch, by_hand, fates_of, grafted, threshold
from hesper.graft import graft
from hesper.graft.deciders import State
from hesper.graft.layout import checkerboard
from hesper.heart.gated import HEAD_GATES, TOKEN_GATES, gated_forward, ones
from hesper.hosts import open_host
from hesper.plan import HeadCut, TokenCut, empty_plan
from vits import (
    KINDS,
    READERS,
    REMOVABLE,
    cuts_of,
    learned_tables,
    lies,
    pictures,
    plan_for,
    tables,
    vit,
)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_empty_plan_is_the_host_bit_for_bit_and_leaves_it_alone(kind: str) -> None:
    model, images = vit(kind), pictures(3)
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    before, kinds = {name: t.clone() for name, t in model.state_dict().items()}, [type(part) for part in model.modules()]
    cut = graft(model, empty_plan("tiny", open_host(model).anatomy))
    assert torch.equal(cut(images), model(images)) and torch.equal(cut.run(images).logits, model(images))
    assert (cut.run(images).macs == cut.dense_macs).all()
    busy = graft(model, plan_for(model, cuts_of("merge", [0, 1], remove=2), heads=[HeadCut(1, (0,))] * (kind in REMOVABLE)), tables(model))
    busy(images)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [type(part) for part in model.modules()] == kinds and list(model.blocks[0]._forward_hooks) == [handle.id]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("criterion", "combine"), DECIDERS)
@pytest.mark.parametrize("kind", ["plain", "registers", "pooled"])
@torch.no_grad()
def test_what_is_decided_is_done(kind: str, criterion: str, combine: Any, adaptive: bool) -> None:
    """Every decider, fixed and adaptive: logits, sizes, mass and maps equal explicit lists of clusters."""
    how = {"threshold": threshold(kind, criterion, combine)} if adaptive else {"remove": 3}
    model, images = grafted(kind, DOUBLE, criterion, cuts_of(combine, [0, 1, 2], **how)), pictures(5, DOUBLE)
    watch = Watch(model)
    outcome = model.run(images, trace=True)
    assert outcome.sources is not None and len(outcome.sources) == 4
    if adaptive and criterion != "random":
        assert len(set(outcome.traffic.fed[:, 1])) > 1
    elif not adaptive:
        assert (outcome.traffic.fed[:, :3] == model.plan.model.anatomy.tokens - 3 * np.arange(1, 4)).all()
    for image in range(5):
        decisions = {block: fates_of(state, decision, image) for block, (state, decision) in enumerate(watch.seen)}
        logits, clusters = by_hand(model.network, images[image], decisions.get, (criterion, combine) == ("kl", "merge"))
        torch.testing.assert_close(outcome.logits[image], logits, rtol=1e-9, atol=1e-9)
        found = outcome.sources[-1][image].tolist()
        where = {patch: place for place, cluster in enumerate(clusters) for patch in cluster}
        assert found == [where.get(patch, -1) for patch in range(len(found))]
    if combine == "merge":
        for state, _ in watch.seen:
            sizes = [own[state.layout.prefix :].sum().item() for own in state.layout.split(state.size)]
            assert sizes == pytest.approx([12] * 5)


@pytest.mark.parametrize("kind", ["plain", "registers", "pooled", "qk_norm"])
@torch.no_grad()
def test_what_was_learned_of_merging_is_carried_out(kind: str) -> None:
    """Sizes to a power of their own in every head, and restored means, against explicit lists of clusters; alone and in a batch."""
    model, images = vit(kind, DOUBLE), pictures(5, DOUBLE)
    found = learned_tables(model)
    plan = plan_for(model, cuts_of("merge", [0, 1, 2], threshold=threshold(kind, "kl", "merge")))
    cut = graft(model, plan, {**tables(model), **found})
    watch = Watch(cut)
    outcome = cut.run(images)
    assert len(set(outcome.traffic.fed[:, 1])) > 1
    seen = list(watch.seen)
    for image in range(5):
        decisions = {block: fates_of(state, decision, image) for block, (state, decision) in enumerate(seen)}
        logits, _ = by_hand(model, images[image], decisions.get, True, learned=found)
        torch.testing.assert_close(outcome.logits[image], logits, rtol=1e-6, atol=1e-6)  # tables are single precision
        torch.testing.assert_close(cut(images[image : image + 1])[0], outcome.logits[image], rtol=1e-9, atol=1e-9)
    plain = graft(model, plan, tables(model))
    assert not torch.allclose(plain(images), outcome.logits, atol=1e-3)
    plain.load_state_dict(cut.state_dict())
    assert torch.equal(plain(images), outcome.logits)


@torch.no_grad()
def test_a_model_decides_and_merges_under_autocast() -> None:
    cut, images = grafted("plain", torch.float32, "kl", cuts_of("merge", [0, 1, 2], remove=3)), pictures(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = cut(images)
    assert torch.isfinite(logits).all() and torch.corrcoef(torch.stack([logits.float().flatten(), cut(images).flatten()]))[0, 1] > 0.95


@torch.no_grad()
def test_a_grid_of_even_width_is_decided_on_as_a_checkerboard() -> None:
    """Sources touch only destinations, and whatever leaves the model is in reading order again."""
    model = vit("registers", DOUBLE, img_size=(32, 32))
    plan, images = plan_for(model, cuts_of("merge", [0, 1], remove=5)), pictures(3, DOUBLE, (32, 32))
    cut = graft(model, plan, tables(model))
    watch, order = Watch(cut), checkerboard((4, 4))
    sides = {patch: place % 2 for place, patch in enumerate(order)}
    assert sorted(order) == list(range(16))
    assert all(sides[p] != sides[p + 1] for p in range(15) if p % 4 != 3) and all(sides[p] != sides[p + 4] for p in range(12))
    outcome, features = cut.run(images, trace=True), cut.forward_features(images)
    assert outcome.sources is not None and (outcome.traffic.fed[:, 1] == 21 - 10).all()
    for image in range(3):
        decisions = {block: fates_of(state, decision, image) for block, (state, decision) in enumerate(watch.seen[:2])}
        logits, clusters = by_hand(model, images[image], decisions.get, True, order)
        torch.testing.assert_close(outcome.logits[image], logits, rtol=1e-9, atol=1e-9)
        where = {patch: place for place, cluster in enumerate(clusters) for patch in cluster}
        assert outcome.sources[-1][image].tolist() == [where[patch] for patch in range(16)]
        for cluster in clusters:  # patches that became one token share its features
            assert all(torch.equal(features[image, 5 + patch], features[image, 5 + cluster[0]]) for patch in cluster)


@torch.no_grad()
def test_feeding_rows_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = grafted("plain", DOUBLE, "kl", cuts_of("merge", [0, 1, 2], threshold=64.0)), pictures(4, DOUBLE)
    whole = model.run(images)
    sizes: list[int] = []
    model.network.blocks[0].mlp.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    monkeypatch.setattr("hesper.graft.stream.PIECE", 7)
    torch.testing.assert_close(model.run(images).logits, whole.logits, rtol=1e-12, atol=1e-12)
    assert max(sizes) == 7 and sum(sizes) == whole.traffic.fed[:, 0].sum()


@pytest.mark.parametrize("criterion", ["kl", "tome"])
@torch.no_grad()
def test_a_merge_keeps_the_mass_or_the_length_of_every_image(criterion: str) -> None:
    """ToMe's mean keeps the size-weighted sum of tokens; merging by curvature keeps the size-weighted sum of their lengths."""
    how: dict[str, Any] = {"threshold": 64.0} if criterion == "kl" else {"remove": 3}
    model, images = grafted("plain", DOUBLE, criterion, cuts_of("merge", [0, 1, 2], **how)), pictures(4, DOUBLE)
    watch = Watch(model)
    fed: list[Tensor] = []
    for block in model.network.blocks:
        block.norm2.register_forward_pre_hook(lambda _, arguments: fed.append(arguments[0].clone()))
    model(images)

    def kept(stream: Tensor, state: State, image: int) -> Tensor:
        own, size = (state.layout.split(rows)[lies(state.layout, image)] for rows in (stream, state.size))
        return (own.norm(dim=1) * size).sum() if criterion == "kl" else (own * size[:, None]).sum(0)

    for number, (state, _) in enumerate(watch.seen[:2]):
        after = watch.seen[number + 1][0]
        for image in range(4):
            torch.testing.assert_close(kept(fed[number], after, image), kept(state.stream, state, image), rtol=1e-12, atol=1e-12)
            assert all(own.sum() == 13 for held in (after, state) for own in held.layout.split(held.size))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dropping_is_a_gate_of_zero_for_exactly_these_tokens(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, images = grafted(kind, dtype, "kl", cuts_of("drop", [0, 2, 3], remove=3)), pictures(3, dtype)
    outcome = model.run(images, trace=True)
    assert outcome.sources is not None
    host = open_host(vit(kind, dtype))
    gates = ones(host, 3, TOKEN_GATES, like=images)
    for block, where in enumerate(outcome.sources):
        gates[TOKEN_GATES][:, block][where < 0] = 0
    assert (gates[TOKEN_GATES] == 0).sum(2).tolist() == [[3, 3, 6, 9]] * 3
    torch.testing.assert_close(outcome.logits, gated_forward(host, images, gates).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("criterion", "combine"), ADAPTIVE)
@pytest.mark.parametrize("kind", ["plain", "pooled"])
@pytest.mark.parametrize(("mixed", "multiple"), [(False, 1), (True, 1), (False, 2)])
@torch.no_grad()
def test_an_image_does_not_care_which_batch_it_is_in(kind: str, criterion: str, combine: Any, mixed: bool, multiple: int) -> None:
    cuts = cuts_of(combine, [0, 1, 2], threshold=threshold(kind, criterion, combine, multiple), multiple=multiple)
    if mixed:
        cuts[2] = TokenCut(2, combine, remove=4)  # a fixed count on a ragged batch, more than some images can give
    images = pictures(5, DOUBLE).float()  # those the threshold was found with
    model = grafted(kind, torch.float32, criterion, cuts, skip_unread=kind != "pooled")
    together = model.run(images, trace=True)
    assert together.sources is not None and len(set(together.traffic.attended[:, 2])) > 1
    before, after = (counts[:, :3] for counts in (together.traffic.attended, together.traffic.fed))
    assert mixed or ((after == before) | (after % multiple == 0)).all()
    for image in range(5):
        alone = model.run(images[image : image + 1], trace=True)
        torch.testing.assert_close(together.logits[image], alone.logits[0], rtol=1e-5, atol=1e-5)
        assert together.macs[image] == alone.macs[0] and alone.sources is not None
        for ours, theirs in zip(together.sources, alone.sources, strict=True):
            assert torch.equal(ours[image], theirs[0])


@pytest.mark.parametrize(("criterion", "combine"), ADAPTIVE)
@torch.no_grad()
def test_a_threshold_of_zero_keeps_everything(criterion: str, combine: Any) -> None:
    images = pictures(3)
    model = grafted("plain", torch.float32, criterion, cuts_of(combine, [0, 1, 2, 3], threshold=0.0))
    outcome = model.run(images)
    torch.testing.assert_close(outcome.logits, vit()(images), rtol=1e-5, atol=1e-5)
    assert (outcome.traffic.fed == 13).all() and (outcome.macs > model.dense_macs).all()


@pytest.mark.parametrize(("criterion", "combine"), DECIDERS)
@pytest.mark.parametrize("kind", ["plain", "pooled"])
@torch.no_grad()
def test_an_image_is_never_emptied(kind: str, criterion: str, combine: Any) -> None:
    model = grafted(kind, torch.float32, criterion, cuts_of(combine, [0, 1, 2, 3], threshold=1e9))
    outcome = model.run(pictures(3), trace=True)
    prefix = model.plan.model.anatomy.prefix_tokens
    assert outcome.logits.isfinite().all() and (outcome.traffic.fed[:, -1] == prefix + 1).all()


@torch.no_grad()
def test_a_batch_of_256_is_256_images() -> None:
    images = pictures(256)
    model = grafted("plain", torch.float32, "kl", cuts_of("merge", [0, 1], threshold=threshold("plain", "kl", "merge")))
    together, few = model.run(images), (0, 100, 200, 255)
    assert len(set(together.traffic.attended[:, 2])) > 1
    for image in few:
        alone = model.run(images[image : image + 1])
        torch.testing.assert_close(together.logits[image], alone.logits[0], rtol=1e-5, atol=1e-5)
        assert together.macs[image] == alone.macs[0]


@torch.no_grad()
def test_images_of_equal_counts_lie_side_by_side() -> None:
    model = grafted("plain", DOUBLE, "kl", cuts_of("merge", [0, 1], threshold=threshold("plain", "kl", "merge")))
    watch = Watch(model)
    outcome = model.run(pictures(5, DOUBLE).flip(0))
    layout = watch.seen[1][0].layout
    assert layout.images is not None and list(layout.counts) == sorted(layout.counts)
    assert layout.listed(layout.counts) == tuple(outcome.traffic.attended[:, 1].tolist())


@torch.no_grad()
def test_one_image_keeps_the_minimum_while_the_others_keep_everything() -> None:
    images = pictures(3)
    model = grafted("plain", torch.float32, "tome", cuts_of("merge", [0, 1, 2, 3], threshold=1e-6))
    images[1] = images[1].mean()
    network: Any = model.network
    network.pos_embed.zero_()
    outcome = model.run(images)
    assert outcome.traffic.fed[:, -1].tolist()[1] == 2 and (np.delete(outcome.traffic.fed[:, -1], 1) == 13).all()


@pytest.mark.parametrize("kind", READERS)
@torch.no_grad()
def test_leaving_out_what_nobody_reads_changes_nothing(kind: str) -> None:
    images = pictures(4)
    skipping = grafted(kind, skip_unread=True)
    torch.testing.assert_close(skipping(images), vit(kind)(images), rtol=1e-5, atol=1e-5)
    assert (skipping.run(images).macs < skipping.dense_macs).all()
    cuts = cuts_of("merge", [0, 1, 2], threshold=64.0)
    with_all, without = grafted(kind, cuts=cuts), grafted(kind, cuts=cuts, skip_unread=True)
    torch.testing.assert_close(without(images), with_all(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", REMOVABLE)
@torch.no_grad()
def test_removing_heads_is_gating_them_to_zero(kind: str) -> None:
    images, host = pictures(3), open_host(vit(kind))
    model = grafted(kind, heads=[HeadCut(1, (0,)), HeadCut(3, tuple(range(1, host.anatomy.heads)))])
    gates = ones(host, 3, HEAD_GATES, like=images)
    gates[HEAD_GATES][:, 1, 0] = 0
    gates[HEAD_GATES][:, 3, 1:] = 0
    torch.testing.assert_close(model(images), gated_forward(host, images, gates).logits, rtol=1e-5, atol=1e-5)
    attn, inner = model.network.blocks[3].attn, host.anatomy.head_dim
    assert attn.qkv.weight.shape == (3 * inner, 24) and attn.proj.weight.shape == (24, inner)


@torch.no_grad()
def test_tokens_and_heads_leave_together_and_the_router_ignores_removed_heads() -> None:
    images = pictures(4)
    model = grafted("plain", cuts=cuts_of("merge", [1, 2], threshold=64.0), heads=[HeadCut(1, (1,))])
    assert torch.equal(model.deciders["1"].router.attention, tables(vit())["1.router.attention"][[0, 2]])
    assert model(images).isfinite().all()


@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_gradients_reach_the_images_through_merges(count: int) -> None:
    cut: dict[str, Any] = {"remove": 3} if count == 1 else {"threshold": threshold("plain", "kl", "merge")}
    model = grafted("plain", DOUBLE, cuts=cuts_of("merge", [0, 1], **cut))
    images = pictures(count, DOUBLE).requires_grad_()
    ragged = len(set(model.run(images).traffic.attended[:, 1])) > 1
    assert ragged == (count > 1)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(model(images).sum(), images)
    along = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    expected = (model(images + 1e-6 * along) - model(images - 1e-6 * along)).sum() / 2e-6
    assert (slope * along).sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_prices_come_in_the_models_precision_and_are_what_they_say() -> None:
    model = vit("plain", torch.bfloat16)
    cut = graft(model, plan_for(model, cuts_of("merge", [0], remove=2)), tables(model))
    assert cut(pictures(2).bfloat16()).dtype is torch.bfloat16
    state = {"stream": torch.zeros(3, 24), "normed": torch.zeros(3, 24), "attention": torch.zeros(3, 3), "size": torch.tensor([1.0, 2, 3])}
    score = graft(vit(), plan_for(vit(), cuts_of("drop", [0], remove=2)), tables(vit())).deciders["0"].score
    offset = tables(vit())["0.router.offset"].exp().item()
    assert score(State(**state, key=None, value=None, layout=None)).tolist() == pytest.approx([offset, 2 * offset, 3 * offset])


def test_everything_lies_where_the_host_does() -> None:
    model = vit(img_size=(32, 32)).to("meta")
    cut = graft(model, plan_for(model, cuts_of("merge", [0], remove=2)), tables(vit(img_size=(32, 32))))
    assert cut.order is not None
    assert {part.device.type for part in (*cut.parameters(), *cut.buffers())} == {"meta"}
