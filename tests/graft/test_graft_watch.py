"""Watching a block: what the model is while one decision is left out, and that it is itself again afterwards."""

from dataclasses import replace

import pytest
import torch

from hesper.errors import UsageError
from hesper.graft import graft
from hesper.graft.watch import Watched
from hesper.plan import HeadCut, HeadGate, TokenCut
from vits import cuts_of, pictures, plan_for, tables, vit

BLOCKS = (0, 1, 2)
CUTS = cuts_of("merge", BLOCKS, threshold=30.0)


def watched(kind: str = "plain", cuts=CUTS, **how):
    model = vit(kind)
    plan = plan_for(model, cuts, "kl", **how)
    return model, plan, Watched(graft(model, plan, tables_of(model, how)))


def tables_of(model, how):
    found = tables(model)
    if how.get("gates"):
        for gate in how["gates"]:
            found[f"{gate.block}.gate.direction"] = torch.randn(24, 3, generator=torch.Generator().manual_seed(gate.block))
            found[f"{gate.block}.gate.offset"] = torch.zeros(3)
            found[f"{gate.block}.router.mean_attention"] = torch.full((3,), -2.0)
    return found


@pytest.mark.parametrize("kind", ["plain", "registers", "pooled"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_watched_model_is_the_one_without_that_cut_and_sees_what_the_decider_saw(kind: str, block: int) -> None:
    model, plan, watch = watched(kind)
    images = pictures(3)
    logits, state = watch.watch(images, block)
    fewer = graft(model, replace(plan, tokens=tuple(cut for cut in plan.tokens if cut.block != block)), tables(model))
    torch.testing.assert_close(logits, fewer(images), rtol=1e-5, atol=1e-5)
    outcome = fewer.run(images)
    assert state.layout.counts == tuple(outcome.traffic.attended[:, block].tolist())
    assert state.stream.requires_grad and state.stream.grad_fn is None and not state.size.requires_grad
    assert float(state.size.sum()) == 3 * plan.model.anatomy.tokens


def test_slopes_at_the_watched_tokens_are_differences_of_the_logits() -> None:
    """Central differences: the same block run again from moved rows, with whatever the later blocks decide."""
    _, _, watch = watched(cuts=cuts_of("merge", (0, 1), threshold=30.0))
    watch.double()
    images = pictures(2, torch.float64)
    logits, state = watch.watch(images, 1)
    slope = torch.autograd.grad(logits[0, 2], state.stream)[0]
    direction = torch.randn(state.stream.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    feed = watch.host.blocks[1].feed

    def moved(step: float) -> torch.Tensor:
        block, added = watch.host.blocks[1], step * direction

        def displaced(rows: torch.Tensor) -> torch.Tensor:
            return feed(rows + added) + added

        block.feed = displaced  # type: ignore[method-assign]
        try:
            return watch.watch(images, 1)[0][0, 2].detach()
        finally:
            del block.feed

    found = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close(found, (slope * direction).sum(), rtol=1e-6, atol=1e-9)


def test_afterwards_it_decides_as_before_and_the_model_it_watches_never_changed() -> None:
    model, plan, watch = watched()
    images = pictures(3)
    cut = graft(model, plan, tables(model))
    before = cut(images)
    for block in BLOCKS:
        watch.watch(images, block)
    assert torch.equal(watch(images), before) and torch.equal(cut(images), before)
    with pytest.raises(UsageError, match="32 x 24"):
        watch.watch(images[:, :, :8], 1)
    assert torch.equal(watch(images), before)


def test_heads_that_left_or_sit_out_are_left_out_of_what_is_seen_as_the_decider_sees_it() -> None:
    _, _, static = watched(heads=[HeadCut(1, (0,))])
    assert static.watch(pictures(2), 1)[1].attention.shape[1] == 2
    _, _, gated = watched(gates=[HeadGate(1, 1.0)])
    state = gated.watch(pictures(4), 1)[1]
    assert state.attention.shape[1] == 3
    torch.autograd.grad(gated.watch(pictures(4), 0)[0].sum(), gated._state.stream)  # through blocks whose heads sit out


def test_a_block_without_a_decision_cannot_be_watched() -> None:
    _, _, watch = watched(cuts=[TokenCut(0, "merge", threshold=1.0)])
    with pytest.raises(UsageError, match="Block 2 lets no tokens go"):
        watch.watch(pictures(1), 2)
