"""Fitting again along the cut: where it is the dense fit, what sizes change, and what is put together how."""

from dataclasses import replace

import pytest
import torch

from hesper.curvature import ImageBatch
from hesper.errors import JobError
from hesper.graft import graft
from hesper.graft.deciders import State
from hesper.graft.layout import Layout
from hesper.heart.criteria import Criterion
from hesper.heart.fit import FitSums, Tables
from hesper.heart.refit import RefitSums
from hesper.hosts import open_host
from hesper.plan import HeadCut
from vits import RANK, cuts_of, pictures, plan_for, tables, vit

KL = Criterion("kl", 4.0, 3)
THRESHOLD = 30.0


def sums(kind: str = "plain", blocks=(0, 2), threshold: float = THRESHOLD, heads=()):
    model = vit(kind).requires_grad_(False)
    plan = plan_for(model, cuts_of("merge", blocks, threshold=threshold), "kl", heads=heads)
    return model, plan, RefitSums(open_host(model), plan, Tables(tables(model), (0.0,) * 4), KL, torch.Generator().manual_seed(0))


def batch(start: int = 0, end: int = 6) -> ImageBatch:
    return ImageBatch(pictures(6)[start:end])


@pytest.mark.parametrize("kind", ["plain", "registers", "pooled", "qk_norm"])
@pytest.mark.parametrize("block", [0, 2])
def test_where_nothing_else_is_cut_it_is_the_dense_fit(kind: str, block: int) -> None:
    model, _, again = sums(kind, (block,))
    again.add(batch())
    dense = FitSums(open_host(model), KL, "merge", torch.Generator().manual_seed(0))
    dense.add(batch())
    patches = 6 * (again.anatomy.tokens - again.anatomy.prefix_tokens)
    assert float(again.size[block]) == patches
    torch.testing.assert_close(again.moment[block], dense.moment[block], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(again.covariance[block], dense.covariance[block], rtol=1e-4, atol=1e-4)  # sums in single precision
    torch.testing.assert_close(again.routers[block].moments, dense.routers[block].moments, rtol=1e-4, atol=1e-4)
    one, two = again.tables(RANK), dense.tables(RANK)
    for name in ("router.direction", "router.offset", "router.mean_attention"):
        torch.testing.assert_close(one.tensors[f"{block}.{name}"], two.tensors[f"{block}.{name}"], rtol=1e-2, atol=1e-3)
    roots = (found.tensors[f"{block}.root"] for found in (one, two))
    first, second = (root @ root.T for root in roots)  # axes may turn, the metric may not
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3 * float(second.abs().max()))
    assert one.explained[block] == pytest.approx(two.explained[block], abs=1e-3)


def test_what_is_cut_before_and_after_changes_the_fit() -> None:
    _, _, among = sums(blocks=(0, 1, 2))
    _, _, alone = sums(blocks=(1,))
    for found in (among, alone):
        found.add(batch())
    assert float(among.size[1]) == float(alone.size[1])  # every patch counts, merged or not
    assert not torch.allclose(among.moment[1], alone.moment[1], rtol=0.05)


def test_sizes_share_out_a_slope_and_weigh_a_token() -> None:
    """Loops over tokens, from the definition."""
    _, _, found = sums()
    layout, width, generator = Layout((4, 3), prefix=1), 24, torch.Generator().manual_seed(3)
    stream, normed, first, second = (torch.randn(7, width, generator=generator) for _ in range(4))
    size, attention = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 5.0, 1.0]), torch.randn(7, 3, generator=generator)
    state = State(stream, normed, stream[:, None], stream[:, None], attention, size, layout)
    found._add(2, state, [first, second])
    moment, covariance = torch.zeros(width, width), torch.zeros(width, width)
    rows, targets = [], []
    for patches in ((1, 2, 3), (5, 6)):
        mean = sum(size[row] * stream[row] for row in patches) / sum(size[row] for row in patches)
        for row in patches:
            covariance += size[row] * torch.outer(stream[row] - mean, stream[row] - mean)
            moment += sum(torch.outer(slope[row], slope[row]) for slope in (first, second)) / 2 / size[row]
            targets.append(float((first[row].square().sum() + second[row].square().sum()) / 2 / size[row]))
            rows.append(row)
    assert float(found.size[2]) == float(sum(size[row] for row in rows))
    torch.testing.assert_close(found.moment[2].float(), moment, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.covariance[2].float(), covariance, rtol=1e-5, atol=1e-5)
    features = torch.cat([normed, attention], 1)[rows].double()
    design = torch.cat([features, torch.tensor(targets).double().log()[:, None], torch.ones(5, 1).double()], 1)
    torch.testing.assert_close(found.routers[2].moments, design.T @ design, rtol=1e-5, atol=1e-5)


def test_only_what_decides_gets_new_tables_and_they_cut_the_model() -> None:
    model, plan, found = sums()
    assert found.tables(RANK).tensors == found.start.tensors  # no image, nothing new
    found.add(batch())
    made = found.tables(RANK)
    changed = {name for name in made.tensors if name not in found.start.tensors or made.tensors[name] is not found.start.tensors[name]}
    parts = ("root", "router.direction", "router.attention", "router.mean_attention", "router.offset")
    assert changed == {f"{block}.{part}" for block in (0, 2) for part in parts}
    assert made.explained[1] == found.start.explained[1] and made.explained[0] != 0
    dear, cheap = (graft(model, plan_at(plan, dial), made.tensors).run(pictures(4)).macs.mean() for dial in (1e-9, 1e9))
    assert cheap < dear


def plan_at(plan, dial: float):
    return replace(plan, tokens=tuple(replace(cut, threshold=dial) for cut in plan.tokens))


def test_batches_and_processes_add_up() -> None:
    _, _, whole = sums()
    parts = [sums()[2] for _ in range(2)]
    whole.add(batch())
    parts[0].add(batch(0, 2))
    parts[1].add(batch(2, 4))
    parts[1].add(batch(4, 6))
    for name, tensor in whole.tensors().items():
        one, two = (part.tensors()[name] for part in parts)
        torch.testing.assert_close(one + two, tensor, rtol=1e-4, atol=1e-6)


def test_a_head_that_left_gets_no_weight() -> None:
    _, _, found = sums(heads=[HeadCut(2, (1,))])
    found.add(batch())
    made = found.tables(RANK).tensors
    assert made["2.router.attention"].shape == (3,) and float(made["2.router.attention"][1]) == 0
    assert bool(made["2.router.attention"][[0, 2]].all()) and bool(made["0.router.attention"].all())


def test_a_slope_that_is_not_finite_stops_all_processes_alike() -> None:
    model, plan, _ = sums()
    with torch.no_grad():
        model.head.weight.mul_(float("nan"))
    broken = RefitSums(open_host(model), plan, Tables(tables(model), (0.0,) * 4), KL, torch.Generator().manual_seed(0))
    broken.add(batch())
    with pytest.raises(JobError, match="not finite"):
        broken.tables(RANK)
