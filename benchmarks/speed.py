"""Measured speed-up of pruned runs against the dense model, beside the ratio of MACs, on real images.

    python benchmarks/speed.py --data DATA --runs RUN RUN

The dense model, an empty plan and every run of that model take turns on the same batches, and so does each run's ceiling: the dense
model on so few tokens from the first block on that it needs as many MACs as the run, with nothing to decide. A speed-up is the
median over rounds of the ratio of two times, with its bootstrap 95 % interval; the MAC ratio counts what ran on exactly these images,
deciding included. Let nothing else run meanwhile, and give each model a process of its own, since how fast memory is had depends on
what went before. Takes four minutes for four runs of one model on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from common import MODELS, Place, say
from torch import nn

import hesper
from hesper.cost import block_macs, dense_macs, fixed_macs
from hesper.data import batches
from hesper.graft import GraftedViT, graft
from hesper.hosts import Host
from hesper.hosts.open import OpenModel
from hesper.measure.timing import Turns, take_turns
from hesper.plan import empty_plan
from hesper.runs import environment, open_run

LARGE, SINGLES = 32, 24


def job(model: nn.Module, inputs: list[torch.Tensor]) -> Callable[[], object]:
    """Run the model over all inputs without recording gradients."""

    def run() -> None:
        with torch.inference_mode():
            for images in inputs:
                model(images)

    return run


def kept(cut: GraftedViT, inputs: list[torch.Tensor]) -> float:
    """Mean share of the dense MACs on these inputs."""
    with torch.inference_mode():
        return float(np.concatenate([cut.run(images).macs for images in inputs]).mean()) / cut.dense_macs


def shortened(host: Host, share: float) -> tuple[nn.Module, float]:
    """The dense model on its first tokens alone, as many as ``share`` of its MACs allow, and the share that is."""
    anatomy = host.anatomy

    def macs(tokens: int) -> float:
        count = np.array([tokens])
        blocks = anatomy.depth * int(block_macs(anatomy, anatomy.heads, count, count, count)[0])
        return (blocks + fixed_macs(anatomy)) / dense_macs(anatomy)

    tokens = max(count for count in range(anatomy.prefix_tokens, anatomy.tokens + 1) if macs(count) <= share)

    class Shortened(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            stream = host.module.blocks(host.embed(images)[:, :tokens])
            return host.readout(host.norm(stream)[:, : anatomy.prefix_tokens], None)

    return Shortened(), macs(tokens)


def line(turns: Turns, against: str, name: str, share: float) -> str:
    found = turns.compare(against, name)
    return (
        f"{name:44} MACs {share:.3f}  speed-up {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]  "
        f"x MACs = {found.ratio * share:.3f} [{found.low * share:.3f}, {found.high * share:.3f}]  {1000 * found.seconds[1]:.1f} ms"
    )


def measure(model: OpenModel, runs: Mapping[str, GraftedViT], inputs: list[torch.Tensor], rounds: int) -> None:
    """Everything of one model in turns, printed line by line."""
    dense = model.host.module
    jobs = {"dense": job(dense, inputs), "empty plan": job(graft(dense, empty_plan(model.ref.name, model.ref.anatomy)), inputs)}
    shares = {"empty plan": 1.0}
    for name, cut in runs.items():
        fewer, own = shortened(model.host, share := kept(cut, inputs))
        jobs |= {name: job(cut, inputs), f"{name}, ceiling": job(fewer, inputs)}
        shares |= {name: share, f"{name}, ceiling": own}
    turns = take_turns(jobs, rounds=rounds, warmup=2)
    for name, share in shares.items():
        say("  " + line(turns, "dense", name, share))
    for name in runs:
        found = turns.compare(f"{name}, ceiling", name)
        say(f"  {name}: {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}] of its ceiling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    say(json.dumps(environment()))
    names = [run.name for run in options.runs]
    if len({*names, "dense", "empty plan"}) < len(names) + 2:
        parser.error("the runs' folders need names of their own, other than 'dense' and 'empty plan'")
    place = Place(options.data)
    for key in MODELS:
        model = place.model(key)
        runs = {run.name: hesper.load(run) for run in options.runs if open_run(run).plan.model.name == model.ref.name}
        if options.runs and not runs:
            continue
        images = place.images("val", model)
        large = [next(iter(batches(images, LARGE, indices=range(start, len(images), 3)))).images for start in range(2)]
        singles = [image[None] for image in large[0][:SINGLES]]
        for name, inputs in ((f"{key}, batches of {LARGE}", large), (f"{key}, batches of 1", singles)):
            say(f"{name}, {options.rounds} rounds")
            measure(model, runs, inputs, options.rounds)


if __name__ == "__main__":
    main()
