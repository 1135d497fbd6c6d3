"""Learning what merged tokens get back and how their size counts, by gradient descent on the drift."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from hesper.curvature import Batch, DenseKL
from hesper.errors import JobError
from hesper.graft import GraftedViT, graft
from hesper.graft.deciders import CurvatureMerge
from hesper.heart.fit import Tables
from hesper.parallel import Alone, Team
from hesper.plan import Plan, at_dial

EXPONENT_RATE, STRETCH_RATE, GAIN_RATE = 0.03, 0.03, 3e-3
# The dial stays a dial: what is learned has to serve where it will be turned to.
LOWEST, HIGHEST = 1 / 2, 2.0


class Refinement:
    """Learns size exponents and restorations for a plan; the network's own weights stay as they are.

    Minimises the mean drift KL(dense || cut) over images and over dials drawn around the plan's (Adam, rates falling to zero),
    through the cut model as it decides: decisions are taken as they come, and only what they make of the tokens is learned.
    Unlabelled images suffice.

    Args:
        module: the dense model.
        plan: with merges priced in the curvature metric; others have nothing to learn.
        tables: where learning starts.
        steps: how many there will be, for the rates.
        seed: for the dials and for which batches are mirrored.
        team: processes that each give their part of a step's images.
    """

    def __init__(self, module: nn.Module, plan: Plan, tables: Tables, steps: int, seed: int, team: Team | None = None) -> None:
        self.module, self.plan, self.start, self.steps, self.seed = module, plan, tables, steps, seed
        self.team = team or Alone()
        self.cut = graft(module, plan, tables.tensors, check_weights=False)
        self.learned = _learned(self.cut)
        self.done = torch.zeros((), dtype=torch.float64)
        self._loss = DenseKL()
        rates = [{"params": [tensor.requires_grad_()], "lr": rate} for tensor, rate in self.learned.values()]
        self._optimiser = torch.optim.Adam(rates) if rates else None

    def add(self, batch: Batch | None) -> None:
        """One step on a batch, None where all of its images are other processes'; JobError where the drift is not finite."""
        if self._optimiser is None:
            return
        self._optimiser.zero_grad()
        if batch is None:
            self._step(0.0, 0)
            return
        draw = torch.Generator().manual_seed((self.seed + int(self.done)) % 2**63)
        where, mirror = torch.rand(2, generator=draw).tolist()
        self._turn(LOWEST * (HIGHEST / LOWEST) ** where)
        # Few images are seen several times: half of the batches are mirrored, which leaves less to learn by heart.
        images = batch.images.flip(-1) if mirror < 0.5 else batch.images
        with torch.no_grad():
            dense = self.module(images)
        drift = self._loss.per_image(self.cut(images), batch, dense).sum()
        if drift.requires_grad:  # else nothing merged in these images
            drift.backward()  # type: ignore[no-untyped-call]
        self._step(float(drift.detach()), len(images))

    def _step(self, drift: float, images: int) -> None:
        """Go down the mean slope over all processes' images."""
        assert self._optimiser is not None
        slopes = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor, _ in self.learned.values()]
        sums = [slope.double().cpu() for slope in slopes] + [torch.tensor(value, dtype=torch.float64) for value in (drift, float(images))]
        self.team.sum(sums)
        # Asked of the sum, so that every process has the same answer and none waits for another that has given up.
        if not bool(torch.isfinite(sums[-2])):
            raise JobError("The drift is not finite while merging is refined; check the model's weights and the images.")
        for group, (tensor, rate), slope in zip(self._optimiser.param_groups, self.learned.values(), sums, strict=False):
            tensor.grad = (slope / sums[-1]).to(tensor)
            group["lr"] = rate * max(1 - float(self.done) / self.steps, 0.0)
        self._optimiser.step()
        self.done += 1

    def tensors(self) -> dict[str, Tensor]:
        """Everything a process needs to go on: what is learned so far, Adam's moments, and the steps done."""
        out = {"done": self.done}
        for name, (tensor, _) in self.learned.items():
            moments = self._optimiser.state.get(tensor, {}) if self._optimiser is not None else {}
            out[name] = tensor.detach().double().cpu()
            for part in ("exp_avg", "exp_avg_sq", "step"):
                out[f"{name}|{part}"] = moments[part].double().cpu() if moments else torch.zeros(() if part == "step" else tensor.shape)
        return out

    def go_on(self, kept: dict[str, Tensor]) -> None:
        """Continue from what :meth:`tensors` gave."""
        assert self._optimiser is not None or not self.learned
        self.done.copy_(kept["done"])
        for name, (tensor, _) in self.learned.items():
            with torch.no_grad():
                tensor.copy_(kept[name])
            assert self._optimiser is not None
            moments = {part: kept[f"{name}|{part}"].to(tensor) for part in ("exp_avg", "exp_avg_sq")}
            self._optimiser.state[tensor] = {"step": kept[f"{name}|step"].float(), **moments}

    def tables(self) -> Tables:
        """The tables with what was learned; JobError where that is not finite."""
        found = {name: tensor.detach().float().cpu() for name, (tensor, _) in self.learned.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
            raise JobError("What was learned of merging is not finite; check the model's weights and the images.")
        return replace(self.start, tensors={**self.start.tensors, **found})

    def _turn(self, factor: float) -> None:
        if self.plan.dial is None:
            return
        turned = at_dial(self.plan, self.plan.dial * factor)
        for token_cut in turned.tokens:
            cast(CurvatureMerge, self.cut.deciders[str(token_cut.block)]).cut = token_cut
        for gate in turned.gates:
            self.cut.gates[str(gate.block)].cut = gate  # type: ignore[assignment]


def refine(module: nn.Module, plan: Plan, tables: Tables, batches: Iterable[Batch], steps: int, seed: int = 0) -> Tables:
    """The tables as a :class:`Refinement` on these batches leaves them."""
    refinement = Refinement(module, plan, tables, steps, seed)
    for batch in batches:
        refinement.add(batch)
    return refinement.tables()


def _learned(cut: GraftedViT) -> dict[str, tuple[Tensor, float]]:
    """What is learned, by its name among the tables, with its rate."""
    out: dict[str, tuple[Tensor, float]] = {}
    for name, decider in cut.deciders.items():
        if isinstance(decider, CurvatureMerge):
            out[f"{name}.restoration.stretch"] = decider.restoration.stretch, STRETCH_RATE
            out[f"{name}.restoration.gain"] = decider.restoration.gain, GAIN_RATE
    if out:
        out["size_exponent"] = cut.size_exponent, EXPONENT_RATE
    return out
