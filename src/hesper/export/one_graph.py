"""A grafted model as one graph of tensors: the same decisions on a rectangle of tokens, for runtimes that execute graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.export.matching import join, kept_after, pick, ranks, sort_by
from hesper.graft import GraftedViT
from hesper.graft.deciders import LARGEST_LOG_CURVATURE, CurvatureMerge, KeyMerge, ReaderAttention, RoutedSensitivity, ScoredCut
from hesper.graft.linkage import share
from hesper.graft.restoration import Restoration
from hesper.graft.tokens import INFINITY, similarity_prices, ward_prices
from hesper.hosts.base import HostBlock, Projected
from hesper.plan import TokenCut

__all__ = ["OneGraphViT", "check_exportable"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A rectangle of tokens: ``rows`` ``[images, n, width]``, ``size`` ``[images, n]`` (None: all one), ``place`` likewise where read."""

    rows: Tensor
    size: Tensor | None = None
    place: Tensor | None = None


def check_exportable(cut: GraftedViT) -> None:
    """UsageError, with the alternative, where a model decides what no graph can."""
    plan = cut.plan
    if plan.gates:
        raise UsageError(
            "Heads that sit out image by image choose other weights for every image, which no exported graph can; prune with "
            "--heads static or --heads none."
        )
    for decider in cut.deciders.values():
        if isinstance(decider, ScoredCut) and not isinstance(decider.score, (ReaderAttention, RoutedSensitivity)):
            raise UsageError(f"The criterion '{plan.pricing.criterion if plan.pricing else 'random'}' is a control and is not exported.")


class OneGraphViT(nn.Module):
    """``model(images)`` gives the logits of ``cut(images)``, in operators that graphs have; tokens are not packed.

    Plans of fixed counts take any number of images; where counts adapt, one image at a time. Images are taken, and logits given, in the
    same precision, whatever that of the weights; decisions are taken in single precision.

    Args:
        cut: the model to run; its parts are shared.

    Raises:
        UsageError: it decides what no graph can.

    Example:
        >>> import timm
        >>> from hesper.graft import graft
        >>> from hesper.hosts import open_host
        >>> from hesper.plan import empty_plan
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> plan = replace(empty_plan("test_vit", open_host(model).anatomy), tokens=(TokenCut(1, "merge", remove=9),))
        >>> cut, images = graft(model, plan), torch.randn(2, 3, 160, 160)
        >>> torch.allclose(OneGraphViT(cut)(images), cut(images), atol=1e-5)
        True
    """

    def __init__(self, cut: GraftedViT) -> None:
        super().__init__()
        check_exportable(cut)
        self.cut = cut
        self.plan = cut.plan

    @property
    def fixed(self) -> bool:
        """Whether every image keeps as many tokens as any other."""
        return all(own.remove is not None for own in self.plan.tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, classes]``."""
        like = next(self.cut.network.parameters()).dtype
        return self._run(images.to(like)).to(images.dtype)

    def _run(self, images: Tensor) -> Tensor:
        cut, host, anatomy = self.cut, self.cut.host, self.plan.model.anatomy
        if cut.untouched:
            return cast(Tensor, cut.network(images))
        rows = host.embed(images)
        place = torch.arange(anatomy.tokens, device=rows.device).expand(rows.shape[0], -1) if host.reads_places else None
        if cut.order is not None:
            order = torch.cat([torch.arange(anatomy.prefix_tokens, device=rows.device), cut.order + anatomy.prefix_tokens])
            rows, place = rows.index_select(1, order), None if place is None else place.index_select(1, order)
        tokens = Tokens(rows, place=place)
        last = anatomy.depth - 1
        for index, block in enumerate(host.blocks):
            if index < last or not self.plan.skip_unread:
                tokens = self._through(index, block, tokens)
        if self.plan.skip_unread:
            return self._read_prefix(host.blocks[last], tokens)
        normed, prefix = host.norm(tokens.rows), anatomy.prefix_tokens
        if not anatomy.reads_patches:
            return host.readout(normed[:, :prefix], None)
        return host.readout(normed[:, :prefix], normed[:, prefix:], None if tokens.size is None else tokens.size[:, prefix:].to(normed.dtype))

    def _through(self, index: int, block: HostBlock, tokens: Tokens) -> Tokens:
        projected = block.project(tokens.rows, tokens.place)
        log_size = self._log_size(index, tokens)
        rows = tokens.rows + block.merge_heads(_attend(projected, log_size, block.scale))
        tokens = replace(tokens, rows=rows)
        if str(index) in self.cut.deciders:
            tokens = self._decide(self.cut.deciders[str(index)], projected, log_size, tokens, block.scale)
        return replace(tokens, rows=tokens.rows + block.feed(tokens.rows))

    def _read_prefix(self, block: HostBlock, tokens: Tokens) -> Tensor:
        prefix = tokens.rows[:, : self.plan.model.anatomy.prefix_tokens]
        projected = block.project_readers(tokens.rows, prefix, tokens.place)
        log_size = self._log_size(self.plan.model.anatomy.depth - 1, tokens)
        prefix = prefix + block.merge_heads(_attend(projected, log_size, block.scale))
        return self.cut.host.readout(self.cut.host.norm(prefix + block.feed(prefix)), None)

    def _log_size(self, index: int, tokens: Tokens) -> Tensor | None:
        """``[images, 1 or heads, n]``."""
        if tokens.size is None:
            return None
        log, power = tokens.size.log()[:, None], self.cut._size_power(index)
        return log if power is None else log * power[:, None].to(log.dtype)

    def _decide(self, decider: nn.Module, projected: Projected, log_size: Tensor | None, tokens: Tokens, scale: float) -> Tokens:
        """What the block's decider lets go, in single precision."""
        prefix = self.plan.model.anatomy.prefix_tokens
        size = torch.ones_like(tokens.rows[..., 0], dtype=torch.float32) if tokens.size is None else tokens.size
        attention = _reader_attention(projected, log_size, scale, prefix) if cast(Any, decider).reads_attention else None
        if isinstance(decider, ScoredCut):
            return self._scored(decider, projected, attention, replace(tokens, size=size), tokens.size is None)
        if isinstance(decider, KeyMerge):
            places, log_weight = projected.key.float().mean(2)[:, prefix:], None
        else:
            curved = cast(CurvatureMerge, decider)
            places = (tokens.rows.float() @ curved.root.float())[:, prefix:]
            log_weight = curved.gamma * _routed(curved.router, projected.normed, attention)[:, prefix:].clamp(
                -LARGEST_LOG_CURVATURE, LARGEST_LOG_CURVATURE
            )
        rounds = decider.rounds if isinstance(decider, CurvatureMerge) else 1
        return self._linked(cast(Any, decider).cut, rounds, places, log_weight, replace(tokens, size=size), cast(Any, decider).restoration)

    def _linked(
        self, cut: TokenCut, rounds: int, points: Tensor, log_weight: Tensor | None, tokens: Tokens, restoration: Restoration | None
    ) -> Tokens:
        """Merging in rounds: everything that is averaged is carried as a sum over what has merged, next to the sum of sizes."""
        prefix, width, rank = self.plan.model.anatomy.prefix_tokens, tokens.rows.shape[-1], points.shape[-1]
        assert tokens.size is not None
        rows, size = tokens.rows[:, prefix:].float(), tokens.size[:, prefix:, None]
        log_weight = torch.zeros_like(size) if log_weight is None else log_weight[..., None]
        place = torch.zeros_like(size) if tokens.place is None else tokens.place[:, prefix:, None]
        own = torch.cat([rows, rows.norm(dim=-1, keepdim=True), points, log_weight], -1) * size
        sums = torch.cat([own, size, torch.ones_like(size)], -1)
        for number in range(rounds):
            size = sums[..., -2:-1]
            means = sums[..., width + 1 : -2] / size
            if isinstance(restoration, Restoration):
                price, to = ward_prices(means[..., :rank], size[..., 0], means[..., -1].exp())
            else:
                price, to = similarity_prices(means[..., :rank])
            dearest = sort_by(price)
            stay = self._staying(cut, price, number, rounds, tokens.rows.shape[1] if number == 0 else sums.shape[1] + prefix)
            sums, places = join(sums, dearest, to, stay, cut.remove is not None)
            place = pick(place, places)  # a token that others join stays where it is
        size, members = sums[..., -2:-1], sums[..., -1:]
        mean, length = sums[..., :width] / size, sums[..., width : width + 1] / size
        if restoration is not None:
            mean = torch.where(members > 1, restoration(mean, length), mean)
        left = torch.cat([tokens.rows[:, :prefix], mean.to(tokens.rows.dtype)], 1)
        sizes = torch.cat([tokens.size[:, :prefix], size[..., 0]], 1)
        embedded = None if tokens.place is None else torch.cat([tokens.place[:, :prefix], place[..., 0]], 1)
        return Tokens(left, sizes, embedded)

    def _staying(self, cut: TokenCut, price: Tensor, number: int, rounds: int, tokens: int) -> int:
        """How many candidates stay: known, or for one image as its prices say."""
        candidates = price.shape[1]
        if cut.remove is not None:
            return candidates - min(share(cut.remove, number, rounds), candidates)
        assert cut.threshold is not None
        many = (price[0] < cut.threshold).sum()
        over = many - tokens
        # The remainder by a floor: not every runtime has one of whole numbers.
        over = over - cut.multiple * torch.floor(over.to(torch.float32) / cut.multiple).to(torch.int64)
        stay = (candidates - many + torch.minimum(over, many)).item()
        torch._check(stay >= 0)
        torch._check(stay <= candidates)
        return cast(int, stay)

    def _scored(self, decider: ScoredCut, projected: Projected, attention: Tensor | None, tokens: Tokens, whole: bool) -> Tokens:
        """Drop what scores low, or average it into the kept token of the most similar key."""
        prefix, score, cut = self.plan.model.anatomy.prefix_tokens, decider.score, decider.cut
        assert tokens.size is not None
        if isinstance(score, RoutedSensitivity):
            price = _routed(score.router, projected.normed, attention).clamp_max(80.0).exp() * tokens.size
        else:
            assert attention is not None
            price = attention.exp().mean(-1) * tokens.size
        price = price[:, prefix:]
        dearest = sort_by(price)
        stay = self._staying(cut, price, 0, 1, tokens.rows.shape[1])
        kept = kept_after(dearest, stay)
        lead = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        where = torch.cat([lead, kept + prefix], 1)
        place = None if tokens.place is None else pick(tokens.place, where)
        if cut.combine == "drop":
            return Tokens(pick(tokens.rows, where), None if whole else pick(tokens.size, where), place)
        keys = nn.functional.normalize(projected.key.float().mean(2)[:, prefix:], dim=-1)
        gone = ranks(dearest) >= stay
        likeness = (keys @ keys.transpose(-2, -1)).masked_fill(gone[:, None], -INFINITY)
        arrives = (likeness.argmax(-1)[:, None] == kept[..., None]) & gone[:, None]
        own = torch.cat([tokens.rows.float()[:, prefix:], torch.ones_like(tokens.rows[:, prefix:, :1], dtype=torch.float32)], -1)
        own = own * tokens.size[:, prefix:, None]
        sums = pick(own, kept) + arrives.to(own.dtype) @ own
        left = torch.cat([tokens.rows[:, :prefix], (sums[..., :-1] / sums[..., -1:]).to(tokens.rows.dtype)], 1)
        return Tokens(left, torch.cat([tokens.size[:, :prefix], sums[..., -1]], 1), place)


def _attend(projected: Projected, log_size: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + log size) v, ``[images, queries, heads * head_dim]``; sizes count in single precision."""
    query, key, value = (part.transpose(1, 2) for part in (projected.query, projected.key, projected.value))
    logits = (query * scale) @ key.transpose(-2, -1)
    if log_size is not None:
        logits = logits + log_size[:, :, None].to(logits.dtype)
    mixed = logits.softmax(-1) @ value
    return mixed.transpose(1, 2).flatten(2)


def _reader_attention(projected: Projected, log_size: Tensor | None, scale: float, prefix: int) -> Tensor:
    """As :func:`hesper.graft.attention.reader_attention`, ``[images, n, heads]``, in single precision."""
    query, key = projected.query.float(), projected.key.float()
    reader = query[:, :1] if prefix else query.mean(1, keepdim=True)
    logits = (key * (reader * scale)).sum(-1)
    if log_size is None:
        return logits.log_softmax(1)
    bias = log_size.transpose(1, 2)
    return (logits + bias).log_softmax(1) - bias


def _routed(router: Callable[..., Tensor], normed: Tensor, attention: Tensor | None) -> Tensor:
    """A router's prediction ``[images, n]``, in single precision."""
    own = cast(Any, router)
    assert attention is not None
    return normed.float() @ own.direction.float() + attention @ own.attention.float() + own.offset.float()
