"""Speed-up of an image alone against the ratio of MACs, by the size of the model.

    python benchmarks/sizes.py

What a decision takes grows less with the width of a model than what its blocks take. Models of ViT's usual shapes with random
weights merge as many tokens in every image as the MACs ask for, in turns with the dense model; their outputs mean nothing, only their
times do. The ceiling is the dense model on so few tokens that it needs as many MACs. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import timm
import torch
from common import say
from speed import job, kept, line, shortened

from hesper.graft import GraftedViT, graft
from hesper.graft.linkage import most_removed
from hesper.hosts import Host, open_host
from hesper.measure.timing import take_turns
from hesper.plan import Pricing, TokenCut, empty_plan

SHAPES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
BLOCKS, RANK = (0, 2, 4, 6), 24  # of twelve; deeper models decide at the same shares of their depth


def cut_to(name: str, host: Host, share: float) -> GraftedViT:
    """The model with the fewest tokens merged, as many in each decision, that keep at most ``share`` of the MACs."""
    anatomy, blank = host.anatomy, empty_plan(name, host.anatomy)
    draw = torch.Generator().manual_seed(0)
    blocks = [block * anatomy.depth // 12 for block in BLOCKS]
    tables = {}
    for block in blocks:
        tables[f"{block}.root"] = torch.randn(anatomy.width, RANK, generator=draw)
        tables[f"{block}.router.direction"] = torch.randn(anatomy.width, generator=draw) / anatomy.width
        tables[f"{block}.router.attention"] = torch.zeros(anatomy.heads)
        tables[f"{block}.router.offset"] = torch.zeros(())
    pricing = Pricing("kl", 4.0, 1, RANK, 0.35, 1)
    images = torch.zeros(1, 3, *anatomy.image_size)
    for remove in range(1, most_removed(anatomy.tokens - anatomy.prefix_tokens, 1)):
        cuts = tuple(TokenCut(block, "merge", remove=remove) for block in blocks)
        cut = graft(host.module, replace(blank, pricing=pricing, tokens=cuts, skip_unread=True), tables)
        if kept(cut, [images]) <= share:
            return cut
    raise SystemExit(f"{name} cannot be cut to {share} of its MACs in {len(blocks)} decisions.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    say(json.dumps({"torch": torch.__version__, "threads": options.threads, "batch": options.batch_size, "rounds": options.rounds}))
    for name in options.shapes:
        torch.manual_seed(0)
        host = open_host(timm.create_model(name).eval())
        images = torch.randn(options.batch_size, 3, *host.anatomy.image_size)
        jobs, shares = {"dense": job(host.module, [images])}, {}
        for share in (0.66, 0.5):
            cut = cut_to(name, host, share)
            fewer, own = shortened(host, found := kept(cut, [images]))
            jobs |= {f"{name} {share}": job(cut, [images]), f"{name} {share}, ceiling": job(fewer, [images])}
            shares |= {f"{name} {share}": found, f"{name} {share}, ceiling": own}
        turns = take_turns(jobs, rounds=options.rounds, warmup=2)
        for each, share in shares.items():
            say(line(turns, "dense", each, share))


if __name__ == "__main__":
    main()
