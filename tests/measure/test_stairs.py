"""The staircase on a clock that counts work instead of time: what it foretells of a whole run must then be true to the last digit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft import graft
from hesper.graft.graph_pieces import GraphPieces
from hesper.graft.one_graph import OneGraphViT, separated
from hesper.graft.pieces import Decision
from hesper.hosts.open import OpenModel, wrap
from hesper.measure.stairs import Stairs, measure_stairs
from hesper.plan import HeadCut, ModelRef, Plan, Pricing, TokenCut, empty_plan

RANK = 4


class Work:
    """Counts the multiply-accumulates of every linear layer that runs, by hooks of torch's own."""

    def __init__(self) -> None:
        self.done = 0

    def __enter__(self) -> Work:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
            if isinstance(module, nn.Linear):
                self.done += inputs[0].numel() // module.in_features * module.in_features * module.out_features

        self.hook = nn.modules.module.register_module_forward_hook(count)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def clock(self) -> float:
        return float(self.done)


@pytest.fixture(scope="module")
def model() -> OpenModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap("test_vit", timm.create_model("test_vit", num_classes=5).eval())


def measured(model: OpenModel, images: int = 1, decisions: tuple[Decision, ...] = (Decision("merge", 1, RANK),)) -> Stairs:
    with Work() as work:
        return measure_stairs(model, torch.randn(images, 3, 160, 160), decisions, seconds=1e18, clock=work.clock)


def plan_of(model: OpenModel, cuts: dict[int, int], heads: tuple[HeadCut, ...] = ()) -> Plan:
    blank = dataclasses.replace(empty_plan(model.ref.name, model.ref.anatomy), skip_unread=bool(cuts), heads=heads)
    pricing = Pricing("kl", 1.0, 1, RANK, 0.35, 1)
    tokens = tuple(TokenCut(block, "merge", remove=remove) for block, remove in cuts.items())
    return dataclasses.replace(blank, pricing=pricing, tokens=tokens)


def tables(model: OpenModel, plan: Plan) -> dict[str, Tensor]:
    width, heads = model.ref.anatomy.width, model.ref.anatomy.heads
    found = {}
    for cut in plan.tokens:
        found |= {f"{cut.block}.root": torch.randn(width, RANK), f"{cut.block}.router.direction": torch.zeros(width)}
        found |= {f"{cut.block}.router.attention": torch.zeros(heads), f"{cut.block}.router.offset": torch.zeros(())}
        found |= {f"{cut.block}.router.mean_attention": torch.zeros(heads)}
    return found


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("cuts", [{1: 20}, {0: 5, 2: 30}, {3: 11}])
def test_what_it_foretells_is_what_a_whole_run_does(model: OpenModel, images: int, cuts: dict[int, int]) -> None:
    stairs, plan = measured(model, images), plan_of(model, cuts)
    cut = graft(model.host.module, plan, tables(model, plan), check_weights=False)
    with Work() as work, torch.inference_mode():
        outcome = cut.run(torch.randn(images, 3, 160, 160))
    foretold = stairs.seconds(plan, outcome.traffic.fed, outcome.traffic.heads)
    assert foretold == pytest.approx(np.full(images, work.done))


def test_it_knows_the_dense_model_and_every_count(model: OpenModel) -> None:
    stairs = measured(model, 2)
    with Work() as work, torch.inference_mode():
        model.host.module(torch.randn(2, 3, 160, 160))
    assert stairs.dense == work.done and stairs.batch_size == 2
    assert stairs.counts == tuple(range(2, model.ref.anatomy.tokens + 1))
    assert list(stairs.blocks) == sorted(stairs.blocks) and stairs.deciding.keys() == {"1"}


def test_heads_that_left_take_no_time(model: OpenModel) -> None:
    anatomy = model.ref.anatomy
    stairs = measured(model, 1, ())
    plan = plan_of(model, {}, (HeadCut(1, (0,)), HeadCut(2, tuple(range(anatomy.heads - 1)))))
    cut = graft(model.host.module, plan, check_weights=False)
    with Work() as work, torch.inference_mode():
        outcome = cut.run(torch.randn(1, 3, 160, 160))
    assert stairs.seconds(plan, outcome.traffic.fed, outcome.traffic.heads) == pytest.approx([work.done])


def test_between_counts_it_is_interpolated_and_little_time_means_few_counts(model: OpenModel) -> None:
    with Work() as work:
        coarse = measure_stairs(model, torch.randn(1, 3, 160, 160), (Decision("merge", 1, RANK),), seconds=0.0, clock=work.clock)
    fine = measured(model)
    assert len(coarse.counts) < 20 and coarse.counts[-1] == fine.counts[-1]
    plan, fed = plan_of(model, {1: 20}), np.array([[101, 77, 77, 77, 77, 1]])[:, -model.ref.anatomy.depth :]
    heads = np.full_like(fed, model.ref.anatomy.heads)
    assert coarse.seconds(plan, fed, heads) == pytest.approx(fine.seconds(plan, fed, heads), rel=1e-3)


def test_in_plain_values_and_back(model: OpenModel) -> None:
    stairs = measured(model)
    assert Stairs.of(json.loads(json.dumps(stairs.plain()))) == stairs
    for broken in ({**stairs.plain(), "counts": ()}, {**stairs.plain(), "dense": 0.0}, {}, {**stairs.plain(), "deciding": [1]}):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            Stairs.of(broken)


def test_two_ways_of_letting_tokens_go_are_refused(model: OpenModel) -> None:
    with pytest.raises(UsageError, match="one way"):
        measure_stairs(model, torch.randn(1, 3, 160, 160), (Decision("merge", 1, 4), Decision("drop", 1, 4)))


def stairs_of(counts: Sequence[int], seconds: Callable[[int], float], images: int = 1) -> Stairs:
    flat = (0.0,) * len(counts)
    blocks = tuple(seconds(count) for count in counts)
    return Stairs(images, True, tuple(counts), blocks, flat, flat, (2, 197), {}, (1,), (1.0,), 0.0, 1.0)


@pytest.mark.parametrize("edge", [8, 16, 32])
def test_edges_are_found_where_a_count_takes_less_than_its_neighbours(edge: int) -> None:
    """Of tiles of which a part takes as long as a whole one, and of tiles whose rest takes more than its share."""
    rng = np.random.default_rng(edge)
    for shape in (lambda count: 20 + 2 * -(-count // edge), lambda count: 40 + count + 0.15 * edge * (count % edge > 0)):
        assert stairs_of(range(2, 198), lambda count, shape=shape: shape(count) * (1 + 0.003 * rng.standard_normal())).multiple(8) == edge


def test_coarser_steps_are_taken_only_for_another_hundredth() -> None:
    def lower_at(shares: dict[int, float]) -> Callable[[int], float]:
        return lambda count: 100 * (1 - max((share for power, share in shares.items() if count % power == 0), default=0.0))

    for shares, multiple in (({8: 0.03, 16: 0.036}, 8), ({8: 0.03, 16: 0.08}, 16), ({16: 0.03, 32: 0.034}, 16), ({8: 0.004}, 1)):
        assert stairs_of(range(2, 198), lower_at(shares)).multiple(1) == multiple


@given(slope=st.floats(0.01, 2), bend=st.floats(0, 0.005), floor=st.floats(0, 150), noise=st.floats(0, 0.005), seed=st.integers(0, 99))
def test_smooth_curves_have_no_edges(slope: float, bend: float, floor: float, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def seconds(count: int) -> float:
        return max(20 + slope * count + bend * count**2, floor) * (1 + noise * rng.standard_normal())

    assert stairs_of(range(2, 198), seconds).multiple(8) == 1
    assert stairs_of(range(2, 198), seconds, images=32).multiple(8) == 8


def test_counts_too_far_apart_to_see_edges_give_the_usual_multiple() -> None:
    assert stairs_of((2, *range(16, 197, 16), 197), lambda count: float(-(-count // 16))).multiple(8) == 8
    assert stairs_of((2, 197), float).multiple(8) == 8


@pytest.mark.parametrize("kind", ["drop", "merge"])
def test_pooling_models_are_timed_to_the_last_token(kind: str) -> None:
    pooling = wrap("test_vit", timm.create_model("test_vit", num_classes=5, global_pool="avg", class_token=False).eval())
    with Work() as work:
        stairs = measure_stairs(pooling, torch.randn(1, 3, 160, 160), (Decision(kind, 1, RANK),), seconds=1e18, clock=work.clock)  # type: ignore[arg-type]
    assert not stairs.skip_unread and stairs.counts[0] == 1
    dense = np.full((1, pooling.ref.anatomy.depth), pooling.ref.anatomy.tokens)
    heads = np.full_like(dense, pooling.ref.anatomy.heads)
    plan = empty_plan("test_vit", pooling.ref.anatomy)
    assert stairs.seconds(plan, dense, heads) == pytest.approx([stairs.dense])


def test_where_only_heads_go_only_the_full_count_is_walked(model: OpenModel) -> None:
    assert len(measured(model, 1, ()).counts) == 2


@pytest.mark.parametrize("cuts", [{1: 20}, {0: 5, 2: 30}])
def test_of_a_graph_in_pieces_it_foretells_what_the_whole_graph_does(model: OpenModel, cuts: dict[int, int]) -> None:
    def take_apart(module: torch.nn.Module, ref: ModelRef, decision: Decision | None) -> GraphPieces:
        return GraphPieces(module, ref, decision, lambda piece, example, free: piece)

    decision = (Decision("merge", 1, RANK),)
    with Work() as work:
        stairs = measure_stairs(model, torch.randn(2, 3, 160, 160), decision, pieces=take_apart, seconds=1e18, clock=work.clock)
    plan = plan_of(model, cuts)
    cut = graft(model.host.module, plan, tables(model, plan), check_weights=False)
    outcome = cut.run(torch.randn(2, 3, 160, 160))
    with Work() as work, torch.inference_mode():
        OneGraphViT(separated(cut))(torch.randn(2, 3, 160, 160))
    foretold = stairs.seconds(plan, outcome.traffic.fed, outcome.traffic.heads)
    assert foretold == pytest.approx(np.full(2, work.done))
    plain = measured(model, 2)
    assert stairs.heads == plain.heads
    assert np.array(stairs.attention) / stairs.attention[-1] == pytest.approx(np.array(plain.attention) / plain.attention[-1], rel=0.02)
