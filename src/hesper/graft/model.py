"""The grafted model: a host whose blocks let tokens go as the plan says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hesper.cost import Counts, dense_macs, model_macs
from hesper.errors import Unverified, UsageError
from hesper.graft.compiling import eager, seam
from hesper.graft.deciders import Decider, State
from hesper.graft.gates import Gate, reader_row
from hesper.graft.half import Seen, attention_half, gated_half, gated_readers_half, prefix_rows, readers_half
from hesper.graft.layout import Layout, checkerboard
from hesper.graft.stream import Stream
from hesper.graft.unmerge import full_grid, stand_ins
from hesper.hosts.base import Host, HostBlock
from hesper.plan import Plan, at_dial, verified_range


@dataclass(frozen=True)
class Traffic:
    """How many tokens of each image went where, and how many heads they met there.

    ``attended``, ``queries``, ``fed`` and ``heads`` are ``[images, depth]``; ``deciding``, on tokens and heads, is MACs ``[images]``.
    """

    attended: Counts
    queries: Counts
    fed: Counts
    deciding: Counts
    heads: Counts


@dataclass(frozen=True)
class Outcome:
    """Logits ``[images, classes]``, MACs ``[images]`` that each image needed, the traffic, and where each patch went.

    ``sources`` (when asked for) has a ``[images, patches]`` map per block: the place, among the patches its image has left after the
    block, of the one that stands for each original patch, -1 where it was dropped. ``used`` (likewise) ``[images, depth, heads]`` says
    which of the dense model's heads ran for an image.
    """

    logits: Tensor
    macs: Counts
    traffic: Traffic
    sources: tuple[Tensor, ...] | None = None
    used: Tensor | None = None


class GraftedViT(nn.Module):
    """A vision transformer that lets tokens go, and heads sit out, block by block; ``model(images)`` gives logits.

    With a plan that cuts nothing it runs the host's own forward, bit for bit.

    Args:
        host: the model to run, heads already removed; it becomes a submodule.
        plan: what is cut.
        deciders: the decider of each block that cuts tokens.
        gates: the gate of each block whose heads may sit out.
        size_exponent: ``[depth, heads]`` of the dense model, to which power the size of a token counts in a head's attention; one
            everywhere where it is not given.
    """

    order: Tensor | None
    size_exponent: Tensor

    def __init__(
        self,
        host: Host,
        plan: Plan,
        deciders: Mapping[int, nn.Module],
        gates: Mapping[int, Gate],
        size_exponent: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = host.module
        self.host = host
        self.plan = plan
        self._own: Plan | None = None  # the plan before its dial was turned
        self.deciders = nn.ModuleDict({str(block): decider for block, decider in deciders.items()})
        self.gates = nn.ModuleDict({str(block): gate for block, gate in gates.items()})
        checkered = any(cast(Decider, decider).checkered for decider in deciders.values())
        order = torch.tensor(checkerboard(plan.model.anatomy.grid)) if checkered else None
        self.register_buffer("order", order, persistent=False)
        anatomy = plan.model.anatomy
        self.register_buffer("size_exponent", torch.ones(anatomy.depth, anatomy.heads) if size_exponent is None else size_exponent.clone())
        removed = {cut.block: cut.remove for cut in plan.heads}
        self._look_at_exponents()
        self.register_load_state_dict_post_hook(_look_again)  # type: ignore[no-untyped-call]
        self._heads = [[head for head in range(anatomy.heads) if head not in removed.get(block, ())] for block in range(anatomy.depth)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, classes]`` of ``[images, channels, height, width]``."""
        if self.untouched:  # nothing is decided, so this compiles and exports as one graph
            self._check(images)
            return cast(Tensor, self.network(images))
        return self._run(images, False)[0]

    @property
    def untouched(self) -> bool:
        """Whether nothing is ever let go: no token, and no head, which some hosts' own forward would miss."""
        return not self.deciders and not self.gates and not self.plan.skip_unread and not self.plan.heads

    def set_dial(self, dial: float) -> None:
        """Let tokens go, and heads sit out, below another price from now on, in nats: the same model at another quality.

        Outside the range of the plan's verified operating points an :class:`~hesper.errors.Unverified` warning says so.

        Raises:
            UsageError: the plan has no dial, or ``dial`` is no price.
        """
        own = self._own or self.plan
        moved = at_dial(own, dial)
        known = verified_range(own)
        if known is None or not known[0].dial <= dial <= known[1].dial:
            what = "at no dial" if known is None else f"from {known[0].dial:.3g} ({known[0].macs:.2f} of the MACs) to "
            what += "" if known is None else f"{known[1].dial:.3g} ({known[1].macs:.2f})"
            warnings.warn(f"The plan was verified {what}; at {dial:.3g} nothing is known of its loss.", Unverified, stacklevel=2)
        self._own, self.plan = own, moved
        for cut in moved.tokens:
            cast(Any, self.deciders[str(cut.block)]).cut = cut
        for gate in moved.gates:
            cast(Any, self.gates[str(gate.block)]).cut = gate

    @property
    def dense_macs(self) -> int:
        """MACs per image of the uncut model."""
        return dense_macs(self.plan.model.anatomy)

    def run(self, images: Tensor, *, trace: bool = False) -> Outcome:
        """Logits with the account of what ran; ``trace`` also follows every patch."""
        logits, book, maps = self._run(images, trace)
        anatomy, traffic = self.plan.model.anatomy, self._traffic(book)
        macs = model_macs(anatomy, traffic.heads, traffic.attended, traffic.queries, traffic.fed, traffic.deciding)
        if not trace:
            return Outcome(logits, macs, traffic)
        return Outcome(logits, macs, traffic, tuple(maps), self._used(book, len(images), images.device))

    def forward_features(self, images: Tensor) -> Tensor:
        """Normed tokens on the full grid, ``[images, prefix + patches, width]``, as the host has them before pooling.

        Every patch gets the row of the token it merged into; a dropped one that of the nearest patch which still has a token. The
        last block is computed for all tokens, also where ``plan.skip_unread`` leaves it out of the logits.

        Example:
            >>> import timm, torch
            >>> from hesper.graft import graft
            >>> from hesper.hosts import open_host
            >>> from hesper.plan import empty_plan
            >>> model = timm.create_model("test_vit", num_classes=5).eval()
            >>> features = graft(model, empty_plan("test_vit", open_host(model).anatomy)).forward_features(torch.randn(2, 3, 160, 160))
            >>> features.shape
            torch.Size([2, 101, 64])
        """
        self._check(images)
        anatomy = self.plan.model.anatomy
        stream, book = self._lay_out(self.host.embed(images)), Book()
        first = stream.layout
        stream.follow()
        for index, block in enumerate(self.host.blocks):
            self._through(index, block, stream, book, decide=not self.plan.skip_unread or index < anatomy.depth - 1)
        where = stand_ins(self._patch_map(stream, first), anatomy.grid)
        return full_grid(self.host.norm(stream.rows), stream.layout, where)

    @eager
    def _lay_out(self, rows: Tensor) -> Stream:
        """The stream that enters the first block, from embedded ``rows`` ``[images, tokens, width]``."""
        anatomy = self.plan.model.anatomy
        first = Layout((anatomy.tokens,) * len(rows), anatomy.prefix_tokens, rows.device)
        place = first.places.view(len(rows), -1)
        if self.order is not None:
            order = torch.cat([torch.arange(anatomy.prefix_tokens, device=rows.device), self.order + anatomy.prefix_tokens])
            rows, place = rows.index_select(1, order), place.index_select(1, order)
        return Stream(rows.flatten(0, 1), first, place=place.flatten() if self.host.reads_places else None)

    @eager
    def _patch_map(self, stream: Stream, first: Layout) -> Tensor:
        """Where every patch of the image is, in reading order: ``[images, patches]``."""
        where = stream.patch_map(first)
        return where if self.order is None else where.index_select(1, self.order.argsort())

    @seam
    def _run(self, images: Tensor, trace: bool) -> tuple[Tensor, Book, list[Tensor]]:
        self._check(images)
        host, anatomy = self.host, self.plan.model.anatomy
        first = Layout((anatomy.tokens,) * len(images), anatomy.prefix_tokens, images.device)
        book, maps = Book(), []
        if self.untouched:
            for block in host.blocks:
                book.add(first.counts, first.counts, first.counts, block.heads)
            same = torch.arange(anatomy.tokens - anatomy.prefix_tokens, device=images.device).expand(len(images), -1)
            return self.network(images), book, [same] * anatomy.depth
        stream = self._lay_out(self.host.embed(images))
        if trace:
            stream.follow()
        last = anatomy.depth - 1 if self.plan.skip_unread else anatomy.depth
        for index, block in enumerate(host.blocks):
            if index < last:
                self._through(index, block, stream, book)
            if trace:
                maps.append(self._patch_map(stream, first))
        logits = self._finish_readers(stream, book) if self.plan.skip_unread else self._finish(stream)
        return logits, book, maps

    @seam
    def _through(self, index: int, block: HostBlock, stream: Stream, book: Book, decide: bool = True) -> None:
        """One block's halves, with the decision between them."""
        layout = stream.layout
        decider = cast(Decider, self.deciders[str(index)]) if decide and str(index) in self.deciders else None
        stay = self._stay(index, block, stream, book)
        power = self._size_power(index)
        half = (
            attention_half(block, stream, decider, power)
            if stay is None
            else gated_half(self._gate(index), stay, block, stream, decider, power)
        )
        stream.add(half.update)
        if decider is not None and half.seen is not None:
            self._decide(index, decider, half.seen, stream, book)
        attended = layout.listed(layout.counts)
        book.add(attended, attended, stream.layout.listed(stream.layout.counts), block.heads)
        stream.feed(block.feed)

    @eager
    def _decide(self, index: int, decider: Decider, seen: Seen, stream: Stream, book: Book) -> None:
        """Let go what the block's decider lets go."""
        with torch.no_grad():
            state = State(stream.rows, seen.normed, seen.key, seen.value, seen.attention, stream.sizes(), stream.layout)
            decision = decider(state)
        book.entered[index] = tuple(stream.layout.listed(entered) for entered in decision.entered)
        stream.carry_out(decision, decider.restoration)

    def _look_at_exponents(self) -> None:
        # Once, not in every forward: on an accelerator, asking is waiting.
        self._plain_sizes = bool((self.size_exponent == 1).all())

    @property
    def plain_sizes(self) -> bool:
        """Whether sizes count as they are in every head."""
        return self._plain_sizes and not self.size_exponent.requires_grad

    @eager
    def _size_power(self, index: int) -> Tensor | None:
        """As :meth:`powers`; None where it is one for all."""
        if self.plain_sizes:
            return None
        return self.powers(index)

    def powers(self, index: int) -> Tensor:
        """To which power sizes count, ``[heads]``, in the attention of the heads a block has."""
        own, heads = self.size_exponent[index], self._heads[index]
        # One by one: a list of places is a tensor on the host, for which an accelerator would be waited for.
        return own if len(heads) == len(own) else torch.stack([own[head] for head in heads])

    def _gate(self, index: int) -> Gate:
        return cast(Gate, self.gates[str(index)])

    @eager
    def _stay(self, index: int, block: HostBlock, stream: Stream, book: Book) -> Tensor | None:
        """Which heads stay, ``[images, heads]``; None where all do."""
        if str(index) not in self.gates:
            return None
        stay: Tensor = self._gate(index)(reader_row(block, stream.rows, stream.size, stream.layout))
        book.stay[index] = stream.layout.restored(stay)
        return None if bool(stay.all()) else stay

    def _traffic(self, book: Book) -> Traffic:
        """The account of a run: who went where, and what deciding and merging cost each image."""
        anatomy = self.plan.model.anatomy
        attended, queries, fed = (np.array(column, dtype=np.int64).T for column in (book.attended, book.queries, book.fed))
        heads: Counts = np.tile(np.array(book.heads, dtype=np.int64), (len(attended), 1))
        for block, stay in book.stay.items():
            heads[:, block] = stay.sum(1).cpu().numpy()
        deciding: Counts = np.full(len(attended), sum(self._gate(block).macs for block in book.stay), dtype=np.int64)
        for cut in self.plan.tokens:
            if self.plan.skip_unread and cut.block == anatomy.depth - 1:
                continue  # its patches do not get as far as a decision
            decider, tokens = cast(Decider, self.deciders[str(cut.block)]), attended[:, cut.block]
            deciding = deciding + decider.macs(np.array(book.entered[cut.block], dtype=np.int64), anatomy.prefix_tokens)
            if decider.reads_attention:
                deciding = deciding + tokens * heads[:, cut.block] * anatomy.head_dim
            if cut.combine == "merge":
                deciding = deciding + (tokens - fed[:, cut.block]) * anatomy.width
        return Traffic(attended, queries, fed, deciding, heads)

    def _used(self, book: Book, images: int, device: torch.device) -> Tensor:
        """Which of the dense model's heads ran, ``[images, depth, heads]``."""
        anatomy = self.plan.model.anatomy
        used = torch.ones(images, anatomy.depth, anatomy.heads, dtype=torch.bool, device=device)
        for cut in self.plan.heads:
            used[:, cut.block, list(cut.remove)] = False
        for block, stay in book.stay.items():
            left = used[0, block].nonzero().flatten()
            used[:, block, left] = stay
        return used

    @seam
    def _finish(self, stream: Stream) -> Tensor:
        """Logits from the last rows; a pooling classifier weighs every token by its size."""
        return self.host.readout(*self._read(stream, self.host.norm(stream.rows)))

    @eager
    def _read(self, stream: Stream, normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the classifier reads of ``normed`` rows: prefix, patches if it reads them, and what these count for."""
        layout = stream.layout
        prefix = layout.restored(layout.prefix_rows(normed))
        if not self.plan.model.anatomy.reads_patches:
            return prefix, None, None
        weight = None if stream.size is None and layout.rectangular else layout.restored(layout.padded(stream.sizes()) * layout.valid)
        return prefix, layout.restored(layout.padded(normed)), weight

    @seam
    def _finish_readers(self, stream: Stream, book: Book) -> Tensor:
        """The last block for the prefix alone: nobody reads its patch tokens, so leaving them out changes nothing."""
        block, layout = self.host.blocks[-1], stream.layout
        last = len(self.host.blocks) - 1
        stay = self._stay(last, block, stream, book)
        power = self._size_power(last)
        update = readers_half(block, stream, power) if stay is None else gated_readers_half(self._gate(last), stay, block, stream, power)
        prefix = prefix_rows(stream) + update
        prefix = prefix + block.feed(prefix)
        readers = (layout.prefix,) * len(layout.counts)
        book.add(layout.listed(layout.counts), readers, readers, block.heads)
        return self.host.readout(self._in_batch_order(self.host.norm(prefix), layout), None)

    @eager
    def _in_batch_order(self, values: Tensor, layout: Layout) -> Tensor:
        return layout.restored(values)

    def _check(self, images: Tensor) -> None:
        anatomy = self.plan.model.anatomy
        size = anatomy.image_size
        channels = anatomy.channels
        if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != (channels, *size) or not images.is_floating_point():
            raise UsageError(
                f"The model takes one or more images of {channels} channels and {size[0]} x {size[1]} pixels in floating point, not a "
                f"tensor of shape {tuple(images.shape)} and {str(images.dtype).removeprefix('torch.')}; resize or convert them."
            )


def _look_again(model: nn.Module, _: object) -> None:
    cast(GraftedViT, model)._look_at_exponents()


class Book:
    """Keeps count of tokens and heads block by block, of the tokens that entered each round of a decision, and of the heads that stayed."""

    def __init__(self) -> None:
        self.attended: list[tuple[int, ...]] = []
        self.queries: list[tuple[int, ...]] = []
        self.fed: list[tuple[int, ...]] = []
        self.heads: list[int] = []
        self.entered: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.stay: dict[int, Tensor] = {}

    def add(self, attended: tuple[int, ...], queries: tuple[int, ...], fed: tuple[int, ...], heads: int) -> None:
        """A block: tokens that attended, were queries and were fed, image by image, and its heads."""
        self.attended.append(attended)
        self.queries.append(queries)
        self.fed.append(fed)
        self.heads.append(heads)
