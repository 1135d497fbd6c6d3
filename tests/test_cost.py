from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hesper.cost import block_macs, dense_macs, fixed_macs, head_macs, model_macs
from hesper.graft import GraftedViT, Outcome, graft
from hesper.hosts import open_host
from hesper.plan import Anatomy, Combine, HeadCut
from oracles import counted_macs
from vits import KINDS, RANK, cuts_of, pictures, plan_for, tables, vit

TINY = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)


def rounds(model: GraftedViT, images: Tensor) -> tuple[Outcome, dict[int, list[tuple[int, ...]]]]:
    """A run, and how many tokens of every image each block's rounds of matching really compared."""
    seen: dict[int, list[tuple[int, ...]]] = {}
    hooks = []
    for block, decider in model.deciders.items():
        hooks.append(decider.register_forward_hook(lambda _, __, decision, block=int(block): seen.update({block: list(decision.entered)})))
    outcome = model.run(images)
    for hook in hooks:
        hook.remove()
    return outcome, seen


def unseen(model: GraftedViT, outcome: Outcome, image: int, entered: dict[int, list[tuple[int, ...]]]) -> int:
    """What the counter cannot see, by formula: sums of products that are not matrix products.

    * the reader's attention logits: tokens x heads x head width (element-wise product and sum),
    * the router's matrix-vector products: tokens x (width + heads),
    * the weighted sums at merges: merged tokens x width, and x (rank + 1) for what merged before another round.
    """
    total, anatomy, traffic = 0, model.plan.model.anatomy, outcome.traffic
    criterion = model.plan.pricing.criterion if model.plan.pricing else "tome"
    for cut in model.plan.tokens:
        tokens, heads = int(traffic.attended[image, cut.block]), model.host.blocks[cut.block].heads
        if criterion in ("kl", "cls"):
            total += tokens * heads * anatomy.head_dim
        if criterion == "kl":
            total += tokens * (anatomy.width + heads)
        if criterion == "kl" and cut.combine == "merge":
            counts = [count[image] for count in entered[cut.block]]
            total += (counts[0] - counts[-1]) * (RANK + 1)
        if cut.combine == "merge":
            total += (tokens - int(traffic.fed[image, cut.block])) * anatomy.width
    return total


def test_heads_may_differ_between_images() -> None:
    counts = np.arange(1, 25, dtype=np.int64).reshape(2, 12)
    heads = np.array([[1, 2, 3] * 4, [3, 3, 1] * 4])
    together = model_macs(TINY, heads, counts, counts, counts, np.array([5, 6]))
    for image in range(2):
        own = counts[image : image + 1]
        assert model_macs(TINY, heads[image].tolist(), own, own, own, np.array([5 + image])).tolist() == [together[image]]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_dense_count_is_what_torch_counts(kind: str) -> None:
    model = vit(kind)
    assert counted_macs(model, pictures(2)) == 2 * dense_macs(open_host(model).anatomy)


CRITERIA: list[tuple[str, Combine, float]] = [
    ("kl", "merge", 128.0),
    ("tome", "merge", 0.6),
    ("kl", "drop", 0.06),
    ("cls", "drop", 0.06),
    ("cls", "merge", 0.06),
    ("random", "merge", 0.3),
]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("heads", [(), (HeadCut(0, (1,)), HeadCut(3, (0, 2)))])
@pytest.mark.parametrize(("criterion", "combine", "threshold"), CRITERIA)
@pytest.mark.parametrize("kind", ["registers", "skipping"])
@torch.no_grad()
def test_the_count_of_one_image_is_what_torch_counts(
    kind: str, criterion: str, combine: Combine, threshold: float, heads: Any, adaptive: bool
) -> None:
    how = {"threshold": threshold} if adaptive else {"remove": 2}
    dense, skipping = vit("plain" if kind == "skipping" else kind), kind == "skipping"
    plan = plan_for(dense, cuts_of(combine, [0, 1, 2], **how), criterion, heads, skip_unread=skipping)
    model, cut = graft(dense, plan, tables(dense)), 0
    for image in pictures(2).split(1):
        outcome, entered = rounds(model, image)
        assert counted_macs(model, image) == outcome.macs[0] - unseen(model, outcome, 0, entered)
        cut += int(outcome.traffic.fed[0, 2] < outcome.traffic.attended[0, 0])
    assert cut > 0


@torch.no_grad()
def test_a_pooled_mean_weighted_by_size_is_not_counted_as_no_mean_is() -> None:
    dense = vit("pooled")
    model, image = graft(dense, plan_for(dense, cuts_of("merge", [1], remove=3)), tables(dense)), pictures(1)
    outcome, entered = rounds(model, image)
    assert counted_macs(model, image) == outcome.macs[0] - unseen(model, outcome, 0, entered)


@pytest.mark.parametrize(("criterion", "combine", "threshold"), CRITERIA)
@torch.no_grad()
def test_a_ragged_batch_runs_what_its_images_need_and_padded_pairs(criterion: str, combine: Combine, threshold: float) -> None:
    dense, images = vit(), pictures(4)
    plan = plan_for(dense, cuts_of(combine, [0, 1, 2], threshold=threshold), criterion, [HeadCut(1, (0,))], skip_unread=True)
    model = graft(dense, plan, tables(dense))
    outcome, entered = rounds(model, images)
    needed = int(outcome.macs.sum()) - sum(unseen(model, outcome, image, entered) for image in range(4))
    padding = 0
    depth = {"kl": RANK + 2, "tome": 8}.get(criterion, 8)
    for block in range(3):
        patches = outcome.traffic.attended[:, block] - 1
        most = patches.max()
        if combine == "merge" and criterion in ("kl", "tome"):
            before = patches + 1
            for number, counts in enumerate(entered[block]):
                patches = np.array(counts) - 1
                ran = len(patches) * (patches.max() // 2) * ((patches.max() + 1) // 2)
                needs = (patches // 2) * ((patches + 1) // 2) * ((patches < before) | (number == 0))
                padding, before = padding + int(ran - needs.sum()) * depth, patches
        elif combine == "merge":
            padding += int((most**2 - patches**2).sum()) * depth
    assert counted_macs(model, images) == needed + padding


def test_a_block_of_a_usual_shape_has_the_usual_count() -> None:
    n = np.array([197])
    assert block_macs(TINY, 3, n, n, n).tolist() == [12 * 197 * 192**2 + 2 * 197**2 * 192]
    assert dense_macs(TINY) == 12 * (12 * 197 * 192**2 + 2 * 197**2 * 192) + 196 * 768 * 192 + 192 * 1000
    assert head_macs(TINY) == 197 * (4 * 192 * 64) + 2 * 197**2 * 64


def test_a_model_is_its_blocks_its_ends_and_its_decisions() -> None:
    counts = np.arange(1, 25, dtype=np.int64).reshape(2, 12)
    fed, deciding = counts // 2, np.array([7, 9], dtype=np.int64)
    total = model_macs(TINY, [3, 2] * 6, counts, counts, fed, deciding)
    for image in range(2):
        expected = int(deciding[image]) + fixed_macs(TINY)
        for block in range(12):
            n, m, inner = int(counts[image, block]), int(fed[image, block]), (3, 2)[block % 2] * 64
            expected += 4 * n * 192 * inner + 2 * n * n * inner + 2 * m * 192 * 768
        assert total[image] == expected
