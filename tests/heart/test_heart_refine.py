"""Refining merging: what it lowers, what it leaves alone, and when it is not taken."""

from dataclasses import replace

import pytest
import torch

from hesper.curvature import ImageBatch
from hesper.errors import JobError
from hesper.graft import graft
from hesper.heart.fit import Tables
from hesper.heart.refine import Refinement, refine
from hesper.measure.evaluate import evaluate
from hesper.plan import Plan, TokenCut
from vits import plan_for, tables, vit

DIAL = 30.0
CUTS = (TokenCut(0, "merge", threshold=DIAL), TokenCut(2, "merge", threshold=DIAL))


def job(kind: str = "plain", dtype: torch.dtype = torch.float32):
    model = vit(kind, dtype)
    plan = replace(plan_for(model, CUTS, "kl"), dial=DIAL)
    images = torch.rand(16, 3, *plan.model.anatomy.image_size, generator=torch.Generator().manual_seed(5)).to(dtype)
    return model, plan, Tables(tables(model), ()), images


def drift(model: torch.nn.Module, plan: Plan, found: Tables, images: torch.Tensor) -> float:
    return float(evaluate(graft(model, plan, found.tensors), model, [ImageBatch(images)]).drift_kl.mean())


def learn(model: torch.nn.Module, plan: Plan, start: Tables, images: torch.Tensor, steps: int) -> Tables:
    return refine(model, plan, start, [ImageBatch(images)] * steps, steps)


def test_refining_lowers_the_drift_and_touches_no_weight_of_the_network():
    model, plan, start, images = job()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = learn(model, plan, start, images, 30)
    assert drift(model, plan, found, images) < 0.8 * drift(model, plan, start, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(found.tensors) - set(start.tensors) == {
        "size_exponent",
        *(f"{block}.restoration.{part}" for block in (0, 2) for part in ("stretch", "gain")),
    }
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in start.tensors.items())


def test_a_step_goes_down_the_slope_of_the_drift():
    """The direction of the first step against differences of the drift itself, which single precision would not tell from rounding."""
    model, plan, start, images = job(dtype=torch.float64)
    plan = replace(plan, dial=None)  # at this dial alone
    found = learn(model, plan, start, images, 1)
    moved = {name: tensor for name, tensor in found.tensors.items() if name not in start.tensors}
    for name, tensor in moved.items():
        at_rest = torch.ones_like(tensor) if name.endswith(("stretch", "exponent")) else torch.zeros_like(tensor)
        step = tensor - at_rest
        if name == "size_exponent":  # every token still has size 1 in the attention of block 0, and the last reads only what it must
            assert not bool(step[0].any()) and bool(step[1:].all())
        else:
            assert bool(step.any()), name
        one, other = (replace(start, tensors={**start.tensors, name: at_rest + sign * 0.1 * step}) for sign in (1, -1))
        assert drift(model, plan, one, images) < drift(model, plan, other, images), name


def test_learning_that_was_stopped_goes_on_to_the_same_bits():
    model, plan, start, images = job()
    whole = Refinement(model, plan, start, 6, seed=3)
    parts = [images[at : at + 4] for at in (0, 4, 8, 12, 0, 4)]
    for part in parts:
        whole.add(ImageBatch(part))
    first = Refinement(model, plan, start, 6, seed=3)
    for part in parts[:3]:
        first.add(ImageBatch(part))
    second = Refinement(model, plan, start, 6, seed=3)
    second.go_on({name: tensor.clone() for name, tensor in first.tensors().items()})
    for part in parts[3:]:
        second.add(ImageBatch(part))
    one, two = whole.tables().tensors, second.tables().tensors
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Both:
    """A team of two whose other half adds what is handed to it."""

    def __init__(self, other: list[torch.Tensor]) -> None:
        self.rank, self.size, self.other = 0, 2, other

    def sum(self, tensors):
        for tensor, more in zip(tensors, self.other, strict=True):
            tensor += more


def test_two_processes_step_as_one_does_with_all_images():
    model, plan, start, images = job()
    whole = Refinement(model, plan, start, 1, seed=0)
    whole.add(ImageBatch(images))
    seen: list[torch.Tensor] = []

    class Listen(Both):
        def sum(self, tensors):
            seen.extend(tensor.clone() for tensor in tensors)

    Refinement(model, plan, start, 1, 0, Listen([])).add(ImageBatch(images[9:]))
    shared = Refinement(model, plan, start, 1, 0, Both(seen))
    shared.add(ImageBatch(images[:9]))
    for name, tensor in whole.tensors().items():  # the moments have the slope itself, of which Adam's first step is but the sign
        torch.testing.assert_close(shared.tensors()[name], tensor, rtol=1e-4, atol=1e-7)


def test_where_nothing_merges_nothing_is_learned_and_nobody_is_warned():
    model, plan, start, images = job()
    mild = replace(plan, tokens=tuple(replace(cut, threshold=1e-12) for cut in plan.tokens), dial=1e-12)
    found = learn(model, mild, start, images, 2)
    assert torch.equal(found.tensors["size_exponent"], torch.ones_like(found.tensors["size_exponent"]))


def test_what_is_learned_is_the_same_from_the_same_seed_and_survives_grafting_again():
    model, plan, start, images = job()
    one, two = (learn(model, plan, start, images, 3) for _ in range(2))
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    again = graft(model, plan, one.tensors)
    assert torch.equal(again.size_exponent, one.tensors["size_exponent"])


def test_plans_without_merges_in_the_metric_have_nothing_to_learn():
    model, _, start, images = job()
    plan = plan_for(model, [TokenCut(0, "merge", remove=2)], "tome")
    assert learn(model, plan, start, images, 3).tensors.keys() == start.tensors.keys()


def test_a_drift_that_is_not_finite_stops_the_job():
    model, plan, start, images = job()
    with pytest.raises(JobError, match="not finite"):
        learn(model, plan, start, images * float("nan"), 1)
