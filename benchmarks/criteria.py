"""Every criterion, dropping and merging, at 0.8, 0.66 and 0.5 of the MACs, beside random, class attention and ToMe.

    python benchmarks/criteria.py --data DATA --book benchmarks/results/criteria.jsonl [--rows "kl merge,tome"]

No weight of a network is trained. All rows of a model are at equal cost: the dial (or the constant count per block of the
baselines) is placed so that the mean MACs on images spread over the validation set, deciding included, meet the target; nothing
else is chosen on those images. Resumable: what the book holds is not measured again. A row takes one to two minutes a model on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import Book, Place, arguments, say
from scipy.optimize import brentq

from hesper.data import ImageSet, LoadedBatch, batches
from hesper.graft import CURVATURE, graft
from hesper.heart.criteria import Criterion
from hesper.heart.family import deciding_blocks
from hesper.heart.fit import fit_tables
from hesper.hosts.open import OpenModel
from hesper.measure.evaluate import dense_logits, evaluate
from hesper.plan import Plan, Pricing, TokenCut, empty_plan

TARGETS = (0.8, 0.66, 0.5)
GAMMA, RANK, ROUNDS, BATCH = 0.35, 24, 2, 32
PROBE = 96


def methods() -> dict[str, tuple[str, str]]:
    """Row name to (criterion, combine)."""
    ours = {f"{name} {combine}": (name, combine) for name in CURVATURE for combine in ("merge", "drop")}
    theirs = {f"{name} {combine}": (name, combine) for name in ("cls", "random") for combine in ("merge", "drop")}
    return {**ours, **theirs, "tome": ("tome", "merge"), "tome; unread skipped": ("tome", "merge")}


def blank(model: OpenModel, row: str) -> Plan:
    """A plan of the row's kind that cuts nothing yet."""
    criterion, _ = methods()[row]
    plan = empty_plan(model.ref.name, model.ref.anatomy)
    return replace(
        plan, pricing=Pricing(criterion, 4.0, 3, RANK, GAMMA, ROUNDS), skip_unread=row != "tome" and not model.ref.anatomy.reads_patches
    )


def constant(plan: Plan, combine: str, per_block: float, blocks: tuple[int, ...]) -> Plan:
    """The same number of tokens removed in every block, on average where it is no whole number, and at most every other one."""
    left, cuts = plan.model.anatomy.tokens - plan.model.anatomy.prefix_tokens, []
    for step, block in zip(np.diff(np.floor(np.arange(len(blocks) + 1) * per_block + 0.5)).astype(int), blocks, strict=True):
        remove = min(int(step), left // 2)
        left -= remove
        cuts.append(TokenCut(block, combine, remove=remove))
    return replace(plan, tokens=tuple(cuts))


def family(model: OpenModel, row: str) -> Callable[[float], Plan]:
    """Dial to plan: nats for the criteria, tokens per block for the baselines."""
    criterion, combine = methods()[row]
    plan, anatomy = blank(model, row), model.ref.anatomy
    if criterion in CURVATURE:
        return lambda dial: replace(plan, tokens=tuple(TokenCut(b, combine, threshold=dial) for b in deciding_blocks(anatomy, "every")))
    blocks = tuple(range(anatomy.depth)) if row == "tome" else deciding_blocks(anatomy, "every")
    return lambda dial: constant(plan, combine, dial, blocks)


def place_dial(kept: Callable[[float], float], target: float, counts: bool, seen: dict[float, float]) -> float:
    """The dial at which the probe images keep ``target`` of the MACs, by Brent's method on what ``seen`` has bracketed already.

    Dials in nats are searched by their logarithm, tokens per block as they are.
    """

    def over(place: float) -> float:
        if place not in seen:
            seen[place] = kept(place if counts else math.exp(place))
        return seen[place] - target

    low, high = (0.0, 40.0) if counts else (math.log(1e-9), math.log(10.0))
    low = max((place for place in seen if over(place) > 0), default=low)
    high = min((place for place in seen if over(place) <= 0), default=high)
    place = float(brentq(over, low, high, xtol=0.02 if counts else 0.01))
    return place if counts else math.exp(place)


def kept_on(
    model: OpenModel, plan_at: Callable[[float], Plan], probe: list[LoadedBatch], tensors: dict[str, torch.Tensor]
) -> Callable[[float], float]:
    """The mean share of MACs that the plan at a dial keeps on the probe images."""

    def kept(dial: float) -> float:
        cut = graft(model.host.module, plan_at(dial), tensors)
        with torch.inference_mode():
            return float(np.mean([cut.run(batch.images).macs.mean() for batch in probe])) / cut.dense_macs

    return kept


def fitted(model: OpenModel, calib: ImageSet, row: str, count: int) -> dict[str, torch.Tensor]:
    """The tables of a criterion, fitted on images spread over the calibration folder; none for the baselines."""
    criterion, combine = methods()[row]
    if criterion not in CURVATURE:
        return {}
    seen = batches(calib, 16, indices=range(0, len(calib), max(1, len(calib) // count)))
    return fit_tables(model.host, seen, Criterion(criterion, draws=3), combine, RANK, torch.Generator().manual_seed(0)).tensors


def main() -> None:
    options = arguments(__doc__.splitlines()[0], book="criteria.jsonl", fit=256, rows="")
    rows = options.rows.split(",") if options.rows else list(methods())
    book, place = Book(Path(options.book)), Place(options.data)
    for key in options.models:
        model = place.model(key)
        val, calib = place.images("val", model), place.images("calib", model)
        probe = list(batches(val, BATCH, indices=range(0, len(val), max(1, len(val) // PROBE))))
        dense: list[torch.Tensor] = []
        for row in rows:
            rounds = ROUNDS if row.endswith("merge") and row.split()[0] in CURVATURE else 1
            wanted = {f"{key} | {row} | {target}": target for target in TARGETS}
            wanted = {
                name: target for name, target in wanted.items() if book.rows.get(name, {}).get("rounds", 1) != rounds or name not in book
            }
            if not wanted:
                continue
            dense = dense or dense_logits(model.host.module, batches(val, BATCH))
            tensors, seen = fitted(model, calib, row, options.fit), dict[float, float]()
            plan_at = family(model, row)
            kept = kept_on(model, plan_at, probe, tensors)
            for name, target in wanted.items():
                dial = place_dial(kept, target, not tensors, seen)
                result = evaluate(graft(model.host.module, plan_at(dial), tensors), dense, batches(val, BATCH)).summary()
                book.add(name, {"dial": dial, "target": target, "rounds": rounds, **result})
                say(line(name, book.rows[name]))
    say("")
    for name, found in book.rows.items():
        say(line(name, found))


def line(name: str, row: dict[str, float]) -> str:
    return (
        f"{name:34} MACs {row['macs_ratio']:.3f}  KL {row['drift_kl']:.4f} +- {row['drift_kl_stderr']:.4f}  "
        f"agreement {row['agreement']:.3f}  top-1 {100 * row['top1_change']:+.2f} +- {100 * row['top1_change_stderr']:.2f}"
    )


if __name__ == "__main__":
    main()
