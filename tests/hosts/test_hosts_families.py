from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from by_hand import rows_that_leave
from families import FAMILIES, HF, ByHand, family, features_of, logits_of, shots
from hesper.cost import dense_macs
from hesper.errors import UsageError
from hesper.graft import GraftedViT, graft
from hesper.graft.deciders import Decision, State
from hesper.graft.even import EvenDecision
from hesper.heart.fit import dense_states
from hesper.heart.gated import HEAD_GATES, TOKEN_GATES, gated_forward, ones
from hesper.hosts import open_host
from hesper.plan import HeadCut, empty_plan
from oracles import counted_macs
from vits import cuts_of, plan_for, tables

DOUBLE = torch.float64
READERS = ["distilled", "eva02_clip", "rotary", "rotary_mixed", "hf_vit", "hf_deit", "hf_deit_teacher"]
REMOVABLE = [kind for kind in FAMILIES if kind != "eva02_clip"]


def grafted(kind: str, dtype: torch.dtype = DOUBLE, criterion: str = "tome", cuts: Any = (), **more: Any) -> GraftedViT:
    model: Any = family(kind, dtype)
    return graft(model, plan_for(model, cuts, criterion, **more), tables(model))


class Watch:
    """Records every decision, by image, as {place of the patch that goes: place it merges into or None}."""

    def __init__(self, model: GraftedViT) -> None:
        self.fates: list[list[dict[int, int | None]]] = []
        for decider in model.deciders.values():
            decider.register_forward_hook(self._note)

    def _note(self, _: nn.Module, arguments: tuple[State], decision: Decision | EvenDecision) -> None:
        layout = arguments[0].layout
        leave, every = rows_that_leave(decision).items(), []
        for run in layout.listed(range(len(layout.counts))):
            start, end = layout.bounds[run : run + 2]
            every.append({gone - start: None if to is None else to - start for gone, to in leave if start <= gone < end})
        self.fates.append(every)


def by_hand(model: Any, image: Tensor, prefix: int, fates: list[dict[int, int | None]]) -> tuple[Tensor, list[list[int]]]:
    """One image with every token repeated once per patch it stands for, run by the library's own modules.

    Gives the tokens as they leave the last block, one each, and the original places each stands for.
    """
    parts = ByHand(model)
    tokens, rotary = parts.embed(image)
    stands = [[place] for place in range(tokens.shape[1])]
    for index in range(len(parts.blocks)):
        copies = torch.tensor([len(own) for own in stands])
        own_places = torch.tensor([own[0] - prefix for own in stands[prefix:]])
        turns = None if rotary is None else rotary[..., own_places.repeat_interleave(copies[prefix:]), :]
        repeated = parts.attended(index, tokens.repeat_interleave(copies, 1), turns)
        tokens = repeated[:, copies.cumsum(0) - copies]
        gone = fates[index] if index < len(fates) else {}
        into: dict[int, list[int]] = {}
        for source, to in gone.items():
            if to is not None:
                into.setdefault(to, []).append(source)
        rows, left = [], []
        for place, own in enumerate(stands):
            if place in gone:
                continue
            group = [place, *into.get(place, [])]
            weight = torch.tensor([float(len(stands[one])) for one in group], dtype=tokens.dtype)
            rows.append((tokens[0, group] * weight[:, None]).sum(0) / weight.sum())
            left.append([patch for one in group for patch in stands[one]] if len(group) > 1 else own)
        tokens, stands = torch.stack(rows)[None], left
        tokens = parts.fed(index, tokens)
    return tokens, stands


def repeated(tokens: Tensor, stands: list[list[int]]) -> Tensor:
    return tokens.repeat_interleave(torch.tensor([len(own) for own in stands]), 1)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_the_halves_compose_to_the_host_bit_for_bit(kind: str) -> None:
    model, images = family(kind), shots(kind, 3)
    host = open_host(model)
    own = logits_of(model, images)
    assert torch.equal(gated_forward(host, images).logits, own)
    cut = graft(model, empty_plan("tiny", host.anatomy))
    assert torch.equal(cut(images), own) and torch.equal(cut.run(images).logits, own)
    assert torch.equal(cut.forward_features(images), features_of(model, images))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_the_order_of_a_checkerboard_is_lost_on_the_host(kind: str) -> None:
    """On a grid of even width tokens run in another order than they are read in; where none leaves, nothing shows of it."""
    model: Any = family(kind, DOUBLE, **({} if kind in HF else {"img_size": (32, 32)}))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    cut = graft(model, plan_for(model, cuts_of("merge", [0, 2], threshold=0.0)), tables(model))
    assert cut.order is not None and not torch.equal(cut.order, torch.arange(16))
    torch.testing.assert_close(cut(images), logits_of(model, images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cut.forward_features(images), features_of(model, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", [{"remove": 2}, {"threshold": 0.6}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize(("criterion", "combine"), [("tome", "merge"), ("random", "drop")])
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_what_is_decided_is_done(kind: str, criterion: str, combine: Any, how: dict[str, Any]) -> None:
    """Logits and features on the full grid equal the library's own modules on physically repeated tokens."""
    cut = grafted(kind, DOUBLE, criterion, cuts_of(combine, [0, 1, 2], **how))
    images, anatomy, watch = shots(kind, 3, DOUBLE), cut.plan.model.anatomy, Watch(cut)
    logits, features = cut(images), cut.forward_features(images)
    model, prefix = family(kind, DOUBLE), anatomy.prefix_tokens
    for image in range(3):
        fates = [decided[image] for decided in watch.fates[:3]]
        assert sum(map(len, fates)) >= 1
        tokens, stands = by_hand(model, images[image], prefix, fates)
        torch.testing.assert_close(logits[image], ByHand(model).read(repeated(tokens, stands)), rtol=1e-9, atol=1e-9)
        normed = open_host(model).norm(tokens[0])
        torch.testing.assert_close(features[image], unmerged(normed, stands, anatomy.grid, prefix), rtol=1e-9, atol=1e-9)


def unmerged(normed: Tensor, stands: list[list[int]], grid: tuple[int, int], prefix: int) -> Tensor:
    """Each original place's row; where it is gone, that of the nearest place that is not."""
    row_of = {place: row for row, own in enumerate(stands) for place in own}

    def distance(one: int, other: int) -> int:
        (r, c), (s, d) = divmod(one - prefix, grid[1]), divmod(other - prefix, grid[1])
        return (r - s) ** 2 + (c - d) ** 2

    out = []
    for place in range(prefix + grid[0] * grid[1]):
        if place not in row_of:
            _, place = min((distance(place, other), other) for other in row_of if other >= prefix)
        out.append(normed[row_of[place]])
    return torch.stack(out)


@pytest.mark.parametrize("kind", READERS)
@torch.no_grad()
def test_what_nobody_reads_is_left_out_of_logits_and_kept_in_features(kind: str) -> None:
    cuts, images = cuts_of("merge", [0, 3], remove=3), shots(kind, 2, DOUBLE)
    with_all, without = grafted(kind, cuts=cuts[:1]), grafted(kind, cuts=cuts, skip_unread=True)
    torch.testing.assert_close(without(images), with_all(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(without.forward_features(images), with_all.forward_features(images), rtol=1e-9, atol=1e-9)
    assert (without.run(images).macs < with_all.run(images).macs).all()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_dropping_is_a_gate_of_zero(kind: str) -> None:
    cut, images = grafted(kind, cuts=cuts_of("drop", [0, 2, 3], remove=3), criterion="random"), shots(kind, 2, DOUBLE)
    outcome, host = cut.run(images, trace=True), open_host(family(kind, DOUBLE))
    assert outcome.sources is not None
    gates = ones(host, 2, TOKEN_GATES, like=images)
    for block, where in enumerate(outcome.sources):
        gates[TOKEN_GATES][:, block][where < 0] = 0
    assert (gates[TOKEN_GATES] == 0).any()
    torch.testing.assert_close(outcome.logits, gated_forward(host, images, gates).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", REMOVABLE)
@torch.no_grad()
def test_removing_heads_is_gating_them_to_zero_with_smaller_weights(kind: str) -> None:
    images, host = shots(kind, 2, DOUBLE), open_host(family(kind, DOUBLE))
    heads = [HeadCut(1, (0,)), HeadCut(3, (0, 2))]
    alone = grafted(kind, heads=heads)
    gates = ones(host, 2, HEAD_GATES, like=images)
    gates[HEAD_GATES][:, 1, 0] = 0
    gates[HEAD_GATES][:, 3, (0, 2)] = 0
    torch.testing.assert_close(alone(images), gated_forward(host, images, gates).logits, rtol=1e-9, atol=1e-9)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (host.module, alone.network))
    assert before - after >= 3 * 4 * 24 * 8
    both = grafted(kind, heads=heads, cuts=cuts_of("merge", [0, 1], remove=2))
    assert both(images).isfinite().all() and (both.run(images).macs < alone.run(images).macs).all()


@pytest.mark.parametrize("kind", REMOVABLE)
@torch.no_grad()
def test_a_block_without_heads_is_another_with_all_but_attention_in_common(kind: str) -> None:
    host, other = open_host(family(kind, DOUBLE)), open_host(family(kind, DOUBLE))
    images = shots(kind, 2, DOUBLE)
    stream, block = host.embed(images), host.blocks[1]
    before = {name: tensor.clone() for name, tensor in host.module.state_dict().items()}
    fewer = block.without_heads([0]).without_heads([1])  # of the two left
    other.embed(images)
    other.blocks[1].remove_heads([0, 2])
    found, expected = fewer.project(stream), other.blocks[1].project(stream)
    for name in ("normed", "query", "key", "value"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    mixed = found.value.flatten(2)
    assert torch.equal(fewer.merge_heads(mixed), other.blocks[1].merge_heads(mixed))
    assert torch.equal(fewer.feed(stream), block.feed(stream)) and torch.equal(fewer.normed(stream), block.project(stream).normed)
    assert fewer.heads == 1 and block.heads == 3 and fewer.attention is not block.attention
    shared = {id(p) for p in host.module.parameters()} - {id(p) for p in block.attention.parameters()}
    own = vars(fewer).get("block", vars(fewer).get("layer"))
    assert {id(p) for p in own.parameters()} - {id(p) for p in fewer.attention.parameters()} <= shared
    assert all(torch.equal(before[name], tensor) for name, tensor in host.module.state_dict().items())


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_the_count_is_what_torch_counts(kind: str) -> None:
    model, images = family(kind).requires_grad_(False), shots(kind, 1)
    cut = grafted(kind, torch.float32, "random", cuts_of("drop", [0, 1, 3], remove=2))
    assert counted_macs(model, images) == dense_macs(open_host(model).anatomy)
    assert counted_macs(cut, images) == int(cut.run(images).macs[0]) < dense_macs(open_host(model).anatomy)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_the_states_of_the_dense_model_are_those_its_blocks_would_decide_on(kind: str) -> None:
    host, images = open_host(family(kind)), shots(kind, 2)
    streams = gated_forward(host, images).streams
    for state, stream in zip(dense_states(host, images), streams, strict=True):
        torch.testing.assert_close(state.layout.by_image(state.stream), stream, rtol=1e-5, atol=1e-5)
        assert state.attention.exp().sum(0).isfinite().all()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_projecting_for_readers_is_projecting_with_fewer_queries(kind: str) -> None:
    host, images = open_host(family(kind, DOUBLE)), shots(kind, 2, DOUBLE)
    stream, prefix = host.embed(images), host.anatomy.prefix_tokens
    every, some = host.blocks[1].project(stream), host.blocks[1].project_readers(stream, stream[:, :prefix])
    torch.testing.assert_close(some.query, every.query[:, :prefix], rtol=1e-12, atol=1e-12)
    for name in ("normed", "key", "value"):
        torch.testing.assert_close(getattr(some, name), getattr(every, name), rtol=1e-12, atol=1e-12)


def test_a_model_can_be_copied_while_gradients_run_through_its_rotations() -> None:
    cut, images = grafted("rotary_mixed", cuts=cuts_of("merge", [0], remove=2)), shots("rotary_mixed", 2, DOUBLE)
    cut.requires_grad_()
    logits = cut(images)
    assert torch.equal(copy.deepcopy(cut)(images), logits)
    logits.sum().backward()
    assert cut.network.rope.freqs.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["attention_pool", "eva02", "rotary_attention_pool", "hf_dinov2"])
def test_derivatives_in_token_gates_agree_with_finite_differences(kind: str) -> None:
    host, images = open_host(family(kind, DOUBLE).requires_grad_(False)), shots(kind, 2, DOUBLE)
    at, generator = ones(host, 2, TOKEN_GATES, like=images)[TOKEN_GATES], torch.Generator().manual_seed(3)
    along, weights = (torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in (at.shape, (2, 5)))

    def value(step: float) -> Tensor:
        return (gated_forward(host, images, {TOKEN_GATES: at + step * along}).logits * weights).sum()

    with sdpa_kernel(SDPBackend.MATH):
        at.requires_grad_()
        (slope,) = torch.autograd.grad(value(0.0), at)
    with torch.no_grad():
        expected = (value(1e-5) - value(-1e-5)) / 2e-5
    assert (slope * along).sum().item() == pytest.approx(expected.item(), rel=1e-6) and expected.abs() > 1e-3


@torch.no_grad()
def test_a_token_turns_by_its_place_and_takes_it_along() -> None:
    host, images = open_host(family("rotary", DOUBLE)), shots("rotary", 1, DOUBLE)
    stream = host.embed(images)[0]
    every, place = host.blocks[0].project(stream), torch.tensor([0, 7, 3, 12])
    torch.testing.assert_close(host.blocks[0].project(stream[place], place).key, every.key[place], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(host.blocks[0].project(stream[place], place.flip(0)).key, every.key[place])


@pytest.mark.parametrize("kind", HF)
def test_an_altered_or_headless_classifier_is_refused(kind: str) -> None:
    model: Any = family(kind)
    ByHand(model).blocks[2].attention.q_proj = nn.Identity()
    with pytest.raises(UsageError, match="is not built as transformers' own"):
        open_host(model)
    headless: Any = family(kind)
    name = "cls_classifier" if hasattr(headless, "cls_classifier") else "classifier"
    setattr(headless, name, nn.Identity())
    with pytest.raises(UsageError, match="classifier of type Identity"):
        open_host(headless)
    pruned: Any = family(kind)
    open_host(pruned).blocks[3].remove_heads([0])
    with pytest.raises(UsageError, match="Block 3 has another shape than block 0"):
        open_host(pruned)


def test_anatomies_say_what_is_read_out() -> None:
    def of(kind: str) -> dict[str, Any]:
        anatomy = dataclasses.asdict(open_host(family(kind)).anatomy)
        return {name: anatomy[name] for name in ("tokens", "prefix_tokens", "reads_patches", "readout_macs", "readout_token_macs")}

    assert of("distilled") == {"tokens": 14, "prefix_tokens": 2, "reads_patches": False, "readout_macs": 240, "readout_token_macs": None}
    assert of("hf_deit") == {"tokens": 18, "prefix_tokens": 2, "reads_patches": False, "readout_macs": None, "readout_token_macs": None}
    assert of("hf_dinov2_registers") == {
        "tokens": 20,
        "prefix_tokens": 4,
        "reads_patches": True,
        "readout_macs": 240,
        "readout_token_macs": None,
    }
    pooled = of("attention_pool")
    # Keys and values, then scores and their sum, for each token; query, projection and MLP of the one latent, and the classifier.
    assert pooled["readout_token_macs"] == 2 * 24 * 24 + 2 * 24 and pooled["readout_macs"] == 2 * 24 * 24 + 2 * 24 * 48 + 24 * 5
