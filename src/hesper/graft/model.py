"""The grafted model: a host whose blocks let tokens go as the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft.attention import attend, attend_readers, reader_attention
from hesper.graft.deciders import Decision, State
from hesper.graft.layout import Layout
from hesper.hosts.base import Host, HostBlock
from hesper.measure.macs import Counts, dense_macs, model_macs
from hesper.plan import Plan


@dataclass(frozen=True)
class Traffic:
    """How many tokens of each image went where: ``attended``, ``queries`` and ``fed`` are ``[images, depth]``, ``deciding`` MACs ``[images]``."""

    attended: Counts
    queries: Counts
    fed: Counts
    deciding: Counts


@dataclass(frozen=True)
class Outcome:
    """Logits ``[images, classes]``, MACs ``[images]`` of what really ran, the traffic, and where each patch went.

    ``sources`` (when asked for) has a ``[images, patches]`` map per block: the patch each original patch is represented by after
    the block, -1 where it was dropped.
    """

    logits: Tensor
    macs: Counts
    traffic: Traffic
    sources: tuple[Tensor, ...] | None = None


@dataclass
class _Stream:
    """The packed rows on their way through the blocks."""

    rows: Tensor
    layout: Layout
    size: Tensor | None
    origin: Tensor | None
    owner: Tensor | None


class GraftedViT(nn.Module):
    """A vision transformer that lets tokens go block by block; ``model(images)`` gives logits.

    With a plan that cuts nothing it runs the host's own forward, bit for bit.

    Args:
        host: the model to run, heads already removed; it becomes a submodule.
        plan: what is cut.
        deciders: the decider of each block that cuts tokens.
    """

    def __init__(self, host: Host, plan: Plan, deciders: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.network = host.module
        self.host = host
        self.plan = plan
        self.deciders = nn.ModuleDict({str(block): decider for block, decider in deciders.items()})

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, classes]`` of ``[images, channels, height, width]``."""
        self._check(images)
        if self.untouched:
            out: Tensor = self.network(images)
            return out
        return self.run(images).logits

    @property
    def untouched(self) -> bool:
        """Whether no token is ever let go."""
        return not self.deciders and not self.plan.skip_unread

    @property
    def dense_macs(self) -> int:
        """MACs per image of the uncut model."""
        return dense_macs(self.plan.model.anatomy)

    def run(self, images: Tensor, *, trace: bool = False) -> Outcome:
        """Logits with the account of what ran; ``trace`` also follows every patch."""
        self._check(images)
        host, anatomy = self.host, self.plan.model.anatomy
        embedded = host.embed(images)
        layout = Layout((anatomy.tokens,) * len(images), anatomy.prefix_tokens, images.device)
        stream = _Stream(embedded.flatten(0, 1), layout, None, *_origins(layout) if trace else (None, None))
        book = _Book(len(images))
        maps: list[Tensor] = []
        for index, block in enumerate(host.blocks):
            if self.plan.skip_unread and index == anatomy.depth - 1:
                break
            self._through(index, block, stream, book)
            if trace:
                maps.append(_map(stream, layout))
        if self.plan.skip_unread:
            logits = self._finish_readers(stream, book)
        else:
            logits = self._finish(stream)
        traffic = book.close()
        heads = [block.heads for block in host.blocks]
        macs = model_macs(anatomy, heads, traffic.attended, traffic.queries, traffic.fed, traffic.deciding)
        return Outcome(logits, macs, traffic, tuple(maps) if trace else None)

    def _through(self, index: int, block: HostBlock, stream: _Stream, book: _Book) -> None:
        decider = self.deciders[str(index)] if str(index) in self.deciders else None
        counts = stream.layout.counts
        if decider is None and stream.size is None and stream.layout.rectangular:
            book.add(counts, counts, counts)
            stream.rows = block.whole(stream.rows.unflatten(0, (len(counts), counts[0]))).flatten(0, 1)
            return
        projected = block.project(stream.rows)
        log_size = None if stream.size is None else stream.size.log()
        mixed = attend(projected, log_size, stream.layout, block.scale)
        stream.rows = stream.rows + block.merge_heads(mixed)
        if decider is not None:
            attention = reader_attention(projected, log_size, stream.layout, block.scale)
            size = torch.ones_like(stream.rows[:, 0]) if stream.size is None else stream.size
            state = State(stream.rows, projected.normed, projected.key, projected.value, attention, size, stream.layout)
            spent = decider.macs(np.array(counts) - stream.layout.prefix)
            _carry_out(decider(state), stream, size)
            moved = np.array(counts) - np.array(stream.layout.counts)
            book.decide(spent + moved * self.plan.model.anatomy.width)
        book.add(counts, counts, stream.layout.counts)
        stream.rows = stream.rows + block.feed(stream.rows)

    def _finish(self, stream: _Stream) -> Tensor:
        layout = stream.layout
        normed = self.host.norm(stream.rows)
        mean = None
        if self.plan.model.anatomy.reads_patches:
            size = torch.ones_like(normed[:, 0]) if stream.size is None else stream.size
            rows = layout.padded(torch.cat([normed * size[:, None], size[:, None]], -1)) * layout.valid[..., None]
            total = rows.sum(1)
            mean = total[:, :-1] / total[:, -1:]
        return self.host.readout(layout.prefix_rows(normed), mean)

    def _finish_readers(self, stream: _Stream, book: _Book) -> Tensor:
        """The last block for the prefix alone: nobody reads its patch tokens, so leaving them out changes nothing."""
        block, layout = self.host.blocks[-1], stream.layout
        prefix = layout.prefix_rows(stream.rows)
        projected = block.project_readers(stream.rows, prefix)
        log_size = None if stream.size is None else stream.size.log()
        prefix = prefix + block.merge_heads(attend_readers(projected, log_size, layout, block.scale))
        prefix = prefix + block.feed(prefix)
        readers = (layout.prefix,) * len(layout.counts)
        book.add(layout.counts, readers, readers)
        return self.host.readout(self.host.norm(prefix), None)

    def _check(self, images: Tensor) -> None:
        size = self.plan.model.anatomy.image_size
        if images.ndim != 4 or tuple(images.shape[-2:]) != size:
            raise UsageError(
                f"The model takes images of {size[0]} x {size[1]} pixels, not a tensor of shape {tuple(images.shape)}; resize them."
            )


class _Book:
    """Keeps count of the tokens block by block."""

    def __init__(self, images: int) -> None:
        self.columns: tuple[list[tuple[int, ...]], ...] = ([], [], [])
        self.deciding: Counts = np.zeros(images, dtype=np.int64)

    def add(self, attended: tuple[int, ...], queries: tuple[int, ...], fed: tuple[int, ...]) -> None:
        for column, counts in zip(self.columns, (attended, queries, fed), strict=True):
            column.append(counts)

    def decide(self, macs: Counts) -> None:
        self.deciding = self.deciding + macs

    def close(self) -> Traffic:
        return Traffic(*(np.array(column, dtype=np.int64).T for column in self.columns), self.deciding)


def _carry_out(decision: Decision, stream: _Stream, size: Tensor) -> None:
    """Take the decided tokens out of the packed rows; what is merged leaves its mass where it goes.

    A destination d of total size T that receives sources s becomes x_d + sum_s size_s (x_s - x_d) / T, the size-weighted mean.
    """
    layout = stream.layout
    gone_rows = layout.index[decision.gone]
    stays = torch.ones(layout.rows, dtype=torch.bool, device=layout.device)
    stays[gone_rows] = False
    keep = stays.nonzero()[:, 0]
    rows, kept_size = stream.rows[keep], size[keep]
    if decision.into is not None:
        into_rows = layout.index.gather(1, decision.into)[decision.gone]
        place = (stays.cumsum(0) - 1)[into_rows]
        kept_size = kept_size.index_add(0, place, size[gone_rows])
        share = size[gone_rows] / kept_size[place]
        rows = rows.index_add(0, place, (stream.rows[gone_rows] - stream.rows[into_rows]) * share[:, None])
        if stream.owner is not None:
            stream.owner[gone_rows] = into_rows
    left = layout.patches - decision.gone.sum(1) + layout.prefix
    _follow(stream, stays, gone_rows, decision.into is not None)
    stream.rows, stream.size, stream.layout = rows, kept_size, layout.with_counts(left.tolist())


def _origins(layout: Layout) -> tuple[Tensor, Tensor]:
    """For tracing: the current row of every original row, and scratch for owners."""
    every = torch.arange(layout.rows, device=layout.device)
    return every, every.clone()


def _follow(stream: _Stream, stays: Tensor, gone: Tensor, merged: bool) -> None:
    if stream.origin is None or stream.owner is None:
        return
    place = stays.cumsum(0) - 1
    owner = torch.arange(len(stays), device=stays.device)
    owner[gone] = stream.owner[gone] if merged else -1
    target = torch.where(owner >= 0, place[owner.clamp_min(0)], -1)
    stream.origin = torch.where(stream.origin >= 0, target[stream.origin.clamp_min(0)], -1)
    stream.owner = torch.arange(int(stays.sum()), device=stays.device)


def _map(stream: _Stream, first: Layout) -> Tensor:
    """``[images, patches]``: place within its image of the token that stands for each original patch, -1 where dropped."""
    assert stream.origin is not None
    starts = torch.tensor(stream.layout.bounds[:-1], device=first.device)
    local = stream.origin - starts[first.image]
    local = torch.where(stream.origin >= 0, local - stream.layout.prefix, -1)
    return first.padded(local)
