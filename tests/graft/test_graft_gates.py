"""Heads that sit out image by image: what is skipped is what a gate of zero removes, whatever else is cut and whoever shares the batch."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import FAMILIES, family, shots
from hesper import artefact
from hesper.errors import UsageError
from hesper.graft import GraftedViT, graft
from hesper.graft.deciders import State
from hesper.heart.gated import HEAD_GATES, TOKEN_GATES, gated_forward, ones
from hesper.hosts import open_host
from hesper.plan import HeadCut, HeadGate, TokenCut
from oracles import counted_macs
from vits import READERS, REMOVABLE, cuts_of, gate_tables, learned_tables, pictures, plan_for, tables, vit

DOUBLE = torch.float64
EVERY = tuple(HeadGate(block, 1.0) for block in range(4))
EVA_REMOVABLE = [kind for kind in FAMILIES if kind != "eva02_clip"]


def gated(model: Any, gates: Any = EVERY, criterion: str = "kl", cuts: Any = (), **more: Any) -> GraftedViT:
    return graft(model, plan_for(model, cuts, criterion, gates=gates, **more), {**tables(model), **gate_tables(model)})


def silenced(model: Any, images: Tensor, used: Tensor, sources: Any = ()) -> Tensor:
    """Logits of the dense model with the gates of unused heads, and of tokens that were dropped, at zero."""
    host = open_host(model)
    gates = ones(host, len(images), HEAD_GATES, *([TOKEN_GATES] if sources else []), like=images)
    gates[HEAD_GATES][~used] = 0
    for block, where in enumerate(sources):
        gates[TOKEN_GATES][:, block][where < 0] = 0
    return gated_forward(host, images, gates).logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-9)])
@pytest.mark.parametrize("kind", REMOVABLE)
@torch.no_grad()
def test_a_head_that_sits_out_is_a_gate_of_zero_for_its_image(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, images = vit(kind, dtype), pictures(6, dtype)
    outcome = gated(model).run(images, trace=True)
    assert outcome.used is not None and (outcome.used.sum(2).numpy() == outcome.traffic.heads).all()
    assert len({tuple(image) for image in outcome.used.flatten(1).tolist()}) > 1  # images differ
    assert (outcome.traffic.heads >= 1).all() and (outcome.traffic.heads < 3).any()
    expected = silenced(model, images, outcome.used)
    torch.testing.assert_close(outcome.logits, expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(expected, model(images), atol=1e-3)


@pytest.mark.parametrize("kind", EVA_REMOVABLE)
@torch.no_grad()
def test_every_family_skips_heads_image_by_image(kind: str) -> None:
    model, images = family(kind, DOUBLE), shots(kind, 5, DOUBLE)
    reading = not open_host(model).anatomy.reads_patches
    outcome = gated(model, skip_unread=reading, heads=[HeadCut(2, (1,))]).run(images, trace=True)
    assert outcome.used is not None and not outcome.used[:, 2, 1].any() and (outcome.traffic.heads < 2).any()
    torch.testing.assert_close(outcome.logits, silenced(model, images, outcome.used), rtol=1e-9, atol=1e-9)
    assert len({tuple(image) for image in outcome.used.flatten(1).tolist()}) > 1


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind in REMOVABLE])
@torch.no_grad()
def test_the_last_block_for_its_readers_alone_skips_heads_too(kind: str) -> None:
    model, images = vit(kind, DOUBLE), pictures(6, DOUBLE)
    cuts = cuts_of("drop", [0, 1], remove=3)
    whole, skipping = gated(model, cuts=cuts), gated(model, cuts=cuts, skip_unread=True)
    one, other = whole.run(images, trace=True), skipping.run(images, trace=True)
    assert one.used is not None and other.used is not None
    assert torch.equal(one.used, other.used) and (other.macs < one.macs).all() and (~one.used[:, 3]).any()
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("criterion", ["kl", "cls", "random"])
@torch.no_grad()
def test_dropped_tokens_and_skipped_heads_are_gates_of_zero_together(criterion: str) -> None:
    model, images = vit("registers", DOUBLE), pictures(5, DOUBLE)
    how: dict[str, Any] = {"remove": 3} if criterion == "random" else {"threshold": 0.06}
    outcome = gated(model, criterion=criterion, cuts=cuts_of("drop", [0, 1, 2], **how)).run(images, trace=True)
    assert outcome.used is not None and outcome.sources is not None and (outcome.sources[-1] < 0).any()
    torch.testing.assert_close(outcome.logits, silenced(model, images, outcome.used, outcome.sources), rtol=1e-9, atol=1e-9)


MIXED = [
    ("kl", "merge", {"threshold": 64.0}),
    ("kl", "merge", {"threshold": 64.0, "multiple": 2}),
    ("kl", "drop", {"threshold": 0.06}),
    ("cls", "merge", {"threshold": 0.06}),
    ("tome", "merge", {"threshold": 0.6}),
    ("tome", "merge", {"remove": 2}),
    ("random", "merge", {"remove": 2}),
]


@pytest.mark.parametrize(("criterion", "combine", "how"), MIXED)
@pytest.mark.parametrize("kind", ["plain", "pooled"])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_an_image_does_not_care_who_shares_its_batch(kind: str, criterion: str, combine: Any, how: Any, data: st.DataObject) -> None:
    model = vit(kind)
    cut = gated(model, criterion=criterion, cuts=cuts_of(combine, [0, 1, 2], **how), skip_unread=kind != "pooled", heads=[HeadCut(1, (2,))])
    images = pictures(6)
    chosen = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    together, features = cut.run(images[chosen], trace=True), cut.forward_features(images[chosen])
    assert together.used is not None and together.sources is not None
    for place, image in enumerate(chosen):
        alone = cut.run(images[image : image + 1], trace=True)
        assert alone.used is not None and alone.sources is not None
        torch.testing.assert_close(together.logits[place], alone.logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features[place], cut.forward_features(images[image : image + 1])[0], rtol=1e-4, atol=1e-4)
        assert together.macs[place] == alone.macs[0] and torch.equal(together.used[place], alone.used[0])
        assert all(torch.equal(ours[place], theirs[0]) for ours, theirs in zip(together.sources, alone.sources, strict=True))


@torch.no_grad()
def test_what_deciders_see_of_a_head_that_sat_out() -> None:
    """The router sees the head's mean attention; what averages over heads, keys as well, sees those that stayed."""
    images, seen = pictures(6, DOUBLE), []
    for criterion, combine in (("kl", "merge"), ("cls", "merge")):
        model = vit("plain", DOUBLE)
        cut = gated(model, EVERY[1:2], criterion, [TokenCut(1, combine, remove=2)])
        cut.deciders["1"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        used = cut.run(images, trace=True).used
        assert used is not None and (~used[:, 1]).any()
        state: State = seen[-1]
        mean = gate_tables(model)["1.router.mean_attention"].double()
        assert state.layout.images is None
        stays = used[:, 1][state.layout.image]
        attention, unknown = state.attention, ~stays
        if criterion == "kl":
            assert torch.equal(attention[unknown], mean.expand_as(attention)[unknown]) and state.key.shape[1] == 0
            continue
        weight = stays.to(DOUBLE) / stays.sum(1, keepdim=True)
        torch.testing.assert_close(attention.exp().mean(1), (attention.exp() * weight).sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(state.key.mean(1), (state.key * weight[..., None]).sum(1), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_with_nobody_sitting_out_the_ordinary_path_runs_bit_for_bit() -> None:
    model, images = vit(), pictures(4)
    open_gates = [HeadGate(block, 0.0) for block in range(4)]
    cuts = cuts_of("merge", [0, 1], threshold=64.0)
    one, other = gated(model, open_gates, cuts=cuts).run(images), gated(model, (), cuts=cuts).run(images)
    assert torch.equal(one.logits, other.logits) and (one.traffic.heads == 3).all()
    assert (one.macs - other.macs == 4 * 24 * 3).all()  # what predicting costs


@torch.no_grad()
def test_at_any_price_the_head_predicted_dearest_stays() -> None:
    model, images = vit(), pictures(5)
    cut = gated(model, [HeadGate(1, 1e9)])
    outcome = cut.run(images, trace=True)
    weights = gate_tables(model)
    row = model.blocks[1].norm1(model.blocks[0](open_host(model).embed(images)))[:, 0]
    dearest = (row @ weights["1.gate.direction"] + weights["1.gate.offset"]).argmax(1)
    assert outcome.used is not None and torch.equal(outcome.used[:, 1].float().argmax(1), dearest) and len(set(dearest.tolist())) > 1
    assert outcome.traffic.heads.tolist() == [[3, 1, 3, 3]] * 5


@torch.no_grad()
def test_without_a_prefix_the_gate_reads_the_mean_of_the_patches_weighed_by_what_they_stand_for() -> None:
    model, images = vit("pooled", DOUBLE), pictures(4, DOUBLE)
    cut = gated(model, [HeadGate(2, 1.0)], cuts=cuts_of("merge", [0, 1], threshold=64.0))
    rows: list[Tensor] = []
    cut.gates["2"].register_forward_hook(lambda _, inputs, __: rows.append(inputs[0]))
    entered: list[Tensor] = []
    cut.network.blocks[2].norm1.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].clone()))
    outcome = cut.run(images, trace=True)
    assert outcome.sources is not None and len(set(outcome.traffic.attended[:, 2])) > 1
    first = 0
    for image, count in enumerate(outcome.traffic.attended[:, 2]):
        own = model.blocks[2].norm1(entered[0][first : first + count])
        expected = own[outcome.sources[1][image]].mean(0)  # every patch has the row of its token once
        torch.testing.assert_close(rows[0][image], expected, rtol=1e-9, atol=1e-9)
        first += count


@pytest.mark.parametrize("skipping", [False, True])
@torch.no_grad()
def test_the_count_of_an_image_is_what_torch_runs_for_it(skipping: bool) -> None:
    """Half of the counter's operations, and for a batch their sum: nothing runs for heads that sit out."""
    model, images = vit(), pictures(6)
    plan_cuts = cuts_of("drop", [0, 1], remove=3)
    cut = gated(model, criterion="random", cuts=plan_cuts, skip_unread=skipping, heads=[HeadCut(2, (0,))])
    outcome = cut.run(images)
    assert len(set(outcome.macs)) > 1
    for image, macs in zip(images.split(1), outcome.macs, strict=True):
        assert counted_macs(cut, image) == macs
    assert counted_macs(cut, images) == outcome.macs.sum()


@torch.no_grad()
def test_variants_are_few_share_all_but_attention_and_follow_the_weights() -> None:
    model, images = vit("wide_heads", num_heads=12), pictures(40)
    cut = gated(model, [HeadGate(1, 1.0)])
    block, variants = cut.host.blocks[1], cut.gates["1"].variants
    before = cut(images)
    assert 1 < len(variants.made) <= 8
    gone, twin = next(iter(variants.made.items()))
    assert twin.heads == 12 - len(gone) and block.heads == 12 and cut.host.blocks[1].block.mlp is twin.block.mlp
    assert len(list(cut.parameters())) == len(list(model.parameters()))
    block.attention.proj.weight.mul_(0.0)
    changed = cut(images)
    assert not torch.allclose(before, changed)
    expected = silenced(cut.network, images, cut.run(images, trace=True).used)
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(cut)
    assert not other.gates["1"].variants.made and torch.equal(other(images), changed)


def test_gradients_reach_the_images_but_weights_are_not_trained_behind_copies() -> None:
    model, images = vit("plain", DOUBLE), pictures(4, DOUBLE)
    cut = gated(model, cuts=cuts_of("merge", [0, 1], threshold=64.0))
    with torch.inference_mode():
        cut(images)  # twins made here must serve gradients later
    (slope,) = torch.autograd.grad(cut(images.requires_grad_()).sum(), images)
    along = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    with torch.no_grad():
        expected = (cut(images + 1e-7 * along) - cut(images - 1e-7 * along)).sum() / 2e-7
    assert (slope * along).sum().item() == pytest.approx(expected.item(), rel=1e-4)
    cut.requires_grad_()
    with pytest.raises(UsageError, match="cannot be trained; freeze the attention"):
        cut(images)


@torch.no_grad()
def test_turning_the_dial_turns_the_gates_alike() -> None:
    model, images = vit(), pictures(6)
    plan = dataclasses.replace(plan_for(model, cuts_of("merge", [0], threshold=32.0), gates=EVERY), dial=32.0)
    own = {**tables(model), **gate_tables(model)}
    cut = graft(model, plan, own)
    used = []
    for dial in (0.0, 16.0, 32.0, 1e6):
        with pytest.warns(UserWarning, match="nothing is known"):
            cut.set_dial(dial)
        moved = dataclasses.replace(
            plan,
            tokens=tuple(cuts_of("merge", [0], threshold=dial)),
            gates=tuple(HeadGate(gate.block, dial / 32) for gate in EVERY),
            dial=dial or None,
        )
        assert cut.plan.gates == moved.gates
        expected = graft(model, moved, own).run(images)
        outcome = cut.run(images)
        assert torch.equal(outcome.logits, expected.logits)
        used.append(int(outcome.traffic.heads.sum()))
    assert used[0] == 6 * 12 > used[1] > used[2] > used[3] == 6 * 4


@torch.no_grad()
def test_features_on_the_full_grid_are_those_of_the_gated_network() -> None:
    model, images = vit(), pictures(4)
    cut = gated(model, skip_unread=True)
    features = cut.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), cut(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_a_run_keeps_of_gates_beside_removed_heads_makes_the_same_model_again() -> None:
    model, images = vit(), pictures(5)
    cut = gated(model, cuts=cuts_of("merge", [0, 1], threshold=64.0), heads=[HeadCut(1, (1,)), HeadCut(2, (0, 2))])
    state = cut.state_dict()
    again = graft(model, cut.plan, artefact._tables(state, cut.plan))
    again.load_state_dict(state)
    assert torch.equal(again(images), cut(images)) and state["gates.1.direction"].shape == (24, 2)


def test_what_cannot_be_gated_is_refused() -> None:
    model: nn.Module = vit("attention_norm")
    with pytest.raises(UsageError, match="normalised over all heads; use --heads none"):
        gated(model)
    model = vit()
    plan, own = plan_for(model, cuts_of("merge", [1], remove=2), gates=EVERY), {**tables(model), **gate_tables(model)}
    for name, shape in (("1.gate.direction", (24, 3)), ("3.gate.offset", (3,)), ("1.router.mean_attention", (3,))):
        with pytest.raises(UsageError, match=rf"prices heads of block {name[0]}, but its table '{name}' is missing; make the run again"):
            graft(model, plan, {key: table for key, table in own.items() if key != name})
        with pytest.raises(UsageError, match=re.escape(f"'{name}' has shape (2,), but the plan needs {shape}")):
            graft(model, plan, {**own, name: torch.zeros(2)})


def test_the_price_of_a_head_is_compared_on_the_scale_of_the_threshold() -> None:
    """A head of predicted price p sits out at p, and stays just below it."""
    model, images = vit(), pictures(1)
    flat = {"0.gate.direction": torch.zeros(24, 3), "0.gate.offset": torch.tensor([0.5, 2.0, 8.0]).log()}
    for threshold, stay in ((0.49, 3), (0.51, 2), (2.01, 1), (100.0, 1)):
        cut = graft(model, plan_for(model, gates=[HeadGate(0, threshold)]), flat)
        assert cut.run(images).traffic.heads[0, 0] == stay


@pytest.mark.parametrize("kind", ["plain", "registers"])
@torch.no_grad()
def test_heads_that_stay_keep_their_own_power_of_sizes(kind: str) -> None:
    """With learned exponents, a gated image merges as in a model from which the heads it does not use are removed for good."""
    model, images = vit(kind, DOUBLE), pictures(6, DOUBLE)
    found, cuts = {**tables(model), **gate_tables(model), **learned_tables(model)}, cuts_of("merge", [0, 1, 2], remove=3)
    cut = graft(model, plan_for(model, cuts, gates=EVERY, heads=[HeadCut(1, (0,))]), found)
    outcome = cut.run(images, trace=True)
    assert outcome.used is not None and outcome.used[:, 2].unique(dim=0).shape[0] > 1
    for image in range(6):
        unused = {block: tuple((~outcome.used[image, block]).nonzero().flatten().tolist()) for block in range(4)}
        alone = graft(model, plan_for(model, cuts, heads=[HeadCut(block, gone) for block, gone in unused.items() if gone]), found)
        torch.testing.assert_close(alone(images[image : image + 1])[0], outcome.logits[image], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "pooled"])
@torch.no_grad()
def test_a_network_in_halves_lets_heads_sit_out(kind: str) -> None:
    rounded, halves = (gated(vit(kind).half().float(), EVERY, cuts=[TokenCut(1, "merge", remove=2)]) for _ in range(2))
    many = pictures(5).half()
    expected = rounded.run(many.float(), trace=True)
    assert expected.used is not None and not expected.used.all()
    halves.network.half()
    found = halves.run(many, trace=True)
    assert found.used is not None and found.logits.dtype is torch.float16
    same = (found.used == expected.used).flatten(1).all(1)
    assert same.sum() >= 4  # of five; the inputs of a gate are rounded, and a price may lie on the threshold
    torch.testing.assert_close(found.logits[same].float(), expected.logits[same], rtol=0.01, atol=0.01)
