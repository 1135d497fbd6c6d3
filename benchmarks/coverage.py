"""How often a budget's promise is broken: the search's own proof, on random samples of a population whose truth is known.

    python benchmarks/coverage.py --data DATA --runs RUN RUN --keep FOLDER --book benchmarks/results/coverage.jsonl

The population are the images that fitted nothing: the half of the calibration images that verified a run, and the validation images.
The run's model is measured on all of them at dials a quarter power of two apart (kept in FOLDER, so that a stopped job goes on). Then,
many times: a tuning sample and a verification sample are drawn with replacement, the search places and proves its dial on them
as `hesper prune` does, and the promise is broken where the population's own risk at the chosen dial is above the budget.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import MODELS, Book, Place, say
from numpy.typing import NDArray

import hesper
from hesper.data import batches, split
from hesper.errors import JobError
from hesper.graft import GraftedViT
from hesper.heart.budget import choose
from hesper.heart.family import Family
from hesper.heart.fit import Atlas, Tables
from hesper.heart.placement import Trial
from hesper.heart.prune import FIT_SHARE, MOST_FIT_IMAGES, TUNE_IMAGES
from hesper.measure.evaluate import Evaluation, dense_logits, evaluate
from hesper.plan import Budget, Plan, plan_hash
from hesper.runs import open_run

STEPS_BELOW, STEPS_ABOVE = 20, 14  # quarter powers of two around the run's own dial; the last must break every budget in every sample
ASKED = (("disagreement", 0.05), ("disagreement", 0.1), ("loss", 0.03), ("macs", 0.66))
BUDGETS = [Budget(kind, value, confidence) for kind, value in ASKED for confidence in (0.8, 0.95)]
SAMPLES = (200, 500)


@dataclass(frozen=True)
class Population:
    """Drift, agreement and MACs of every image at every dial, ``[dials, images]``."""

    dials: NDArray[np.float64]
    drift: NDArray[np.float64]
    agreement: NDArray[np.float64]
    macs: NDArray[np.float64]
    macs_dense: int

    def place(self, dial: float) -> int:
        """The dial on the grid that is nearest."""
        return int(np.abs(np.log(self.dials) - math.log(dial)).argmin())

    def macs_at(self, dial: float) -> NDArray[np.float64]:
        """MACs of every image, between two dials of the grid in proportion: a ladder of MACs is finer than the grid."""
        x, last = np.log(self.dials), len(self.dials) - 1
        low = min(max(int(np.searchsorted(x, math.log(dial))) - 1, 0), last - 1)
        share = min(max((math.log(dial) - x[low]) / (x[low + 1] - x[low]), 0.0), 1.0)
        between: NDArray[np.float64] = (1 - share) * self.macs[low] + share * self.macs[low + 1]
        return between

    def risk(self, budget: Budget, dial: float) -> float:
        """The truth at a dial."""
        if budget.kind == "macs":
            return float(self.macs_at(dial).mean()) / self.macs_dense
        at = self.place(dial)
        return float(self.drift[at].mean()) if budget.kind == "loss" else 1 - float(self.agreement[at].mean())

    def trial(self, sample: NDArray[np.int64]) -> Trial:
        """Measuring a plan on the images of a sample."""

        def measured(plan: Plan) -> Evaluation:
            assert plan.dial is not None
            at = self.place(plan.dial)
            nothing = np.ones((len(sample), 1), dtype=np.int64)
            macs = self.macs_at(plan.dial)[sample]
            columns = (self.drift[at, sample], self.agreement[at, sample], macs, nothing, nothing, self.macs_dense)
            return Evaluation(*columns, None, None, None, None, None, 0.0)

        return measured


def measure(run: Path, place: Place, keep: Path) -> Population:
    """The population of a run, measured once."""
    plan = open_run(run).plan
    assert plan.dial is not None
    file = keep / f"{plan_hash(plan)}.npz"
    steps = np.arange(-STEPS_BELOW, STEPS_ABOVE + 1) / 4
    found = dict(np.load(file)) if file.exists() else {}
    cut = hesper.load(run)
    if len(found) < len(steps):
        model = place.model(next(key for key, (name, _) in MODELS.items() if name == plan.model.name))
        calib, val = place.images("calib", model), place.images("val", model)
        if calib.sha256 != plan.provenance.data_sha256:
            raise SystemExit(f"{run} was made with other calibration images than those of --data, so it may have been fitted on these.")
        fit, rest = split(calib, (FIT_SHARE, 1 - FIT_SHARE), plan.provenance.seed)
        fitted = {calib.digests[index] for index in fit[:MOST_FIT_IMAGES]}
        verify = [index for index in rest if calib.digests[index] not in fitted]
        seen = [lambda: batches(calib, 32, indices=verify), lambda: batches(val, 32)]
        dense = [dense_logits(model.host.module, parts()) for parts in seen]
        for step in steps:
            if f"{step:g}" in found:
                continue
            turn(cut, plan.dial * 2**step)
            parts = [evaluate(cut, logits, images()) for logits, images in zip(dense, seen, strict=True)]
            found[f"{step:g}"] = np.concatenate([np.stack([part.drift_kl, part.agreement, part.macs]) for part in parts], 1)
            np.savez_compressed(partial := file.with_suffix(".partial.npz"), **found)
            partial.replace(file)
            say(f"{plan.model.name} {step:+g}: {found[f'{step:g}'].mean(1)}")
    every = np.stack([found[f"{step:g}"] for step in steps])
    return Population(plan.dial * 2**steps, every[:, 0], every[:, 1], every[:, 2], cut.dense_macs)


def turn(cut: GraftedViT, dial: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the range that was verified is left on purpose
        cut.set_dial(dial)


def coverage(population: Population, plan: Plan, budget: Budget, n: int, splits: int) -> dict[str, float]:
    """Of ``splits`` random samples of ``n`` images: how many found a plan, how many of those broke the promise, what they kept."""
    rng = np.random.default_rng(0)
    images = population.drift.shape[1]
    blank = replace(plan, tokens=(), dial=None, provenance=replace(plan.provenance, verify_images=n))
    atlas = Atlas(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1), 1)
    family = Family("run", blank, tuple(cut.block for cut in plan.tokens), "merge", "none", atlas, Tables({}, ()))
    broken, found, kept = 0, 0, 0.0
    for _ in range(splits):
        tune, verify = (population.trial(rng.integers(0, images, size)) for size in (TUNE_IMAGES, n))
        try:
            chosen = choose([family], budget, lambda _, trial=tune: trial, lambda _, trial=verify: trial)
        except JobError:
            continue  # no promise was made
        found += 1
        broken += population.risk(budget, chosen.dial) > budget.value
        kept += float(population.macs_at(chosen.dial).mean()) / population.macs_dense
    return {"splits": splits, "promises": found, "broken": broken, "macs": kept / max(found, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=1000)
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    place, book = Place(options.data), Book(options.book)
    for run in options.runs:
        plan, population = open_run(run).plan, measure(run, place, options.keep)
        for budget in BUDGETS:
            for n in SAMPLES:
                key = f"{plan.model.name} | {plan_hash(plan)[:12]} | {budget.kind} {budget.value:g} | {budget.confidence:g} | {n}"
                if key not in book:
                    book.add(key, coverage(population, plan, budget, n, options.splits))
                row = book.rows[key]
                of_all, of_made = row["broken"] / row["splits"], row["broken"] / max(row["promises"], 1)
                rates = f"broken {of_all:.3f} of all, {of_made:.3f} of those made (allowed {1 - budget.confidence:.2f})"
                say(f"{key}: {row['promises']} of {row['splits']} samples gave a promise; {rates}; MACs {row['macs']:.3f}")


if __name__ == "__main__":
    main()
