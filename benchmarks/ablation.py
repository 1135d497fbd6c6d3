"""What each choice is worth: adaptive against fixed counts, merging against dropping, schedules, rounds, heads, and sets of blocks.

    python benchmarks/ablation.py --data DATA --book benchmarks/results/ablation.jsonl [--rows "base,fixed"]

One choice is changed at a time. All rows of a model are at equal cost: the dial is placed so that the mean MACs on images spread over
the validation set, deciding included, meet the target; nothing else is chosen on those images. Resumable: what the book holds is
not measured again.

Heads can save little, so what tokens and heads are worth alone and together is compared at gentler targets; there the last block is
computed whole in every row, since leaving out what nobody reads would alone keep less. A target that a row cannot reach is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import Book, Place, arguments, say
from criteria import BATCH, GAMMA, PROBE, RANK, ROUNDS, kept_on, line, place_dial

from hesper.data import batches, split
from hesper.graft import graft
from hesper.heart.calibrate import calibration
from hesper.heart.criteria import Criterion
from hesper.heart.family import STAGES, Counts, Family, Heads, Stages, deciding_blocks
from hesper.heart.fit import Tables, fit_tables, survey
from hesper.heart.prune import FIT_SHARE, MOST_FIT_IMAGES, TUNE_IMAGES
from hesper.heart.refine import refine
from hesper.heart.refit import RefitSums
from hesper.heart.settings import Settings
from hesper.measure.evaluate import dense_logits, evaluate
from hesper.plan import Combine, Pricing, Schedule, empty_plan

TARGETS, GENTLE = (0.66, 0.5), (0.95, 0.9)
SURVEY, CALIBRATE = 64, 64
EPOCHS = Settings.refine
DEAREST = 10.0  # nats: where the dial ends


@dataclass(frozen=True)
class Choice:
    """A way to prune; the first of every option is the base that the others are compared with."""

    blocks: Stages = "alternate"
    counts: Counts = "adaptive"
    combine: Combine = "merge"
    schedule: Schedule = "asymmetric"
    heads: Heads = "none"
    rounds: int = ROUNDS
    multiple: int = 1
    tokens: bool = True
    refit: bool = False
    refined: bool = False
    targets: tuple[float, ...] = TARGETS


BASE = Choice()
MILD = Choice(targets=GENTLE)
ROWS = {
    "base": BASE,
    "refit": replace(BASE, refit=True),
    "refined": replace(BASE, refined=True),
    "refit and refined": replace(BASE, refit=True, refined=True),
    "fixed, refit and refined": replace(BASE, counts="fixed", refit=True, refined=True),
    "fixed": replace(BASE, counts="fixed"),
    "symmetric": replace(BASE, schedule="symmetric"),
    "fixed symmetric": replace(BASE, counts="fixed", schedule="symmetric"),
    "drop": replace(BASE, combine="drop"),
    "drop fixed": replace(BASE, combine="drop", counts="fixed"),
    "heads static": replace(BASE, heads="static"),
    "heads adaptive": replace(BASE, heads="adaptive"),
    "tokens alone": MILD,
    "heads alone static": replace(MILD, heads="static", tokens=False),
    "heads alone adaptive": replace(MILD, heads="adaptive", tokens=False),
    "tokens and heads static": replace(MILD, heads="static"),
    "tokens and heads adaptive": replace(MILD, heads="adaptive"),
    "1 round": replace(BASE, rounds=1),
    "3 rounds": replace(BASE, rounds=3),
    **{f"multiples of {number}": replace(BASE, multiple=number) for number in (8, 16, 32)},
    **{f"blocks {name}": replace(BASE, blocks=name) for name in STAGES if name != BASE.blocks},
    "blocks every and 1 round": replace(BASE, blocks="every", rounds=1),
}


class Bench:
    """One model with its images, and what is fitted once for all rows."""

    def __init__(self, place: Place, key: str) -> None:
        self.model = place.model(key)
        self.val, self.calib = place.images("val", self.model), place.images("calib", self.model)
        self.probe = list(batches(self.val, BATCH, indices=range(0, len(self.val), max(1, len(self.val) // PROBE))))
        self.dense = dense_logits(self.model.host.module, batches(self.val, BATCH))
        self.fit = split(self.calib, (FIT_SHARE, 1 - FIT_SHARE), 0)[0][:MOST_FIT_IMAGES]
        self.shaping = list(batches(self.calib, BATCH, indices=self.fit[:CALIBRATE]))
        self.atlas = survey(self.model.host, batches(self.calib, 16, indices=self.fit[:SURVEY]), Criterion("kl"), seeded())
        self._tables: dict[Combine, Tables] = {}

    def tables(self, combine: Combine) -> Tables:
        """Fitted when first asked for."""
        if combine not in self._tables:
            images = batches(self.calib, 16, indices=self.fit)
            self._tables[combine] = fit_tables(self.model.host, images, Criterion("kl"), combine, RANK, seeded(), gates=True)
        return self._tables[combine]

    def family(self, choice: Choice, tables: Tables) -> Family:
        """The plans of a choice."""
        anatomy = self.model.ref.anatomy
        plan = replace(
            empty_plan(self.model.ref.name, anatomy),
            model=self.model.ref,
            schedule=choice.schedule,
            pricing=Pricing("kl", 4.0, 3, RANK, GAMMA, choice.rounds),
            skip_unread=not anatomy.reads_patches and choice.targets == TARGETS,
        )
        shape = calibration(self.model.host.module, tables.tensors, lambda: self.shaping, choice.counts, choice.schedule)
        blocks = deciding_blocks(anatomy, choice.blocks) if choice.tokens else ()
        return Family("row", plan, blocks, choice.combine, choice.heads, self.atlas, tables, shape, choice.multiple)

    def place(self, family: Family, target: float, seen: dict[float, float]) -> float | None:
        """The dial that meets the target, None where none does."""
        kept = kept_on(self.model, family.at, self.probe, family.tables.tensors)
        if (end := math.log(DEAREST)) not in seen:
            seen[end] = kept(DEAREST)
        return None if seen[end] > target else place_dial(kept, target, False, seen)

    def refit(self, family: Family, dial: float) -> Tables:
        """The tables with prices fitted again where the model is cut as it is at the dial."""
        sums = RefitSums(self.model.host, family.at(dial), family.tables, Criterion("kl"), seeded())
        for batch in batches(self.calib, 16, indices=self.fit):
            sums.add(batch)
        return sums.tables(RANK)

    def refined(self, family: Family, dial: float) -> Tables:
        """The tables with merging refined around the dial, on fitting images as `hesper prune` takes them."""
        indices, draw = self.fit[TUNE_IMAGES:], seeded()
        order = [indices[at] for _ in range(EPOCHS) for at in torch.randperm(len(indices), generator=draw).tolist()]
        steps = -(-len(order) // BATCH)
        return refine(self.model.host.module, family.at(dial), family.tables, batches(self.calib, BATCH, indices=order), steps)

    def measure(self, choice: Choice, target: float, seen: dict[float, float]) -> dict | None:
        """A row at a target; None where it cannot be reached. ``seen`` has what dials of the row are known to keep."""
        family = self.family(choice, self.tables(choice.combine))
        dial = self.place(family, target, seen)
        for wanted, improve in ((choice.refit, self.refit), (choice.refined, self.refined)):
            if dial is not None and wanted:
                family = self.family(choice, improve(family, dial))
                dial = self.place(family, target, {})
        if dial is None:
            return None
        cut = graft(self.model.host.module, family.at(dial), family.tables.tensors)
        return {"dial": dial, "target": target, **evaluate(cut, self.dense, batches(self.val, BATCH)).summary()}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], book="ablation.jsonl", rows="")
    rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise SystemExit(f"There is no row {unknown[0]!r}; choose of {', '.join(ROWS)}.")
    book, place = Book(Path(options.book)), Place(options.data)
    for key in options.models:
        bench = None
        for row in rows:
            seen: dict[float, float] = {}
            for target in ROWS[row].targets:
                name = f"{key} | {row} | {target}"
                if name in book:
                    continue
                bench = bench or Bench(place, key)
                found = bench.measure(ROWS[row], target, seen)
                if found is None:
                    say(f"{name:34} cannot be reached")
                else:
                    book.add(name, found)
                    say(line(name, found))
    say("")
    for name, found in book.rows.items():
        say(line(name, found))


if __name__ == "__main__":
    main()
