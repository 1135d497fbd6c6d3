"""What every host model offers: its anatomy, its two ends, and the two halves of each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hesper.plan import Anatomy


@dataclass(frozen=True)
class Projected:
    """What a block computes before attention, for rows of any leading shape.

    ``normed`` is ``[..., width]``; ``query``, ``key`` and ``value`` are ``[..., heads, head_dim]``, already
    normalised where the host normalises them.
    """

    normed: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class HostBlock(Protocol):
    """One transformer block, taken apart into the host's own submodules; every method works on rows."""

    @property
    def heads(self) -> int:
        """Number of attention heads this block has now."""

    @property
    def scale(self) -> float:
        """Factor on the attention logits."""

    def project(self, stream: Tensor) -> Projected:
        """Norm, queries, keys and values of ``[..., width]`` rows."""

    def project_readers(self, stream: Tensor, readers: Tensor) -> Projected:
        """As :meth:`project`, with queries for the ``readers`` rows only (``[..., width]`` of any other leading shape)."""

    def merge_heads(self, mixed: Tensor) -> Tensor:
        """The residual update ``[..., width]`` from attention outputs ``[..., heads * head_dim]``."""

    def feed(self, stream: Tensor) -> Tensor:
        """The residual update ``[..., width]`` of the feed-forward half."""

    def remove_heads(self, heads: Sequence[int]) -> None:
        """Take heads out of the weights for good, in place."""


class Host(Protocol):
    """A vision transformer seen as embed, blocks, readout; ``module`` is the model itself."""

    module: nn.Module
    anatomy: Anatomy
    heads_removable: bool
    blocks: Sequence[HostBlock]

    def embed(self, images: Tensor) -> Tensor:
        """The token stream ``[images, tokens, width]`` that enters the first block."""

    def readout(self, prefix: Tensor, patch_mean: Tensor | None) -> Tensor:
        """Logits from *normed* prefix rows ``[images, prefix, width]`` and, for pooling hosts, the patches' mean ``[images, width]``."""

    def norm(self, stream: Tensor) -> Tensor:
        """The host's final norm, on rows."""
