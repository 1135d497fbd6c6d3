"""Measured speed-up of pruned runs against the dense model, beside the ratio of MACs, on real images.

    python benchmarks/speed.py --data DATA --runs RUN RUN

Dense and pruned models take turns on the same batches; the speed-up is the median over rounds of the ratio of their times, with its
bootstrap 95 % interval; the MAC ratio counts what ran on exactly these images, deciding included. Also the cost of an empty plan over
the bare host, and the ceiling: the dense model on so few tokens from the first block on that it needs as many MACs as
the run, with nothing to decide. Let nothing else run meanwhile. Takes about twelve minutes for six runs on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import MODELS, Place, say
from torch import nn

import hesper
from hesper.cost import block_macs, dense_macs, fixed_macs
from hesper.data import batches
from hesper.graft import GraftedViT, graft
from hesper.hosts.open import OpenModel
from hesper.measure.timing import Comparison, compare
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


def shortened(model: OpenModel, share: float) -> tuple[nn.Module, float]:
    """The dense model on its first tokens alone, as many as ``share`` of its MACs allow, and the share that is."""
    host, anatomy = model.host, model.ref.anatomy

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


def line(name: str, share: float, found: Comparison) -> str:
    goal = found.ratio * share
    return (
        f"{name:44} MACs {share:.3f}  speed-up {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]  "
        f"x MACs = {goal:.3f} [{found.low * share:.3f}, {found.high * share:.3f}]  dense {1000 * found.seconds[0]:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    say(json.dumps(environment()))
    place = Place(options.data)
    for key in MODELS:
        model = place.model(key)
        images = place.images("val", model)
        large = [next(iter(batches(images, LARGE, indices=range(start, len(images), 3)))).images for start in range(2)]
        singles = [image[None] for image in large[0][:SINGLES]]
        dense = model.host.module
        empty = graft(dense, empty_plan(model.ref.name, model.ref.anatomy))
        for name, inputs in (("batch 32", large), ("batch 1", singles)):
            say(line(f"{key}, empty plan, {name}", 1.0, compare(job(dense, inputs), job(empty, inputs), rounds=options.rounds, warmup=2)))
        for run in options.runs:
            if open_run(run).plan.model.name != model.ref.name:
                continue
            cut = hesper.load(run)
            for name, inputs in (("batch 32", large), ("batch 1", singles)):
                found = compare(job(dense, inputs), job(cut, inputs), rounds=options.rounds, warmup=2)
                say(line(f"{key}, {run.name}, {name}", share := kept(cut, inputs), found))
                fewer, own = shortened(model, share)
                found = compare(job(dense, inputs), job(fewer, inputs), rounds=options.rounds, warmup=2)
                say(line(f"{key}, {run.name}, {name}, ceiling", own, found))


if __name__ == "__main__":
    main()
