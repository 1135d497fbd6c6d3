"""How near the routed decisions come to the oracle's: every image's own token curvature in place of the router's prediction.

    python benchmarks/oracle.py --data DATA --runs RUN RUN --book benchmarks/results/oracle.jsonl

The oracle is the run's own model but for one thing: how much moving a token matters is taken from Fisher samples of the very image, as
the dense model has it, instead of from the router. Its dial is placed so that it keeps as many of the MACs as the run does. The share of
the gap that a run closes is (baseline - run) / (baseline - oracle) in mean drift on the validation images, with ToMe as the baseline, at
as many MACs (benchmarks/results/criteria.jsonl).
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MODELS, Book, Place, arguments_for_runs, say
from scipy.optimize import brentq
from torch import Tensor, nn

import hesper
from hesper.curvature import Batch
from hesper.curvature.randomness import image_generators
from hesper.data import batches
from hesper.graft import GraftedViT
from hesper.graft.deciders import LARGEST_LOG_CURVATURE, State
from hesper.heart.criteria import Criterion, stream_curvature
from hesper.measure.evaluate import dense_logits, evaluate
from hesper.runs import open_run

DRAWS, BATCH, PROBE = 8, 16, 4  # one batch in four starts the search for the dial
CLOSE, TRIES = 0.003, 4  # of the MACs; how often all images then correct the dial
FALL = 0.16  # of the MACs, where the dial rises e-fold
POWERS = (0.35, 0.5)
SLOPE = 12.0  # by which the logarithm of the drift falls with the share of MACs, for baselines measured at slightly other shares


class Given(nn.Module):
    """In the router's place: what it is given for every row."""

    def __init__(self, macs_per_token: int) -> None:
        super().__init__()
        self.macs_per_token, self.rows = macs_per_token, torch.empty(0)

    def forward(self, _: State) -> Tensor:
        return self.rows


class Oracle(GraftedViT):
    """A grafted model that knows its images' own token curvatures, ``[images, depth, patches]``."""

    def know(self, curvature: Tensor) -> None:
        self.curvature = curvature

    def run(self, images: Tensor, *, trace: bool = False) -> Any:
        return super().run(images, trace=True)

    def _decide(self, index: int, decider: Any, seen: Any, stream: Any, book: Any) -> None:
        known = self.curvature[:, index].clamp_min(1e-12).log()
        known = known if self.order is None else known[:, self.order]
        prefix = self.plan.model.anatomy.prefix_tokens
        rows = torch.nn.functional.pad(known, (prefix, 0)).flatten()
        where = stream.origin
        total = torch.zeros(stream.layout.rows).index_add_(0, where, rows)
        count = torch.zeros(stream.layout.rows).index_add_(0, where, torch.ones_like(rows))
        decider.router.rows = (total / count).clamp(-LARGEST_LOG_CURVATURE, LARGEST_LOG_CURVATURE)
        super()._decide(index, decider, seen, stream, book)


def oracle_of(run: Path, gamma: float) -> Oracle:
    """The run's model with the router's place open."""
    cut = hesper.load(run)
    deciders = {int(block): decider for block, decider in cut.deciders.items()}
    for decider in deciders.values():
        made: Any = decider
        made.router, made.gamma = Given(made.router.macs_per_token), gamma
    return Oracle(cut.host, cut.plan, deciders, {}, cut.size_exponent).eval()


def curvatures(dense: Any, images: list[Batch]) -> list[Tensor]:
    """Every image's token curvature, relative to the mean of its block."""
    criterion, draw = Criterion("kl", 4.0, DRAWS), torch.Generator().manual_seed(0)
    found = [stream_curvature(dense, batch, criterion, image_generators(batch.images, draw)).strength for batch in images]
    mean = torch.cat(found).mean((0, 2))
    return [own / mean.clamp_min(1e-30)[:, None] for own in found]


def turned(model: Oracle, dial: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the range that was verified is another model's
        model.set_dial(dial)


def kept(model: Oracle, dial: float, images: list[Batch], known: list[Tensor]) -> float:
    turned(model, dial)
    total = []
    with torch.inference_mode():
        for batch, own in list(zip(images, known, strict=True))[::PROBE]:
            model.know(own)
            total.append(model.run(batch.images).macs)
    return float(np.concatenate(total).mean()) / model.dense_macs


def measure(run: Path, gamma: float, images: list[Batch], known: list[Tensor], dense: list[Tensor], target: float) -> dict[str, Any]:
    """The oracle at a share of the MACs, of all images."""
    model = oracle_of(run, gamma)
    assert model.plan.dial is not None
    here = math.log(model.plan.dial)
    place = brentq(lambda at: kept(model, math.exp(at), images, known) - target, here - 4, here + 4, xtol=0.05)
    for _ in range(TRIES):
        found = drifts(model, math.exp(place), images, known, dense)
        if abs(found["macs_ratio"] - target) < CLOSE:
            break
        place += (found["macs_ratio"] - target) / FALL
    return found


def drifts(model: Oracle, dial: float, images: list[Batch], known: list[Tensor], dense: list[Tensor]) -> dict[str, Any]:
    turned(model, dial)
    parts = []
    for batch, own, logits in zip(images, known, dense, strict=True):
        model.know(own)
        parts.append(evaluate(model, [logits], [batch]))
    drift = np.concatenate([part.drift_kl for part in parts])
    agreement = np.concatenate([part.agreement for part in parts])
    macs = float(np.concatenate([part.macs for part in parts]).mean()) / model.dense_macs
    error = float(drift.std(ddof=1)) / math.sqrt(len(drift))
    return {"macs_ratio": macs, "drift_kl": float(drift.mean()), "drift_kl_stderr": error, "agreement": float(agreement.mean())}


def baseline(key: str, share: float) -> float:
    """ToMe's drift at the target nearest to ``share``, moved along its slope."""
    rows = [json.loads(line) for line in (Path(__file__).parent / "results" / "criteria.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["key"].startswith(f"{key} | tome |")]
    near = min(own, key=lambda row: abs(row["macs_ratio"] - share))
    return float(near["drift_kl"]) * math.exp(SLOPE * (near["macs_ratio"] - share))


def main() -> None:
    options = arguments_for_runs(__doc__.splitlines()[0])
    book, place = Book(options.book), Place(options.data)
    for key, (name, _) in MODELS.items():
        runs = [run for run in options.runs if open_run(run).plan.model.name == name]
        if not runs:
            continue
        model = place.model(key)
        val = place.images("val", model)
        mixed = np.random.default_rng(0).permutation(len(val)).tolist()  # some batches stand for all: a folder comes class by class
        images: list[Any] = list(batches(val, BATCH, indices=mixed))
        dense, known = dense_logits(model.host.module, images), curvatures(model.host, images)
        for run in runs:
            own = evaluate(hesper.load(run), dense, images)
            share, drift = own.kept_macs.mean, float(own.drift_kl.mean())
            tome = baseline(key, share)
            say(f"{key} {run.name}: MACs {share:.3f}, drift {drift:.4f}; ToMe there {tome:.4f}")
            for gamma in POWERS:
                row = f"{key} | {run.name} | oracle, gamma {gamma}"
                if row not in book:
                    found = measure(run, gamma, images, known, dense, share)
                    book.add(row, {**found, "run_drift": drift, "tome_drift": tome})
                found = book.rows[row]
                closed = (tome - drift) / (tome - found["drift_kl"])
                say(f"{row}: MACs {found['macs_ratio']:.3f}, drift {found['drift_kl']:.4f}, closed {closed:.2f}")


if __name__ == "__main__":
    main()
