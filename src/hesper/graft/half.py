"""The attention half of a block on a packed stream: with all its heads, or for each image with those its gate lets stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.graft.attention import attend, attend_readers, reader_attention
from hesper.graft.compiling import eager, seam
from hesper.graft.deciders import Decider
from hesper.graft.gates import Gate
from hesper.graft.layout import Layout
from hesper.graft.stream import Stream
from hesper.hosts.base import HostBlock, Projected


@dataclass(frozen=True, eq=False)
class Seen:
    """What a decider may read of an attention half, as in :class:`~hesper.graft.deciders.State`."""

    normed: Tensor
    key: Tensor
    value: Tensor
    attention: Tensor


@dataclass(frozen=True, eq=False)
class Half:
    """The residual update ``[rows, width]``, and what the block's decider, if it has one, reads."""

    update: Tensor
    seen: Seen | None


@dataclass(frozen=True, eq=False)
class Group:
    """Images of a batch that use the same heads of a block: which heads, which images, and where their rows lie."""

    kept: tuple[int, ...]
    gone: tuple[int, ...]
    images: Tensor
    rows: Tensor
    layout: Layout

    @eager
    def part(self, stream: Stream) -> Stream:
        """The images' part of the stream."""
        if len(self.layout.counts) == len(stream.layout.counts):
            return stream
        size, place = (None if of is None else of.index_select(0, self.rows) for of in (stream.size, stream.place))
        return Stream(stream.rows.index_select(0, self.rows), self.layout, size, place=place)

    @eager
    def share(self, power: Tensor | None) -> Tensor | None:
        """Of one number per head those of the heads that are used."""
        return None if power is None else power[list(self.kept)]


@seam
def attention_half(block: HostBlock, stream: Stream, decider: Decider | None, power: Tensor | None = None) -> Half:
    """The half with all heads the block has; sizes count to a ``power`` ``[heads]``, or plainly."""
    projected = block.project(stream.rows, stream.place)
    update = block.merge_heads(_mixed(projected, stream, power, block.scale))
    return Half(update, None if decider is None else _seen(projected, stream, power, block.scale, decider))


@eager
def _mixed(projected: Projected, stream: Stream, power: Tensor | None, scale: float) -> Tensor:
    """Attention of the stream's rows, ``[rows, heads * head_dim]``."""
    return attend(projected, stream.log_size(power), stream.layout, scale)


@eager
def _seen(projected: Projected, stream: Stream, power: Tensor | None, scale: float, decider: Decider) -> Seen:
    attention = projected.key.new_empty(stream.layout.rows, 0)
    if decider.reads_attention:
        attention = reader_attention(projected, stream.log_size(power), stream.layout, scale)
    return Seen(projected.normed, projected.key, projected.value, attention)


@seam
def gated_half(gate: Gate, stay: Tensor, block: HostBlock, stream: Stream, decider: Decider | None, power: Tensor | None = None) -> Half:
    """The half with the heads that ``stay`` ``[images, heads]`` for each image, and no work for the others."""
    groups = grouped(stay, stream.layout)
    halves = []
    for group in groups:
        half = attention_half(gate.variants.of(block, group.gone), group.part(stream), decider, group.share(power))
        if decider is not None and half.seen is not None:
            half = Half(half.update, _for_all_heads(half.seen, gate, group.kept, decider))
        halves.append(half)
    where = [group.rows for group in groups]
    update = _in_order([half.update for half in halves], where)
    seen = [half.seen for half in halves if half.seen is not None]
    if not seen:
        return Half(update, None)
    parts = {name: _in_order([getattr(part, name) for part in seen], where) for name in ("normed", "key", "value", "attention")}
    return Half(update, Seen(**parts))


@seam
def readers_half(block: HostBlock, stream: Stream, power: Tensor | None = None) -> Tensor:
    """The update of the prefix rows alone, ``[images, prefix, width]``."""
    readers = prefix_rows(stream)
    projected = block.project_readers(stream.rows, readers, stream.place)
    return block.merge_heads(attend_readers(projected, stream.log_size(power), stream.layout, block.scale))


@eager
def prefix_rows(stream: Stream) -> Tensor:
    """``[images, prefix, width]``."""
    return stream.layout.prefix_rows(stream.rows)


@seam
def gated_readers_half(gate: Gate, stay: Tensor, block: HostBlock, stream: Stream, power: Tensor | None = None) -> Tensor:
    """As :func:`readers_half`, with the heads that ``stay`` ``[images, heads]`` for each image."""
    groups = grouped(stay, stream.layout)
    updates = [readers_half(gate.variants.of(block, group.gone), group.part(stream), group.share(power)) for group in groups]
    return _in_order(updates, [group.images for group in groups])


@eager
def grouped(stay: Tensor, layout: Layout) -> list[Group]:
    """The images of a batch by the heads they use, ``stay`` ``[images, heads]``.

    Example:
        >>> groups = grouped(torch.tensor([[True, False], [True, True], [True, False]]), Layout((2, 1, 2), prefix=1))
        >>> [(group.kept, group.images.tolist(), group.rows.tolist()) for group in groups]
        [((0,), [0, 2], [0, 1, 3, 4]), ((0, 1), [1], [2])]
    """
    members: dict[tuple[bool, ...], list[int]] = {}
    for image, pattern in enumerate(stay.tolist()):
        members.setdefault(tuple(pattern), []).append(image)
    groups = []
    for pattern, images in members.items():
        rows = torch.cat([torch.arange(layout.bounds[image], layout.bounds[image + 1]) for image in images])
        kept = tuple(head for head, stays in enumerate(pattern) if stays)
        gone = tuple(head for head, stays in enumerate(pattern) if not stays)
        counts = tuple(layout.counts[image] for image in images)
        own = layout if len(images) == len(layout.counts) else Layout(counts, layout.prefix, layout.device)
        groups.append(Group(kept, gone, torch.tensor(images, device=stay.device), rows.to(stay.device), own))
    return groups


@eager
def _for_all_heads(seen: Seen, gate: Gate, kept: tuple[int, ...], decider: Decider) -> Seen:
    """What a group saw, in the shape in which all groups can stand together."""
    key, value = seen.key[:, :0], seen.value[:, :0]
    if decider.reads_keys:
        key, value = gate.vectors(seen.key, kept), gate.vectors(seen.value, kept)
    attention = gate.attention(seen.attention, kept) if decider.reads_attention else seen.attention
    return Seen(seen.normed, key, value, attention)


@eager
def _in_order(parts: Sequence[Tensor], where: Sequence[Tensor]) -> Tensor:
    """Parts put back to the places they were taken from."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for part, places in zip(parts, where, strict=True):
        whole = whole.index_copy_(0, places, part)
    return whole
