"""What each choice is worth: adaptive against fixed counts, merging against dropping, schedules, rounds, heads, and sets of blocks.

    python benchmarks/ablation.py --data DATA --book benchmarks/results/ablation.jsonl [--rows "base,fixed"]

One choice is changed at a time. All rows of a model are at equal cost: the dial is placed so that the mean MACs on images spread over
the validation set, deciding included, meet the target; nothing else is chosen on those images. Resumable: what the book holds is
not measured again.
"""

from __future__ import annotations

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

TARGETS = (0.66, 0.5)
SURVEY, CALIBRATE = 64, 64


@dataclass(frozen=True)
class Choice:
    """A way to prune; the first of every option is the base that the others are compared with."""

    blocks: Stages = "alternate"
    counts: Counts = "adaptive"
    combine: Combine = "merge"
    schedule: Schedule = "asymmetric"
    heads: Heads = "none"
    rounds: int = ROUNDS


BASE = Choice()
ROWS = {
    "base": BASE,
    "fixed": replace(BASE, counts="fixed"),
    "symmetric": replace(BASE, schedule="symmetric"),
    "fixed symmetric": replace(BASE, counts="fixed", schedule="symmetric"),
    "drop": replace(BASE, combine="drop"),
    "drop fixed": replace(BASE, combine="drop", counts="fixed"),
    "heads static": replace(BASE, heads="static"),
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
        skip_unread=not anatomy.reads_patches,
    )
    shape = calibration(model.host.module, tables.tensors, lambda: images, choice.counts, choice.schedule)
    return Family("row", plan, deciding_blocks(anatomy, choice.blocks), choice.combine, choice.heads, atlas, shape)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], book="ablation.jsonl", rows="")
    rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise SystemExit(f"There is no row {unknown[0]!r}; choose of {', '.join(ROWS)}.")
    book, place = Book(Path(options.book)), Place(options.data)
    for key in options.models:
        if all(f"{key} | {row} | {target}" in book for row in rows for target in TARGETS):
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
            for target in TARGETS:
                name = f"{key} | {row} | {target}"
                if name in book:
                    continue
                if choice.combine not in tables:
                    fit = batches(calib, 16, indices=spread)
                    generator = torch.Generator().manual_seed(0)
                    tables[choice.combine] = fit_tables(model.host, fit, Criterion("kl"), choice.combine, RANK, generator)
                own = tables[choice.combine]
                plan_at = family(model, choice, own, atlas, shaping).at
                dial = place_dial(kept_on(model, plan_at, probe, own.tensors), target, False, seen)
                cut = graft(model.host.module, plan_at(dial), own.tensors)
                book.add(name, {"dial": dial, "target": target, **evaluate(cut, dense, batches(val, BATCH)).summary()})
                say(line(name, book.rows[name]))
    say("")
    for name, found in book.rows.items():
        say(line(name, found))


if __name__ == "__main__":
    main()
