"""A grafted model with one decision left out, for asking what letting tokens go there would change."""

from __future__ import annotations

import torch
from torch import Tensor

from hesper.errors import UsageError
from hesper.graft.deciders import Decider, State
from hesper.graft.half import Seen
from hesper.graft.model import Book, GraftedViT
from hesper.graft.stream import Stream


class Watched(GraftedViT):
    """The same model, sharing its parts, that can be stopped from deciding in one block and remembers what the decider would have seen.

    Where tokens have merged already, the slope at each is that of their mean, and nothing tells them apart; where they
    are still to merge, slopes say what merging them would change, given all that other blocks let go.

    Args:
        cut: the model to watch.

    Example:
        >>> import timm
        >>> from dataclasses import replace
        >>> from hesper.graft import graft
        >>> from hesper.hosts import open_host
        >>> from hesper.plan import TokenCut, empty_plan
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> plan = replace(empty_plan("test_vit", open_host(model).anatomy), tokens=(TokenCut(1, "merge", remove=9),))
        >>> logits, state = Watched(graft(model, plan)).watch(torch.randn(2, 3, 160, 160), 1)
        >>> torch.autograd.grad(logits[:, 0].sum(), state.stream)[0].shape, state.layout.counts
        (torch.Size([202, 64]), (101, 101))
    """

    def __init__(self, cut: GraftedViT) -> None:
        deciders = {int(block): decider for block, decider in cut.deciders.items()}
        gates = {int(block): gate for block, gate in cut.gates.items()}
        super().__init__(cut.host, cut.plan, deciders, gates, cut.size_exponent)  # type: ignore[arg-type]
        self.to(cut.size_exponent.device).eval()
        self._block: int | None = None
        self._state: State | None = None

    def watch(self, images: Tensor, block: int) -> tuple[Tensor, State]:
        """Logits ``[images, classes]`` without the decision of ``block``, and its state, to whose ``stream`` they can be differentiated.

        UsageError where the block decides nothing.
        """
        if str(block) not in self.deciders:
            raise UsageError(f"Block {block} lets no tokens go, so there is no decision to leave out.")
        self._block, self._state = block, None
        try:
            with torch.enable_grad():
                logits = self(images)
        finally:
            self._block = None
        assert self._state is not None
        return logits, self._state

    def _decide(self, index: int, decider: Decider, seen: Seen, stream: Stream, book: Book) -> None:
        if index != self._block:
            super()._decide(index, decider, seen, stream, book)
            return
        # A leaf: what lies before it need not be differentiated.
        stream.rows = stream.rows.detach().requires_grad_()
        normed, key, value, attention, size = (
            part.detach() for part in (seen.normed, seen.key, seen.value, seen.attention, stream.sizes())
        )
        self._state = State(stream.rows, normed, key, value, attention, size, stream.layout)
        book.entered[index] = (stream.layout.listed(stream.layout.counts),)
