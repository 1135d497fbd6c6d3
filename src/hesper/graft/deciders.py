"""Which tokens leave a block, decided from what the block has just computed. One decider per cut block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hesper.cost import Counts
from hesper.graft.decision import Decision
from hesper.graft.even import EvenDecision
from hesper.graft.layout import Layout
from hesper.graft.linkage import Points, evenly_paired, link, paired
from hesper.graft.matching import WardPrices
from hesper.graft.restoration import Restoration
from hesper.graft.tokens import INFINITY, cheapest, in_steps, similarity_prices
from hesper.plan import TokenCut
from hesper.precision import wide

LARGEST_LOG_CURVATURE = 6.0
LARGEST_LOG_PRICE = 80.0  # prices stay finite, below the infinity of what is not there


@dataclass(frozen=True)
class State:
    """A block after its attention half: packed rows, their sizes, and what attention computed on the way.

    ``stream`` and ``normed`` are ``[rows, width]`` (after the residual sum, and the attention's normalised input), ``key`` and
    ``value`` ``[rows, heads, head_dim]``, ``attention`` ``[rows, heads]`` the log of the reader's attention per unit of size
    (the class token, or the mean query where there is none; ``[rows, 0]`` for deciders that do not read it), ``size`` ``[rows]``.
    Heads that sat out have what :class:`~hesper.graft.gates.Gate` says; deciders that do not read keys may then see none.
    """

    stream: Tensor
    normed: Tensor
    key: Tensor
    value: Tensor
    attention: Tensor
    size: Tensor
    layout: Layout


class Decider(Protocol):
    """Decides one block's token cut, and knows what deciding costs."""

    @property
    def reads_attention(self) -> bool:
        """Whether the decision needs the reader's attention; whoever computes that counts its MACs."""

    @property
    def reads_keys(self) -> bool:
        """Whether the decision needs keys or values."""

    @property
    def restoration(self) -> Restoration | None:
        """What merged tokens get back, None where they stay what averaging made of them."""

    @property
    def checkered(self) -> bool:
        """Whether it wants neighbouring patches at odd and even places."""

    def __call__(self, state: State) -> Decision | EvenDecision:
        """The decision for a batch."""

    def prices(self, state: State) -> tuple[Tensor, Tensor | None]:
        """Prices of the candidates ``[images, candidates]``, infinite where there is none, and where each would merge if that is known."""

    def macs(self, entered: Counts, prefix: int) -> Counts:
        """MACs spent on deciding, ``[images]``, where ``entered`` ``[rounds, images]`` tokens took part, ``prefix`` of them prefix tokens.

        What the image itself needs: in a ragged batch the pairs of smaller images are padded to the largest.
        """


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
        normed, attention = (
            state.normed.to(self.direction.dtype),
            state.attention.to(self.direction.dtype),
        )  # which autocast may have changed
        return torch.addmv(torch.addmv(self.offset, normed, self.direction), attention, self.attention)

    @property
    def macs_per_token(self) -> int:
        """MACs per token, prefix tokens included; the attention logits are counted by whoever computes them."""
        return self.direction.numel() + self.attention.numel()


class CurvatureMerge(nn.Module):
    """Merge where Ward's linkage in the curvature metric, scaled by the routed token curvature, is cheap, in rounds."""

    root: Tensor
    reads_attention = True
    reads_keys = False
    checkered = True

    def __init__(self, cut: TokenCut, gamma: float, rounds: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.cut, self.gamma, self.rounds = cut, gamma, rounds
        self.register_buffer("root", weights["root"].clone())
        self.router = Router(weights)
        self.restoration = Restoration(self.root.shape[0], weights)
        self.graph_prices = WardPrices(self.root.shape[1])

    def points(self, state: State) -> Points:
        """Where every token lies, and how much moving it matters."""
        log_weight = self.router(state).clamp(-LARGEST_LOG_CURVATURE, LARGEST_LOG_CURVATURE)
        return Points(state.stream.to(self.root.dtype) @ self.root, state.size, self.gamma * log_weight, state.layout)

    def prices(self, state: State) -> tuple[Tensor, Tensor]:
        """Nats of merging each source ``[images, sources]`` in the first round, and the patch it would merge into."""
        return self.points(state).prices()

    def forward(self, state: State) -> Decision | EvenDecision:
        """The decision for a batch."""
        return link(self.points(state), self.cut, self.rounds)

    def macs(self, entered: Counts, prefix: int) -> Counts:
        """MACs spent on deciding: metric and router for every row, distances of sources to destinations, moving what merged early."""
        width, rank = self.root.shape
        first, pair = entered[0], rank + 2  # a squared distance is one product of so many numbers
        deciding: Counts = first * (width * rank + self.router.macs_per_token) + _pairs(first - prefix) * pair
        for before, tokens in zip(entered, entered[1:], strict=False):
            again: Counts = _pairs(tokens - prefix) * pair + (before - tokens) * (rank + 1)
            deciding += np.where(tokens < before, again, 0)  # where nothing has merged the prices stay as they are
        return deciding


class KeyMerge(nn.Module):
    """Merge tokens whose keys, averaged over heads, are most alike (ToMe, arXiv 2210.09461)."""

    reads_attention = False
    reads_keys = True
    restoration = None
    checkered = False

    def __init__(self, cut: TokenCut, head_dim: int) -> None:
        super().__init__()
        self.cut, self.head_dim = cut, head_dim

    def prices(self, state: State) -> tuple[Tensor, Tensor]:
        """One minus the cosine of each source ``[images, sources]`` to the patch it would merge into, and that patch."""
        return similarity_prices(state.layout.padded(_mean_key(state)), state.layout.gaps)

    def forward(self, state: State) -> Decision | EvenDecision:
        """The decision for a batch."""
        (price, to), layout = self.prices(state), state.layout
        if self.cut.remove is not None and layout.rectangular:
            return evenly_paired(price, to, self.cut.remove, layout, first=1, step=2)
        go = cheapest(price, threshold=self.cut.threshold, remove=self.cut.remove)
        if layout.gaps is not None:
            go &= layout.valid[:, 1::2]
        go = in_steps(go, price, layout.lengths, self.cut.multiple)
        return paired(go, to, layout, first=1, step=2)

    def macs(self, entered: Counts, prefix: int) -> Counts:
        """MACs spent on the similarities."""
        return _pairs(entered[0] - prefix) * self.head_dim


class Score(nn.Module):
    """A price per token ``[rows]``, what it costs, and whether it needs the reader's attention."""

    macs_per_token: int = 0
    reads_attention: bool = True

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
        log_price: Tensor = self.router(state).clamp_max(LARGEST_LOG_PRICE)
        return log_price.exp() * state.size


class ReaderAttention(Score):
    """The reader's attention, averaged over heads (EViT, arXiv 2202.07800)."""

    def forward(self, state: State) -> Tensor:
        """Attention mass per token."""
        return state.attention.exp().mean(-1) * state.size


class RandomScore(Score):
    """The control: prices drawn once from a seed, for each place in an image; the same for every image and every batch."""

    reads_attention = False
    table: Tensor

    def __init__(self, seed: int, tokens: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(tokens, generator=torch.Generator().manual_seed(seed)))

    def forward(self, state: State) -> Tensor:
        """A uniform price for every row, a function of the token's place in its image."""
        return torch.cat([self.table[:count] for count in state.layout.counts])


class ScoredCut(nn.Module):
    """Drop the tokens of lowest score, or average them into the kept token whose key is most alike."""

    restoration = None
    checkered = False

    def __init__(self, cut: TokenCut, score: Score, head_dim: int) -> None:
        super().__init__()
        self.cut, self.score, self.head_dim = cut, score, head_dim

    @property
    def reads_attention(self) -> bool:
        """Whether the score does."""
        return self.score.reads_attention

    @property
    def reads_keys(self) -> bool:
        """Whether it looks for a kept token of like key."""
        return self.cut.combine == "merge"

    def prices(self, state: State) -> tuple[Tensor, None]:
        """The score of every patch ``[images, patches]``; where it merges depends on what else goes."""
        return state.layout.padded(self.score(state)).masked_fill(~state.layout.valid, INFINITY), None

    def forward(self, state: State) -> Decision | EvenDecision:
        """The decision for a batch."""
        layout, (price, _) = state.layout, self.prices(state)
        gone = cheapest(price, threshold=self.cut.threshold, remove=self.cut.remove) & layout.valid
        gone = in_steps(_leave_one(gone, price, layout), price, layout.lengths, self.cut.multiple)
        if self.cut.combine == "drop":
            return paired(gone, None, layout)
        keys = nn.functional.normalize(layout.padded(_mean_key(state)), dim=-1)
        likeness = keys @ keys.transpose(-2, -1)
        return paired(gone, likeness.masked_fill((gone | ~layout.valid)[:, None], -INFINITY).argmax(-1), layout)

    def macs(self, entered: Counts, prefix: int) -> Counts:
        """MACs spent on scores and, for merging, similarities of all patches to all."""
        tokens: Counts = entered[0]
        likeness = (tokens - prefix) ** 2 * self.head_dim if self.cut.combine == "merge" else 0
        return tokens * self.score.macs_per_token + likeness


def _mean_key(state: State) -> Tensor:
    """``[rows, head_dim]`` over heads, in single precision at least."""
    return wide(state.key).mean(1)


def _pairs(patches: Counts) -> Counts:
    """Sources times destinations among alternate tokens."""
    return (patches // 2) * ((patches + 1) // 2)


def _leave_one(gone: Tensor, price: Tensor, layout: Layout) -> Tensor:
    """Keep the dearest token of an image all of whose patches would go: pooling readers need one."""
    nothing_left = (gone | ~layout.valid).all(-1, keepdim=True)
    dearest = torch.zeros_like(gone).scatter(-1, price.masked_fill(~layout.valid, -INFINITY).argmax(-1, keepdim=True), True)
    return gone & ~(nothing_left & dearest)
