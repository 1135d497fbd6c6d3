"""Which heads an image uses: predicted before a block's queries, keys and values are made, and really skipped where one sits out."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft.layout import Layout
from hesper.hosts.base import HostBlock
from hesper.plan import HeadGate

MOST_VARIANTS = 8  # for each block: every way of using some of three heads; of more heads the ways used last


class Gate(nn.Module):
    """Predicts, image by image, what each head of a block is worth, and lets the cheap ones sit out.

        log price_h = a_h . r + b_h

    with r the reader's row (:func:`reader_row`). A head sits out where its price is at most the cut's threshold; the dearest
    stays.

    Args:
        cut: block and threshold in nats.
        weights: ``direction`` ``[width, heads]`` and ``offset`` ``[heads]``, for the heads the block has; ``stand_in`` ``[heads]``
            where a router reads the reader's attention: what it is to see of a head that sat out.
    """

    direction: Tensor
    offset: Tensor
    stand_in: Tensor | None

    def __init__(self, cut: HeadGate, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.cut = cut
        for name in ("direction", "offset", "stand_in"):
            self.register_buffer(name, weights[name].clone() if name in weights else None)
        self.variants = Variants()

    def forward(self, row: Tensor) -> Tensor:
        """Which heads stay, ``[images, heads]``, from the reader's rows ``[images, width]``."""
        log_price = torch.addmm(self.offset, row.to(self.offset.dtype), self.direction)
        limit = math.log(self.cut.threshold) if self.cut.threshold > 0 else -math.inf
        return (log_price > limit).scatter(1, log_price.argmax(1, keepdim=True), True)

    @property
    def macs(self) -> int:
        """MACs an image spends on the prediction."""
        return self.direction.numel()

    def attention(self, seen: Tensor, kept: Sequence[int]) -> Tensor:
        """The reader's log attention ``[rows, heads]``, known for the ``kept`` heads.

        Where a router reads it, a head that sat out has its mean over calibration images, as one removed for good; for deciders
        that average over heads it has the mean of the others.
        """
        if self.stand_in is not None:
            seen = seen.to(torch.promote_types(seen.dtype, self.stand_in.dtype))
        if len(kept) == len(self.offset):
            return seen
        missing = seen.logsumexp(1, keepdim=True) - math.log(len(kept)) if self.stand_in is None else self.stand_in
        every = missing.expand(len(seen), len(self.offset)).clone()
        every[:, list(kept)] = seen
        return every

    def vectors(self, seen: Tensor, kept: Sequence[int]) -> Tensor:
        """Keys or values ``[rows, heads, head_dim]``: heads that sat out have the mean of the others, so that a mean ignores them."""
        if len(kept) == len(self.offset):
            return seen
        every = seen.mean(1, keepdim=True).expand(-1, len(self.offset), -1).clone()
        every[:, list(kept)] = seen
        return every


class Variants:
    """Twins of a block without some of its heads, made when first needed; the one not needed for longest leaves."""

    def __init__(self) -> None:
        self.made: OrderedDict[tuple[int, ...], HostBlock] = OrderedDict()
        self.stamp: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Variants:
        return Variants()  # the copy's block has weights of its own

    def of(self, block: HostBlock, gone: tuple[int, ...]) -> HostBlock:
        """``block`` without the heads ``gone``; UsageError where its weights are being trained, which the twins would not learn from."""
        weights = list(block.attention.parameters())
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            raise UsageError("Heads that adapt to the image run on copies of the weights, which cannot be trained; freeze the attention.")
        stamp = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype) for weight in weights)
        if stamp != self.stamp:  # weights were loaded, changed or moved since
            self.made.clear()
            self.stamp = stamp
        if not gone:
            return block
        if gone not in self.made:
            with torch.inference_mode(False), torch.no_grad():
                self.made[gone] = block.without_heads(gone)
            if len(self.made) > MOST_VARIANTS:
                self.made.popitem(last=False)
        self.made.move_to_end(gone)
        return self.made[gone]


def reader_row(block: HostBlock, rows: Tensor, size: Tensor | None, layout: Layout) -> Tensor:
    """What gates read, ``[images, width]``: the normed first prefix row of each image, or the mean of its normed rows without prefix.

    Args:
        block: whose norm it is.
        rows: ``[rows, width]`` as they enter the block.
        size: ``[rows]`` tokens each row counts for in the mean, or None where each counts once.
        layout: of the rows.
    """
    if layout.prefix:
        return block.normed(layout.prefix_rows(rows)[:, 0])
    return mean_row(block.normed(rows), size, layout)


def mean_row(normed: Tensor, size: Tensor | None, layout: Layout) -> Tensor:
    """Mean of each image's rows, ``[images, width]``, each counted as often as ``size`` ``[rows]`` says.

    Example:
        >>> mean_row(torch.tensor([[1.0], [4.0], [5.0]]), torch.tensor([2.0, 1.0, 1.0]), Layout((2, 1), prefix=0)).tolist()
        [[2.0], [5.0]]
    """
    if size is None and layout.rectangular:
        return layout.by_image(normed).mean(1)
    weight = torch.ones_like(normed[:, :1]) if size is None else size[:, None]
    parts = zip(layout.split(normed * weight), layout.split(weight), strict=True)
    return torch.stack([rows.sum(0) / weights.sum() for rows, weights in parts])
