"""Which tokens leave a block, decided from what the block has just computed. One decider per cut block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hesper.graft.layout import Layout
from hesper.graft.tokens import INFINITY, cheapest, similarity_prices, ward_prices
from hesper.measure.macs import Counts
from hesper.plan import TokenCut

LARGEST_LOG_CURVATURE = 6.0


@dataclass(frozen=True)
class State:
    """A block after its attention half: packed rows, their sizes, and what attention computed on the way.

    ``stream`` and ``normed`` are ``[rows, width]`` (after the residual sum, and the attention's normalised input), ``key`` and
    ``value`` ``[rows, heads, head_dim]``, ``attention`` ``[rows, heads]`` the log of the reader's attention per unit of size
    (the class token, or the mean query where there is none), ``size`` ``[rows]``.
    """

    stream: Tensor
    normed: Tensor
    key: Tensor
    value: Tensor
    attention: Tensor
    size: Tensor
    layout: Layout


@dataclass(frozen=True)
class Decision:
    """What leaves: ``gone`` ``[images, most patches]`` bool; ``into`` the patch index each merges into, or None for drops."""

    gone: Tensor
    into: Tensor | None


class Decider(Protocol):
    """Decides one block's token cut, and knows what deciding costs."""

    def __call__(self, state: State) -> Decision:
        """The decision for a batch."""

    def macs(self, patches: Counts) -> Counts:
        """MACs spent on deciding for images that have ``patches`` patch tokens."""


class Router(nn.Module):
    """A linear prediction from the normalised token and the reader's attention to it: ``[rows]``.

    log w_i = a . norm(x_i) + b . log attention_i + c, with one attention per head.
    """

    direction: Tensor
    attention: Tensor
    offset: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("direction", "attention", "offset"):
            self.register_buffer(name, weights[f"router.{name}"].clone())

    def forward(self, state: State) -> Tensor:
        """The prediction for every row."""
        return state.normed @ self.direction + state.attention @ self.attention + self.offset

    @property
    def macs_per_token(self) -> int:
        """MACs per token; those of the attention logits, one more ``width``, included."""
        return 2 * self.direction.numel() + self.attention.numel()


class CurvatureMerge(nn.Module):
    """Merge where Ward's linkage in the curvature metric, scaled by the routed token curvature, is cheap (design: metric x token curvature)."""

    root: Tensor

    def __init__(self, cut: TokenCut, gamma: float, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.cut, self.gamma = cut, gamma
        self.register_buffer("root", weights["root"].clone())
        self.router = Router(weights)

    def forward(self, state: State) -> Decision:
        """The decision for a batch."""
        layout = state.layout
        log_weight = self.router(state).clamp(-LARGEST_LOG_CURVATURE, LARGEST_LOG_CURVATURE)
        points = torch.cat([state.stream @ self.root, (self.gamma * log_weight).exp()[:, None], state.size[:, None]], -1)
        padded = layout.padded(points)
        price, to = ward_prices(padded[..., :-2], padded[..., -1], padded[..., -2], layout.valid)
        return _bipartite(price, to, self.cut, layout)

    def macs(self, patches: Counts) -> Counts:
        """MACs spent on deciding: metric, router, reader attention, distances."""
        width, rank = self.root.shape
        pairs = (patches // 2) * ((patches + 1) // 2)
        return patches * (width * rank + self.router.macs_per_token) + pairs * rank


class KeyMerge(nn.Module):
    """Merge tokens whose keys, averaged over heads, are most alike (ToMe, arXiv 2210.09461)."""

    def __init__(self, cut: TokenCut, head_dim: int) -> None:
        super().__init__()
        self.cut, self.head_dim = cut, head_dim

    def forward(self, state: State) -> Decision:
        """The decision for a batch."""
        price, to = similarity_prices(state.layout.padded(state.key.mean(1)), state.layout.valid)
        return _bipartite(price, to, self.cut, state.layout)

    def macs(self, patches: Counts) -> Counts:
        """MACs spent on the similarities."""
        return (patches // 2) * ((patches + 1) // 2) * self.head_dim


class Score(nn.Module):
    """A price per token ``[rows]``, and what it costs."""

    macs_per_token: int = 0

    def forward(self, state: State) -> Tensor:
        """The price of every row."""
        raise TypeError("a score must say how it is computed")


class RoutedSensitivity(Score):
    """The loss deleting a token causes, in nats, as the router predicts it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.router = Router(weights)
        self.macs_per_token = self.router.macs_per_token

    def forward(self, state: State) -> Tensor:
        """exp of the routed log sensitivity, times the size of the token."""
        out: Tensor = self.router(state).exp()
        return out


class ReaderAttention(Score):
    """The reader's attention, averaged over heads (EViT, arXiv 2202.07800)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.macs_per_token = width

    def forward(self, state: State) -> Tensor:
        """Attention mass per token."""
        return state.attention.exp().mean(-1) * state.size


class RandomScore(Score):
    """The control: prices drawn from a generator seeded by the block, the same for every image."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, state: State) -> Tensor:
        """A uniform price for every row, a function of the token's place in its image."""
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.rand(max(state.layout.counts), generator=generator).to(state.stream.device)
        return torch.cat([table[:count] for count in state.layout.counts])


class ScoredCut(nn.Module):
    """Drop the tokens of lowest score, or average them into the kept token whose key is most alike."""

    def __init__(self, cut: TokenCut, score: Score, head_dim: int) -> None:
        super().__init__()
        self.cut, self.score, self.head_dim = cut, score, head_dim

    def forward(self, state: State) -> Decision:
        """The decision for a batch."""
        layout = state.layout
        price = layout.padded(self.score(state)).masked_fill(~layout.valid, INFINITY)
        gone = _leave_one(cheapest(price, threshold=self.cut.threshold, remove=self.cut.remove), price, layout)
        if self.cut.combine == "drop":
            return Decision(gone, None)
        keys = nn.functional.normalize(layout.padded(state.key.mean(1)), dim=-1)
        likeness = keys @ keys.transpose(-2, -1)
        return Decision(gone, likeness.masked_fill((gone | ~layout.valid)[:, None], -INFINITY).argmax(-1))

    def macs(self, patches: Counts) -> Counts:
        """MACs spent on scores and, for merging, similarities."""
        likeness = patches * patches * self.head_dim if self.cut.combine == "merge" else 0
        return patches * self.score.macs_per_token + likeness


def _bipartite(price: Tensor, to: Tensor, cut: TokenCut, layout: Layout) -> Decision:
    """Spread a decision about the sources (odd patches) over all patches."""
    images, most = layout.valid.shape
    gone = torch.zeros(images, most, dtype=torch.bool, device=price.device)
    into = torch.zeros(images, most, dtype=torch.long, device=price.device)
    gone[:, 1::2] = cheapest(price, threshold=cut.threshold, remove=cut.remove) & price.isfinite()
    into[:, 1::2] = to
    return Decision(gone, into if cut.combine == "merge" else None)


def _leave_one(gone: Tensor, price: Tensor, layout: Layout) -> Tensor:
    """Keep the dearest token of an image all of whose patches would go: pooling readers need one."""
    nothing_left = (gone | ~layout.valid).all(-1, keepdim=True)
    dearest = torch.zeros_like(gone).scatter(-1, price.masked_fill(~layout.valid, -INFINITY).argmax(-1, keepdim=True), True)
    return gone & ~(nothing_left & dearest)
