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
from hesper.heart.fit import Atlas, Tables, fit_tables, survey
from hesper.heart.prune import FIT_SHARE, MOST_FIT_IMAGES
from hesper.hosts.open import OpenModel
from hesper.measure.evaluate import dense_logits, evaluate
from hesper.plan import Combine, Pricing, Schedule, empty_plan

TARGETS, GENTLE = (0.66, 0.5), (0.95, 0.9)
SURVEY, CALIBRATE = 64, 64
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
    tokens: bool = True
    targets: tuple[float, ...] = TARGETS


BASE = Choice()
MILD = Choice(targets=GENTLE)
ROWS = {
    "base": BASE,
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
    **{f"blocks {name}": replace(BASE, blocks=name) for name in STAGES if name != BASE.blocks},
    "blocks every and 1 round": replace(BASE, blocks="every", rounds=1),
}


def family(model: OpenModel, choice: Choice, tables: Tables, atlas: Atlas, images: list) -> Family:
    anatomy = model.ref.anatomy
    plan = replace(
        empty_plan(model.ref.name, anatomy),
        model=model.ref,
        schedule=choice.schedule,
        pricing=Pricing("kl", 4.0, 3, RANK, GAMMA, choice.rounds),
        skip_unread=not anatomy.reads_patches and choice.targets == TARGETS,
    )
    shape = calibration(model.host.module, tables.tensors, lambda: images, choice.counts, choice.schedule)
    blocks = deciding_blocks(anatomy, choice.blocks) if choice.tokens else ()
    return Family("row", plan, blocks, choice.combine, choice.heads, atlas, tables, shape)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], book="ablation.jsonl", rows="")
    rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise SystemExit(f"There is no row {unknown[0]!r}; choose of {', '.join(ROWS)}.")
    book, place = Book(Path(options.book)), Place(options.data)
    for key in options.models:
        if all(f"{key} | {row} | {target}" in book for row in rows for target in ROWS[row].targets):
            continue
        model = place.model(key)
        val, calib = place.images("val", model), place.images("calib", model)
        probe = list(batches(val, BATCH, indices=range(0, len(val), max(1, len(val) // PROBE))))
        dense = dense_logits(model.host.module, batches(val, BATCH))
        spread = split(calib, (FIT_SHARE, 1 - FIT_SHARE), 0)[0][:MOST_FIT_IMAGES]
        shaping = list(batches(calib, BATCH, indices=spread[:CALIBRATE]))
        tables: dict[Combine, Tables] = {}
        atlas = survey(model.host, batches(calib, 16, indices=spread[:SURVEY]), Criterion("kl"), torch.Generator().manual_seed(0))
        for row in rows:
            choice, seen = ROWS[row], dict[float, float]()
            for target in choice.targets:
                name = f"{key} | {row} | {target}"
                if name in book:
                    continue
                if choice.combine not in tables:
                    fit = batches(calib, 16, indices=spread)
                    generator = torch.Generator().manual_seed(0)
                    tables[choice.combine] = fit_tables(model.host, fit, Criterion("kl"), choice.combine, RANK, generator, gates=True)
                own = tables[choice.combine]
                plan_at = family(model, choice, own, atlas, shaping).at
                kept = kept_on(model, plan_at, probe, own.tensors)
                if (end := math.log(DEAREST)) not in seen:
                    seen[end] = kept(DEAREST)
                if seen[end] > target:
                    say(f"{name:34} cannot be reached")
                    continue
                dial = place_dial(kept, target, False, seen)
                cut = graft(model.host.module, plan_at(dial), own.tensors)
                book.add(name, {"dial": dial, "target": target, **evaluate(cut, dense, batches(val, BATCH)).summary()})
                say(line(name, book.rows[name]))
    say("")
    for name, found in book.rows.items():
        say(line(name, found))


if __name__ == "__main__":
    main()
