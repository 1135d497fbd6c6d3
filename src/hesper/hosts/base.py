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
    normalised and rotated where the host does so.
    """

    normed: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class HostBlock(Protocol):
    """One transformer block, taken apart into the host's own submodules; every method works on rows.

    ``place`` says at which place of its image's embedded tokens each row began; a block that rotates queries and keys by place
    needs it unless the rows are ``[..., tokens, width]`` as they were embedded. Other blocks do not read it.
    """

    @property
    def heads(self) -> int:
        """Number of attention heads this block has now."""

    @property
    def scale(self) -> float:
        """Factor on the attention logits."""

    @property
    def attention(self) -> nn.Module:
        """The submodule that holds the weights of the heads."""

    def normed(self, stream: Tensor) -> Tensor:
        """The norm that ``[..., width]`` rows pass before queries, keys and values are made of them."""

    def project(self, stream: Tensor, place: Tensor | None = None) -> Projected:
        """Norm, queries, keys and values of ``[..., width]`` rows at ``place`` ``[...]``."""

    def project_readers(self, stream: Tensor, readers: Tensor, place: Tensor | None = None) -> Projected:
        """As :meth:`project`, with queries for the ``readers`` rows only: prefix rows ``[..., width]`` of any other leading shape."""

    def merge_heads(self, mixed: Tensor) -> Tensor:
        """The residual update ``[..., width]`` from attention outputs ``[..., heads * head_dim]``."""

    def feed(self, stream: Tensor) -> Tensor:
        """The residual update ``[..., width]`` of the feed-forward half."""

    def remove_heads(self, heads: Sequence[int]) -> None:
        """Take heads out of the weights for good, in place."""

    def separate(self, keys_read: bool) -> None:
        """Give queries, keys and values a linear layer each, in place, where one makes them all; the host's own forward is then lost.

        Runtimes of exported graphs take longer to cut one product into three than to make three. Biases that attention passes on go to the
        layer behind it, and those of keys, where they add as much to all logits of a query, nowhere, unless the keys themselves are read.
        """

    def without_heads(self, heads: Sequence[int]) -> HostBlock:
        """A block like this one in which heads have left a copy of the attention weights; it shares all else with this one."""


class Host(Protocol):
    """A vision transformer seen as embed, blocks, readout; ``module`` is the model itself, from images to logits.

    ``library`` is where it comes from ("timm" or "hf"); ``reads_places`` says whether its blocks rotate by place.
    """

    module: nn.Module
    library: str
    anatomy: Anatomy
    heads_removable: bool
    reads_places: bool
    blocks: Sequence[HostBlock]

    def embed(self, images: Tensor) -> Tensor:
        """The token stream ``[images, tokens, width]`` that enters the first block."""

    def readout(self, prefix: Tensor, patches: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """Logits ``[images, classes]`` from *normed* rows.

        Args:
            prefix: ``[images, prefix, width]``.
            patches: ``[images, patches, width]`` where the classifier reads them, else None.
            weight: ``[images, patches]``, how many tokens each patch row counts for (0 where there is none); None where all count once.
        """

    def norm(self, stream: Tensor) -> Tensor:
        """The host's final norm, on rows."""
