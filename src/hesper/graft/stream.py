"""The packed token stream on its way through the blocks: carrying decisions out, and following every patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.graft.compiling import eager, seam
from hesper.graft.decision import Decision
from hesper.graft.even import EvenDecision
from hesper.graft.layout import Layout
from hesper.graft.restoration import Restoration, restored_mean
from hesper.precision import wide

# Rows that a feed-forward half takes at once on a CPU: its hidden activations, four times as wide, then stay in cache
# (measured for widths 192 and 768; all rows at once take one and a half times as long).
PIECE = 512


@dataclass
class Stream:
    """The packed rows ``[rows, width]``, where they lie, and how many original tokens each stands for.

    Where a decision moves rows anyway they are put so that images of equal counts lie side by side: on a processor, attention then takes
    these in one call, on views.

    ``size`` ``[rows]`` is None while every token stands for itself. ``origin`` (when patches are followed) is the current row that
    stands for each original row, -1 where it was dropped. ``place`` ``[rows]`` (for hosts that read it) is where each row was
    embedded; what merges into a row leaves its place behind.
    """

    rows: Tensor
    layout: Layout
    size: Tensor | None = None
    origin: Tensor | None = None
    place: Tensor | None = None
    _log_size: Tensor | None = None  # sizes change only where a decision is carried out, and every block in between reads them

    @eager
    def follow(self) -> None:
        """Start following where each original row goes."""
        self.origin = torch.arange(self.layout.rows, device=self.rows.device)

    @eager
    def add(self, update: Tensor) -> None:
        """Add a residual update ``[rows, width]``."""
        # In place unless autograd may need the old rows: a fresh block of memory per half costs more than the sum itself.
        self.rows = self.rows + update if torch.is_grad_enabled() else self.rows.add_(update)

    @seam
    def feed(self, half: Callable[[Tensor], Tensor]) -> None:
        """Add the update of a feed-forward ``half``, which treats every row alone."""
        if len(self.rows) <= PIECE or torch.is_grad_enabled() or self.rows.device.type != "cpu":
            self.add(half(self.rows))
            return
        for rows in torch.split(self.rows, PIECE):
            rows.add_(half(rows))

    def sizes(self) -> Tensor:
        """``[rows]`` sizes, ones included; in single precision at least, as halves do not count far."""
        return torch.ones_like(wide(self.rows[:, 0])) if self.size is None else self.size

    @eager
    def log_size(self, power: Tensor | None = None) -> Tensor | None:
        """What attention adds to its logits: log s ``[rows]``, or with a ``power`` p ``[heads]`` p log s ``[rows, heads]``.

        In single precision at least; None while every token stands for itself.
        """
        if self._log_size is None and self.size is not None:
            self._log_size = wide(self.size).log()
        return self._log_size if power is None or self._log_size is None else self._log_size[:, None] * power

    def carry_out(self, decision: Decision | EvenDecision, restoration: Restoration | None = None) -> None:
        """Take the decided tokens out; what is merged leaves its mass where it goes (:func:`~hesper.graft.restoration.restored_mean`)."""
        if decision.nothing:
            return
        decision = decision.by_count()
        before, size, self._log_size = self.rows, self.sizes(), None
        if decision.into is None:
            self.rows = before.index_select(0, decision.staying)
            self.size = None if self.size is None else size.index_select(0, decision.staying)
        else:
            self.rows, self.size = restored_mean(before, size, decision, restoration)
        self.place = None if self.place is None else self.place.index_select(0, decision.staying)
        left = self.layout.with_counts(decision.left)
        self.layout = left if decision.order is None else left.arranged(decision.order)
        self._trace(decision)

    def _trace(self, decision: Decision | EvenDecision) -> None:
        if self.origin is None:
            return
        self.origin = torch.where(self.origin >= 0, decision.fate[self.origin.clamp_min(0)], -1)

    def patch_map(self, first: Layout) -> Tensor:
        """``[images, patches]``: place among its image's patches of the one that stands for each original patch, -1 where dropped."""
        assert self.origin is not None
        local = torch.where(self.origin >= 0, self.origin - self.layout.restored(self.layout.first_patch)[first.image], -1)
        return first.padded(local)
