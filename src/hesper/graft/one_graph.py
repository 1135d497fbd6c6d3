"""A grafted model as one graph of tensors: the same decisions on a rectangle of tokens, for compilers and runtimes that take graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft import GraftedViT
from hesper.graft.deciders import (
    LARGEST_LOG_CURVATURE,
    LARGEST_LOG_PRICE,
    CurvatureMerge,
    KeyMerge,
    ReaderAttention,
    RoutedSensitivity,
    ScoredCut,
)
from hesper.graft.linkage import share
from hesper.graft.matching import (
    and_one,
    ascending,
    dearest_first,
    fates,
    gathering,
    pick,
    ranks,
    stayers,
)
from hesper.graft.ragged import HALVES
from hesper.graft.restoration import Restoration
from hesper.graft.tokens import INFINITY, alternate_unlikeness
from hesper.hosts.base import HostBlock, Projected
from hesper.plan import TokenCut
from hesper.precision import wide

__all__ = ["COMPILE_MODES", "OneGraphViT", "Tokens", "check_one_graph", "compile_mode", "compiled", "separated"]

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A rectangle of tokens: ``rows`` ``[images, n, width]``, ``size`` ``[images, n]`` (None: all one), ``place`` likewise where read."""

    rows: Tensor
    size: Tensor | None = None
    place: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Merge:
    """``fate`` ``[images, n]`` says at which place of the ``left`` what stands for a token is, ``place`` where those that stay began."""

    fate: Tensor
    left: int
    place: Tensor | None

    def gathering(self, dtype: torch.dtype) -> Tensor:
        """``[images, left, n]``."""
        return gathering(self.fate, self.left).to(dtype)

    def then(self, later: Merge) -> Merge:
        """Both merges as one, where ``later`` was decided on what this one leaves."""
        return Merge(later.fate.gather(1, self.fate.to(torch.int64)), later.left, later.place)


def check_one_graph(cut: GraftedViT) -> None:
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
    same precision, whatever that of the weights; decisions are taken in single precision. Rows are added up by a product with zeros and
    ones, which no count of multiply-accumulates holds; where products are shortened (TF32) it shortens the rows that nothing joins, too.

    Args:
        cut: the model to run; its parts are shared.
        fused: leave attention to torch's own operator, which not every runtime of exported graphs has.

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

    def __init__(self, cut: GraftedViT, fused: bool = False) -> None:
        super().__init__()
        check_one_graph(cut)
        self.cut = cut
        self.plan = cut.plan
        # Looked up here once: what traces a graph need not follow names.
        deciders = dict(cut.deciders.items())
        self._deciders = [deciders.get(str(block)) for block in range(cut.plan.model.anatomy.depth)]
        self._fused = fused

    @property
    def fixed(self) -> bool:
        """Whether every image keeps as many tokens as any other."""
        return all(own.remove is not None for own in self.plan.tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, classes]``."""
        if not self.fixed and images.shape[0] != 1:
            raise UsageError("Where counts adapt to the image, a graph takes one image at a time; give them one by one.")
        like = next(self.cut.network.parameters()).dtype
        return self._run(images.to(like)).to(images.dtype)

    def _run(self, images: Tensor) -> Tensor:
        tokens, last = self.begin(images), self.plan.model.anatomy.depth - 1
        for index in range(last if self.plan.skip_unread else last + 1):
            tokens = self.through(index, tokens)
        return self.finish(tokens)

    def begin(self, images: Tensor) -> Tokens:
        """Images to the tokens that enter the first block."""
        cut, host, anatomy = self.cut, self.cut.host, self.plan.model.anatomy
        rows = host.embed(images)
        place = torch.arange(anatomy.tokens, device=rows.device).expand(rows.shape[0], -1) if host.reads_places else None
        if cut.order is not None:
            order = torch.cat([torch.arange(anatomy.prefix_tokens, device=rows.device), cut.order + anatomy.prefix_tokens])
            rows, place = rows.index_select(1, order), None if place is None else place.index_select(1, order)
        return Tokens(rows, place=place)

    def through(self, index: int, tokens: Tokens) -> Tokens:
        """Both halves of a block, and between them what it decides."""
        block = self.cut.host.blocks[index]
        projected = block.project(tokens.rows, tokens.place)
        log_size = self._log_size(index, tokens)
        mixed, mass = _attend(projected, log_size, block.scale, self._fused)
        tokens = replace(tokens, rows=tokens.rows + block.merge_heads(mixed))
        decider = self._deciders[index]
        if decider is not None and cast(Any, decider).cut.remove != 0:
            attention = None
            if cast(Any, decider).reads_attention:
                attention = _reader_attention(projected, mass, log_size, block.scale, self.plan.model.anatomy.prefix_tokens)
            tokens = self._decide(decider, projected, attention, tokens)
        return replace(tokens, rows=tokens.rows + block.feed(tokens.rows))

    def finish(self, tokens: Tokens) -> Tensor:
        """Tokens to logits, through the last block where that computes the prefix alone."""
        host, anatomy = self.cut.host, self.plan.model.anatomy
        if self.plan.skip_unread:
            return self._read_prefix(host.blocks[-1], tokens)
        normed, prefix = host.norm(tokens.rows), anatomy.prefix_tokens
        if not anatomy.reads_patches:
            return host.readout(normed[:, :prefix], None)
        return host.readout(normed[:, :prefix], normed[:, prefix:], None if tokens.size is None else tokens.size[:, prefix:])

    def _read_prefix(self, block: HostBlock, tokens: Tokens) -> Tensor:
        prefix = tokens.rows[:, : self.plan.model.anatomy.prefix_tokens]
        projected = block.project_readers(tokens.rows, prefix, tokens.place)
        log_size = self._log_size(self.plan.model.anatomy.depth - 1, tokens)
        prefix = prefix + block.merge_heads(_attend(projected, log_size, block.scale, self._fused)[0])
        return self.cut.host.readout(self.cut.host.norm(prefix + block.feed(prefix)), None)

    def _log_size(self, index: int, tokens: Tokens) -> Tensor | None:
        """``[images, 1 or heads, 1, n]``."""
        if tokens.size is None:
            return None
        log = tokens.size.log()[:, None, None]
        return log if self.cut.plain_sizes else log * self.cut.powers(index)[:, None, None].to(log.dtype)

    def _decide(self, decider: nn.Module, projected: Projected, attention: Tensor | None, tokens: Tokens) -> Tokens:
        """What the block's decider lets go, in single precision."""
        with _without_autocast(tokens.rows.device.type):
            if isinstance(decider, ScoredCut):
                return self._scored(decider, projected, attention, tokens)
            if isinstance(decider, KeyMerge):
                return self._alike(decider.cut, projected, tokens)
            return self._linked(cast(CurvatureMerge, decider), projected, attention, tokens)

    def _alike(self, cut: TokenCut, projected: Projected, tokens: Tokens) -> Tokens:
        """Merging by the likeness of keys."""
        price, to = alternate_unlikeness(wide(projected.key).mean(2)[:, self.plan.model.anatomy.prefix_tokens :]).min(-1)
        return self._merged(self._round(cut, price, to, tokens.rows.shape[1], 0, 1, tokens.place), tokens, None)

    def _linked(self, curved: CurvatureMerge, projected: Projected, attention: Tensor | None, tokens: Tokens) -> Tokens:
        """Merging by curvature in rounds: later ones price what earlier ones merged, rows move once."""
        cut, rounds, prices = curved.cut, curved.rounds, curved.graph_prices
        limit = min(
            LARGEST_LOG_CURVATURE * curved.gamma, LARGEST_LOG_PRICE / 2
        )  # times distances still a number: infinity times zero is none
        size = None if tokens.size is None else tokens.size[..., None]
        log_weight = _routed(curved.router, projected.normed, attention, curved.gamma).clamp(-limit, limit)
        traits = prices.traits(wide(tokens.rows) @ wide(curved.root), log_weight, size)
        merge, place = None, tokens.place
        for number in range(rounds):
            if cut.remove is not None and share(cut.remove, number, rounds) == 0:
                break
            price, to = prices(traits, self.plan.model.anatomy.prefix_tokens)
            own = self._round(cut, price, to, traits.shape[1], number, rounds, place)
            if number + 1 < rounds:
                traits, size = prices.merged(traits, size, own.gathering(traits.dtype))
            merge, place = own if merge is None else merge.then(own), own.place
        assert merge is not None
        return self._merged(merge, tokens, curved.restoration)

    def _round(self, cut: TokenCut, price: Tensor, to: Tensor, tokens: int, number: int, rounds: int, place: Tensor | None) -> Merge:
        """One round of matching, of so many ``tokens`` that began at ``place``."""
        prefix, dearest = self.plan.model.anatomy.prefix_tokens, dearest_first(price)
        stay = self._staying(cut, price, number, rounds, tokens)
        if place is not None:  # a token that others join stays where it is
            place = pick(place, stayers(dearest, stay, tokens, prefix))
        return Merge(fates(dearest, to, stay, tokens, prefix), tokens - price.shape[1] + stay, place)

    def _merged(self, merge: Merge, tokens: Tokens, restoration: Restoration | None) -> Tokens:
        """Means of rows, weighted by sizes, that share a fate, and what they get back."""
        rows, size = wide(tokens.rows), None if tokens.size is None else tokens.size[..., None]
        add_up, one = merge.gathering(rows.dtype), torch.ones_like(rows[..., :1])
        # Rows and what is beside them apart: together they are a little wider than what runtimes multiply fast, and are copied first.
        beside = one if restoration is None else and_one(rows.norm(dim=-1, keepdim=True))
        sums, beside = (add_up @ (own if size is None else own * size) for own in (rows, beside))
        length, total = beside[..., :1], beside[..., -1:]
        if restoration is None:
            return Tokens((sums / total).to(tokens.rows.dtype), total[..., 0], merge.place)
        joined = (total if size is None else add_up.sum(-1, keepdim=True)) > 1
        factor = restoration.factor(sums.norm(dim=-1, keepdim=True) / total, length / total)
        # Each row's factor, and that of the gain: one small product instead of a choice for every number.
        each = torch.cat([torch.where(joined, factor, 1.0), torch.where(joined, factor, 0.0)], -1) / total
        gain = restoration.gain.to(each.dtype)
        mean = sums * (each @ torch.stack([torch.ones_like(gain), gain]))
        return Tokens(mean.to(tokens.rows.dtype), total[..., 0], merge.place)

    def _staying(self, cut: TokenCut, price: Tensor, number: int, rounds: int, tokens: int, least: int = 0) -> int:
        """How many candidates stay, ``least`` at least: known, or for one image as its prices say."""
        candidates = price.shape[1]
        if cut.remove is not None:
            return candidates - min(share(cut.remove, number, rounds), candidates)
        assert cut.threshold is not None
        many = (price[0] < cut.threshold).sum().clamp_max(candidates - least)
        over = many - tokens
        # The remainder by a floor: not every runtime has one of whole numbers.
        over = over - cut.multiple * torch.floor(over.to(torch.float32) / cut.multiple).to(torch.int64)
        stay = (candidates - many + torch.minimum(over, many)).item()
        torch._check(stay >= least)
        torch._check(stay <= candidates)
        return cast(int, stay)

    def _scored(self, decider: ScoredCut, projected: Projected, attention: Tensor | None, tokens: Tokens) -> Tokens:
        """Drop what scores low, or average it into the kept token of the most similar key."""
        prefix, score, cut = self.plan.model.anatomy.prefix_tokens, decider.score, decider.cut
        size = torch.ones_like(wide(tokens.rows[..., 0])) if tokens.size is None else tokens.size
        if isinstance(score, RoutedSensitivity):
            price = _routed(score.router, projected.normed, attention)[..., 0].clamp_max(LARGEST_LOG_PRICE).exp() * size
        else:
            assert attention is not None
            price = attention.exp().mean(-1) * size
        price = price[:, prefix:]
        dearest = dearest_first(price)
        stay = self._staying(cut, price, 0, 1, tokens.rows.shape[1], least=1)  # pooling readers need one
        kept = ascending(dearest.narrow(1, 0, stay))
        lead = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        where = torch.cat([lead, kept + prefix], 1)
        place = None if tokens.place is None else pick(tokens.place, where)
        if cut.combine == "drop":
            return Tokens(pick(tokens.rows, where), None if tokens.size is None else pick(tokens.size, where), place)
        keys = nn.functional.normalize(wide(projected.key).mean(2)[:, prefix:], dim=-1)
        gone = ranks(dearest) >= stay
        likeness = (keys @ keys.transpose(-2, -1)).masked_fill(gone[:, None], -INFINITY)
        arrives = (likeness.argmax(-1)[:, None] == kept[..., None]) & gone[:, None]
        own = torch.cat([wide(tokens.rows)[:, prefix:], torch.ones_like(price[..., None])], -1) * size[:, prefix:, None]
        sums = pick(own, kept) + arrives.to(own.dtype) @ own
        left = torch.cat([tokens.rows[:, :prefix], (sums[..., :-1] / sums[..., -1:]).to(tokens.rows.dtype)], 1)
        return Tokens(left, torch.cat([size[:, :prefix], sums[..., -1]], 1), place)


def separated(cut: GraftedViT) -> GraftedViT:
    """``cut`` itself, its blocks changed in place to what graphs are soonest made of (:meth:`~hesper.hosts.base.HostBlock.separate`)."""
    blocks = cut.host.blocks
    # By their modules, which blocks may share.
    read = {id(blocks[int(index)].attention) for index, decider in cut.deciders.items() if cast(Any, decider).reads_keys}
    for block in blocks:
        block.separate(keys_read=id(block.attention) in read)
    return cut


def compile_mode(name: str) -> str:
    """``name``, if it is one of :data:`COMPILE_MODES`; UsageError otherwise."""
    if name not in COMPILE_MODES:
        raise UsageError(f"There is no mode '{name}' of torch.compile; use {', '.join(COMPILE_MODES)}.")
    return name


def compiled(model: nn.Module, mode: str = "default") -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of a model, with as few graphs as it can be: one where every image keeps as many tokens as any other.

    Where counts or heads adapt to the image, what every row goes through is compiled and what decides is stepped over. A graph is made
    in the first call, which takes up to a minute, and again for the first other number of images.

    Args:
        model: a grafted model, or a dense one to compare it with.
        mode: one of :data:`COMPILE_MODES`, which are torch's: "reduce-overhead" replays the kernels of a graphics card as they were
            recorded, so that a batch is not held up by starting them one by one; the next call then overwrites the logits.

    Raises:
        UsageError: there is no such mode.

    Example:
        >>> compiled(nn.Identity(), "fastest")
        Traceback (most recent call last):
        hesper.errors.UsageError: There is no mode 'fastest' of torch.compile; use default, reduce-overhead, max-autotune.
    """
    one = _as_one_graph(model) if isinstance(model, GraftedViT) else model
    whole = one is not None
    return cast(Callable[[Tensor], Tensor], torch.compile(model if one is None else one, mode=compile_mode(mode), fullgraph=whole))


def _as_one_graph(cut: GraftedViT) -> OneGraphViT | None:
    try:
        graph = OneGraphViT(cut, fused=True)
    except UsageError:
        return None
    return graph if graph.fixed else None


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Products count tokens here, which halves cannot; graphs that are exported without autocast need not hear of it."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _attend(projected: Projected, log_size: Tensor | None, scale: float, fused: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T + log size) v, ``[images, queries, heads * head_dim]``.

    Besides its logits ``[images, heads, queries, n]``, which are never there where it is ``fused`` into one operator.
    """
    query, value = projected.query.transpose(1, 2), projected.value.transpose(1, 2)
    if fused:
        bias = None if log_size is None else log_size.to(query.dtype).expand(-1, query.shape[1], query.shape[2], -1)
        mixed = nn.functional.scaled_dot_product_attention(query, projected.key.transpose(1, 2), value, attn_mask=bias, scale=scale)
        return mixed.transpose(1, 2).flatten(2), None
    # Keys are turned in one step: not every runtime makes one of two.
    logits = (query * scale) @ projected.key.permute(0, 2, 3, 1)
    if log_size is not None:
        logits = logits + log_size.to(logits.dtype)
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2), logits


def _reader_attention(projected: Projected, mass: Tensor | None, log_size: Tensor | None, scale: float, prefix: int) -> Tensor:
    """As :func:`hesper.graft.attention.reader_attention`, ``[images, n, heads]``, in single precision; ``mass`` are attention's logits."""
    if mass is not None and prefix and mass.dtype not in HALVES:
        own = mass[:, :, 0]
    else:
        query = projected.query[:, 0] if prefix else projected.query.mean(1)
        own = (wide(projected.key) * (wide(query) * scale)[:, None]).sum(-1).transpose(1, 2)
        own = own if log_size is None else own + log_size[:, :, 0]
    share = own.log_softmax(-1)
    return (share if log_size is None else share - log_size[:, :, 0]).transpose(1, 2)


def _routed(router: Callable[..., Tensor], normed: Tensor, attention: Tensor | None, factor: float = 1.0) -> Tensor:
    """``factor`` times a router's prediction ``[images, n, 1]``, in single precision."""
    own = cast(Any, router)
    assert attention is not None
    direction, heads, offset = (factor * part.to(attention.dtype) for part in (own.direction, own.attention, own.offset))
    # As columns of matrices: a runtime multiplies by these sooner than by vectors.
    predicted: Tensor = wide(normed) @ direction[:, None] + attention @ heads[:, None] + offset
    return predicted
