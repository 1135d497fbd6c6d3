"""Adaptive against fixed counts in time, at as much drift.

    python benchmarks/counts.py --data DATA --runs RUN RUN

A run's twin has its blocks, prices and all that was learned, but every block removes the mean number of tokens that the run's own
thresholds remove at some dial. A dial is sought at which both keep as many MACs, and they are compared on all images that fitted
nothing; and one at which both drift equally far on the calibration images that verified the run, where both and the dense model take
turns on validation images. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from common import MODELS, Place, say
from criteria import BATCH
from speed import LARGE, SINGLES, job, kept

import hesper
from hesper.data import batches, split
from hesper.errors import Unverified
from hesper.graft import GraftedViT
from hesper.graft.deciders import CurvatureMerge
from hesper.heart.calibrate import as_counts, mean_removed
from hesper.heart.prune import FIT_SHARE, MOST_FIT_IMAGES
from hesper.measure.evaluate import Evaluation, dense_logits, evaluate
from hesper.measure.timing import take_turns
from hesper.runs import environment

TRIALS, ROUNDS, CALIBRATE = 6, 25, 64


class Twins:
    """A run and the images that fitted and verified it."""

    def __init__(self, place: Place, path: Path) -> None:
        self.path, self.run = path, hesper.load(path)
        self.key = next(key for key, (name, _) in MODELS.items() if name == self.run.plan.model.name)
        self.model = place.model(self.key)
        self.calib, self.val = (place.images(name, self.model) for name in ("calib", "val"))
        fit, rest = split(self.calib, (FIT_SHARE, 1 - FIT_SHARE), self.run.plan.provenance.seed)
        self.fit, fitted = fit[:CALIBRATE], {self.calib.digests[index] for index in fit[:MOST_FIT_IMAGES]}
        self.verify = [index for index in rest if self.calib.digests[index] not in fitted]
        self.dense = dense_logits(self.model.host.module, batches(self.calib, BATCH, indices=self.verify))

    def measured(self, cut: GraftedViT) -> Evaluation:
        return evaluate(cut, self.dense, batches(self.calib, BATCH, indices=self.verify))

    def fixed(self, dial: float) -> GraftedViT:
        """The run with as many tokens removed from every image as it removes on average at a dial."""
        twin = hesper.load(self.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Unverified)
            twin.set_dial(dial)
        cuts = as_counts(twin.plan, mean_removed(twin, batches(self.calib, BATCH, indices=self.fit)))
        for cut in cuts:
            cast(CurvatureMerge, twin.deciders[str(cut.block)]).cut = cut
        twin.plan = replace(twin.plan, tokens=cuts, dial=None)
        return twin

    def as_far(self, drift: float) -> tuple[GraftedViT, Evaluation]:
        """The twin whose drift comes nearest."""
        own = self.run.plan.dial
        assert own is not None
        low, high, tried = own / 8, own * 2, []
        for _ in range(TRIALS):
            dial = math.sqrt(low * high)
            twin = self.fixed(dial)
            found = self.measured(twin)
            tried.append((twin, found))
            low, high = (low, dial) if found.drift_kl.mean() > drift else (dial, high)
        return min(tried, key=lambda each: abs(math.log(each[1].drift_kl.mean() / drift)))

    def as_dear(self, macs: float) -> GraftedViT:
        """The twin that keeps as many MACs."""
        own = self.run.plan.dial
        assert own is not None
        low, high, image = own / 8, own * 2, next(iter(batches(self.val, 1, indices=[0]))).images
        twins = []
        for _ in range(2 * TRIALS):
            dial = math.sqrt(low * high)
            twins.append((twin := self.fixed(dial), found := kept(twin, [image])))
            low, high = (dial, high) if found > macs else (low, dial)
        return min(twins, key=lambda each: abs(each[1] - macs))[0]

    def at_as_many_macs(self) -> None:
        """Print how much less far adaptive counts drift, and how much more often they agree."""
        val = [batches(self.val, BATCH) for _ in range(3)]
        logits = dense_logits(self.model.host.module, val[0])
        own = (self.measured(self.run), evaluate(self.run, logits, val[1]))
        macs = np.concatenate([found.macs for found in own]).mean() / own[0].macs_dense
        twin = self.as_dear(float(macs))
        other = (self.measured(twin), evaluate(twin, logits, val[2]))
        for name, these, those in zip(("verifying", "validation"), own, other, strict=True):
            ratio, drawn = these.drift_kl.mean() / those.drift_kl.mean(), np.random.default_rng(0).integers(0, these.n, (2000, these.n))
            error = (these.drift_kl[drawn].mean(1) / those.drift_kl[drawn].mean(1)).std()
            gain = these.agreement.astype(float) - those.agreement
            shares = f"MACs {these.kept_macs.mean:.4f} and {those.kept_macs.mean:.4f}"
            say(f"{self.path.name}, {name}: {shares}, adaptive drifts {ratio:.3f} +- {error:.3f} times as far as fixed")
            say(f"  and agrees in {100 * gain.mean():+.2f} +- {100 * gain.std(ddof=1) / math.sqrt(these.n):.2f} points more")

    def compare(self, rounds: int) -> None:
        """Find the twin, time both, print."""
        self.at_as_many_macs()
        own = self.measured(self.run)
        twin, other = self.as_far(float(own.drift_kl.mean()))
        for name, found in (("adaptive", own), ("fixed", other)):
            text = f"{self.path.name}, {name}: MACs {found.kept_macs.mean:.4f}, drift {found.drift_kl.mean():.4f}"
            say(f"{text} +- {found.drift_kl.std(ddof=1) / math.sqrt(found.n):.4f}, agreement {found.agreement.mean():.3f}")
        large = [next(iter(batches(self.val, LARGE, indices=range(start, len(self.val), 3)))).images for start in range(2)]
        for words, inputs in ((f"batches of {LARGE}", large), ("alone", [image[None] for image in large[0][:SINGLES]])):
            models = {"dense": self.model.host.module, "adaptive": self.run, "fixed": twin}
            turns = take_turns({name: job(model, inputs) for name, model in models.items()}, rounds=rounds, warmup=2)
            both = turns.compare("fixed", "adaptive")
            shares = ", ".join(f"{name} {kept(cut, inputs):.3f}" for name, cut in (("adaptive", self.run), ("fixed", twin)))
            speeds = ", ".join(f"{name} {turns.compare('dense', name).ratio:.3f}" for name in ("adaptive", "fixed"))
            say(f"  {words}: fixed takes {both.ratio:.3f} [{both.low:.3f}, {both.high:.3f}] of adaptive's time")
            say(f"    MACs {shares}; speed-ups {speeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    say(json.dumps(environment()))
    place = Place(options.data)
    for run in options.runs:
        Twins(place, run).compare(options.rounds)


if __name__ == "__main__":
    main()
