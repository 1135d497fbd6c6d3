"""A cut model's forward in pieces, for whoever times them: its ends, and its blocks at any count of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesper.graft.apply import graft
from hesper.graft.layout import Layout
from hesper.graft.model import Book, GraftedViT
from hesper.graft.stream import Stream
from hesper.hosts.base import HostBlock
from hesper.plan import Combine, ModelRef, Pricing, TokenCut, empty_plan

__all__ = ["Decision", "Pieces"]

SHARE = 6  # one in so many patches leaves where a decision of a fixed count is timed
EVERYTHING = 1e30  # nats, below which every pair is


@dataclass(frozen=True)
class Decision:
    """How tokens are decided on: whether they merge, in how many rounds of matching, the rank of the metric, and whether counts adapt."""

    combine: Combine
    rounds: int = 1
    rank: int = 24
    adaptive: bool = False

    def leave(self, patches: int) -> int:
        """How many of so many patches leave where the decision is timed: a few, or all that can where they do not share one count.

        Example:
            >>> Decision("merge", 2).leave(12), Decision("merge", 2, adaptive=True).leave(12)
            (2, 9)
        """
        if not self.adaptive:
            return patches // SHARE
        left = patches
        for _ in range(self.rounds):
            left -= left // 2
        return patches - left

    def cut(self, block: int, patches: int) -> TokenCut:
        """That lets so many leave."""
        if self.adaptive:
            return TokenCut(block, self.combine, threshold=EVERYTHING)
        return TokenCut(block, self.combine, remove=self.leave(patches))


class Pieces:
    """The pieces of a model cut under the criterion kl, on tokens of noise: what they take depends on counts, not on values.

    ``decision`` says how tokens leave; None where they never do and only heads go. Everything runs in inference mode.
    """

    fewest = 1  # tokens that a stream may have

    def __init__(self, module: nn.Module, ref: ModelRef, decision: Decision | None) -> None:
        anatomy = ref.anatomy
        self.module, self.anatomy, self.decision = module, anatomy, decision
        self.block = anatomy.depth // 2
        skips = decision is not None and not anatomy.reads_patches and anatomy.prefix_tokens > 0
        plan = replace(empty_plan(ref.name, anatomy), skip_unread=skips)
        tables: dict[str, Tensor] = {}
        if decision is not None:
            pricing = Pricing("kl", 1.0, 1, decision.rank, 0.35, decision.rounds)
            plan = replace(plan, pricing=pricing, tokens=(TokenCut(self.block, decision.combine, remove=0),))
            tables = _tables(self.block, anatomy.width, anatomy.heads, decision.rank)
        self.model: GraftedViT = graft(module, plan, tables, check_weights=False)
        self.skip_unread = plan.skip_unread
        if decision is not None and decision.combine == "merge":
            self.model.size_exponent.fill_(0.9)  # sizes count to a power of their own in every head, as refined runs have it
            self.model._look_at_exponents()

    def stream(self, images: int, tokens: int, device: torch.device) -> Stream:
        """Noise of so many tokens an image, merged ones among them unless all are there."""
        layout = Layout((tokens,) * images, self.anatomy.prefix_tokens, device)
        generator = torch.Generator().manual_seed(tokens)
        like = next(self.module.parameters())
        rows = torch.randn(layout.rows, self.anatomy.width, generator=generator).to(device, like.dtype)
        merged = self.decision is not None and self.decision.combine == "merge" and tokens < self.anatomy.tokens
        size = torch.randint(1, 4, (layout.rows,), generator=generator).to(device, like.dtype) if merged else None
        place = layout.places if self.model.host.reads_places else None
        return Stream(rows, layout, size, place=place)

    def begin(self, images: Tensor) -> Stream:
        """Images to the stream that enters the first block."""
        return self.model._lay_out(self.model.host.embed(images))

    def fresh(self, stream: Stream) -> Stream:
        """A stream that may be written to."""
        return replace(stream, rows=stream.rows.clone())

    def dense(self, images: Tensor) -> Tensor:
        """Images to logits through the model before anything is cut."""
        logits: Tensor = self.module(images)
        return logits

    def through(self, stream: Stream) -> None:
        """Both halves of every block but one that computes the prefix alone, nothing leaving."""
        self._through(stream, self.model.host.blocks)

    def _through(self, stream: Stream, blocks: Sequence[HostBlock]) -> None:
        book = Book()
        for index, block in enumerate(blocks[: self.depth]):
            self.model._through(index, block, stream, book, decide=False)

    def feed(self, stream: Stream) -> None:
        """The feed-forward halves of the same blocks."""
        for block in self.model.host.blocks[: self.depth]:
            stream.feed(block.feed)

    def decide(self, stream: Stream, lets_go: bool) -> None:
        """One block in the middle, with a decision that lets some patches of each image go, or without any."""
        block = self.model.host.blocks[self.block]
        if lets_go and self.decision is not None:
            cut = self.decision.cut(self.block, stream.layout.counts[0] - self.anatomy.prefix_tokens)
            cast(Any, self.model.deciders[str(self.block)]).cut = cut
        self.model._through(self.block, block, stream, Book(), decide=lets_go)

    def finish(self, stream: Stream) -> Tensor:
        """The stream to logits, through the last block where it computes the prefix alone."""
        return self.model._finish_readers(stream, Book()) if self.skip_unread else self.model._finish(stream)

    @property
    def depth(self) -> int:
        """Blocks that run on every token."""
        return self.anatomy.depth - 1 if self.skip_unread else self.anatomy.depth

    def with_heads(self, heads: int) -> Callable[[Stream], None]:
        """As :meth:`through`, of blocks with only so many of their heads."""
        gone = range(self.anatomy.heads - heads)
        blocks = [block.without_heads(gone) for block in self.model.host.blocks]
        return lambda stream: self._through(stream, blocks)


def _tables(block: int, width: int, heads: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{block}.root": torch.randn(width, rank, generator=generator) / width,
        f"{block}.router.direction": torch.randn(width, generator=generator) / width,
        f"{block}.router.attention": torch.randn(heads, generator=generator) / heads,
        f"{block}.router.offset": torch.zeros(()),
        f"{block}.restoration.stretch": torch.ones(()),
        f"{block}.restoration.gain": torch.zeros(width),
    }
