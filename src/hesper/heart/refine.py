"""Learning what merging takes and what it should weigh: the few numbers of the graft that no statistic gives, by gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from hesper.curvature import Batch, DenseKL
from hesper.errors import JobError
from hesper.graft import GraftedViT, graft
from hesper.graft.deciders import CurvatureMerge
from hesper.heart.fit import Tables
from hesper.plan import Plan, at_dial

EXPONENT_RATE, STRETCH_RATE, GAIN_RATE = 0.03, 0.03, 3e-3
# The dial stays a dial: what is learned has to serve where it will be turned to.
LOWEST, HIGHEST = 1 / 2, 2.0


def refine(module: nn.Module, plan: Plan, tables: Tables, batches: Iterable[Batch], steps: int, generator: torch.Generator) -> Tables:
    """Tables with size exponents and restorations learned for ``plan``; the network's own weights stay as they are.

    Minimises the mean drift KL(dense || cut) over images and over dials drawn around the plan's (Adam, rates falling to zero),
    through the cut model as it decides: decisions are taken as they come, and only what they make of the tokens is learned.
    Unlabelled images suffice.

    Args:
        module: the dense model.
        plan: with merges priced in the curvature metric; others have nothing to learn.
        tables: where learning starts.
        batches: one batch for each step.
        steps: how many there will be, for the rates.
        generator: for the dials.

    Raises:
        JobError: the drift is not finite.
    """
    cut = graft(module, plan, tables.tensors)
    learned = dict(_learned(cut))
    if not learned or steps < 1:
        return tables
    optimiser = torch.optim.Adam([{"params": [tensor.requires_grad_()], "lr": rate} for tensor, rate in learned.values()])
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    loss = DenseKL()
    for batch in batches:
        _turn(cut, plan, LOWEST * (HIGHEST / LOWEST) ** float(torch.rand((), generator=generator)))
        # Few images are seen several times: half of the batches are mirrored, which leaves less to learn by heart.
        images = batch.images.flip(-1) if float(torch.rand((), generator=generator)) < 0.5 else batch.images
        with torch.no_grad():
            dense = module(images)
        drift = loss.per_image(cut(images), batch, dense).mean()
        if not bool(torch.isfinite(drift)):
            raise JobError("The drift is not finite while merging is refined; check the model's weights and the images.")
        if drift.requires_grad:  # else nothing merged, and nothing was learned from these images
            optimiser.zero_grad()
            drift.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        falling.step()
    found = {name: tensor.detach().float().cpu() for name, (tensor, _) in learned.items()}
    return replace(tables, tensors={**tables.tensors, **found})


def _learned(cut: GraftedViT) -> Iterator[tuple[str, tuple[Tensor, float]]]:
    """What is learned, by its name among the tables, with its rate."""
    merging = {name: decider for name, decider in cut.deciders.items() if isinstance(decider, CurvatureMerge)}
    for name, decider in merging.items():
        yield f"{name}.restoration.stretch", (decider.restoration.stretch, STRETCH_RATE)
        yield f"{name}.restoration.gain", (decider.restoration.gain, GAIN_RATE)
    if merging:
        yield "size_exponent", (cut.size_exponent, EXPONENT_RATE)


def _turn(cut: GraftedViT, plan: Plan, factor: float) -> None:
    if plan.dial is None:
        return
    for token_cut in at_dial(plan, plan.dial * factor).tokens:
        cast(CurvatureMerge, cut.deciders[str(token_cut.block)]).cut = token_cut
