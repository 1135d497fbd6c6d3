"""The pieces of :mod:`hesper.graft.pieces` as graphs of tensors, for runtimes that take graphs, at any count of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hesper.graft.apply import graft
from hesper.graft.one_graph import OneGraphViT, Tokens, separated
from hesper.graft.pieces import Decision, Pieces
from hesper.plan import ModelRef, TokenCut, empty_plan

__all__ = ["GraphPieces", "Prepare", "Rectangle"]


class Prepare(Protocol):
    """How a runtime makes a piece ready to run: a function of the same tensors, as ``example`` are."""

    def __call__(self, piece: nn.Module, example: tuple[Tensor, ...], free: tuple[int, ...]) -> Callable[..., object]:
        """The ``free`` dimensions of every tensor may be others from call to call: 0 are images, 1 are tokens."""


@dataclass(frozen=True, eq=False)
class Rectangle:
    """Noise as graphs take it: ``rows`` ``[images, count, width]``, ``size`` ``[images, count]`` or None where nothing has merged."""

    rows: Tensor
    size: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a piece is called with."""
        return (self.rows,) if self.size is None else (self.rows, self.size)


class GraphPieces:
    """As :class:`~hesper.graft.pieces.Pieces`, as exported graphs have them, each made ready by ``prepare`` when it first runs."""

    fewest = 2  # tokens, which no graph tells from any number where it was drawn for one

    def __init__(self, module: nn.Module, ref: ModelRef, decision: Decision | None, prepare: Prepare) -> None:
        self.decision, self.prepare = decision, prepare
        self._host, self._ref = module, ref
        self._whole = Pieces(module, ref, decision)
        self.skip_unread, self.depth, self.block = self._whole.skip_unread, self._whole.depth, self._whole.block
        # As in files: where counts adapt, one image.
        self._images = () if decision is not None and decision.adaptive else (0,)
        self._ready: dict[object, Callable[..., object]] = {}

    @cached_property
    def _graph(self) -> OneGraphViT:
        return OneGraphViT(separated(copy.deepcopy(self._whole.model)))

    def stream(self, images: int, tokens: int, device: torch.device) -> Rectangle:
        """Noise of so many tokens an image, merged ones among them unless all are there."""
        packed = self._whole.stream(images, tokens, device)
        return Rectangle(packed.rows.view(images, tokens, -1), None if packed.size is None else packed.size.view(images, tokens))

    def fresh(self, stream: Rectangle) -> Rectangle:
        """The same: no graph writes to what it is given."""
        return stream

    def begin(self, images: Tensor) -> None:
        """Images to the tokens that enter the first block."""
        self._run("begin", (images,), self._images, lambda: _Piece(self._graph, lambda graph, images: graph.begin(images).rows))

    def dense(self, images: Tensor) -> None:
        """Images to logits through the model before anything is cut."""

        def whole() -> nn.Module:
            blank = replace(empty_plan(self._ref.name, self._ref.anatomy), model=self._ref)
            graph = OneGraphViT(separated(graft(self._host, blank, check_weights=False)))
            return _Piece(graph, lambda graph, images: graph(images))

        self._run("dense", (images,), (0,), whole)

    def through(self, stream: Rectangle) -> None:
        """Both halves of every block but one that computes the prefix alone, nothing leaving."""
        blocks = range(self.depth)

        def run(graph: OneGraphViT, rows: Tensor, size: Tensor | None = None) -> Tensor:
            tokens = _tokens(graph, rows, size)
            for index in blocks:
                tokens = graph.through(index, tokens)
            return tokens.rows

        self._at_any_count("blocks", stream, lambda: _Piece(self._graph, run))

    def feed(self, stream: Rectangle) -> None:
        """The feed-forward halves of the same blocks."""
        depth = self.depth

        def run(graph: OneGraphViT, rows: Tensor) -> Tensor:
            for block in graph.cut.host.blocks[:depth]:
                rows = rows + block.feed(rows)
            return rows

        self._at_any_count("feeds", Rectangle(stream.rows, None), lambda: _Piece(self._graph, run))

    def decide(self, stream: Rectangle, lets_go: bool) -> None:
        """One block in the middle, with a decision that lets some patches of each image go, or without any."""
        block, count = self.block, stream.rows.shape[1]

        def run(graph: OneGraphViT, rows: Tensor, size: Tensor | None = None) -> Tensor:
            return graph.through(block, _tokens(graph, rows, size)).rows

        if not lets_go or self.decision is None:
            self._at_any_count("undecided", stream, lambda: _Piece(self._graph, run))
            return
        cut = self.decision.cut(block, count - self._ref.anatomy.prefix_tokens)
        self._run(("decide", count), stream.tensors, self._images, lambda: _Piece(_deciding(self._graph, cut), run))

    def finish(self, stream: Rectangle) -> None:
        """Tokens to logits, through the last block where it computes the prefix alone."""
        self._at_any_count("finish", stream, lambda: _Piece(self._graph, _finish))

    def with_heads(self, heads: int) -> Callable[[Rectangle], None]:
        """As :meth:`through`, of blocks with only so many of their heads."""
        gone = range(self._ref.anatomy.heads - heads)
        other = GraphPieces(self._host, self._ref, self.decision, self.prepare)
        for block in other._whole.model.host.blocks:
            block.remove_heads(gone)
        return other.through

    def _at_any_count(self, name: str, stream: Rectangle, piece: Callable[[], nn.Module]) -> None:
        # With all tokens there nothing has merged, and a graph without sizes is another graph.
        every = stream.rows.shape[1] == self._ref.anatomy.tokens
        free = self._images if every else (*self._images, 1)
        self._run((name, every, stream.size is None), stream.tensors, free, piece)

    def _run(self, key: object, tensors: tuple[Tensor, ...], free: tuple[int, ...], piece: Callable[[], nn.Module]) -> None:
        if key not in self._ready:
            self._turn()
            self._ready[key] = self.prepare(piece(), tensors, free)
        self._ready[key](*tensors)

    def _turn(self) -> None:
        """Embed once, so that blocks that rotate by place know how; whatever drew a piece before may have left them without."""
        anatomy, host = self._ref.anatomy, self._graph.cut.host
        if host.reads_places:
            like = next(host.module.parameters())
            host.embed(like.new_zeros(1, anatomy.channels, *anatomy.image_size))


class _Piece(nn.Module):
    """Part of a graph's forward as a module."""

    def __init__(self, whole: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.whole, self.run = whole, run

    def forward(self, *tensors: Tensor) -> Tensor:
        """What the part gives."""
        return self.run(self.whole, *tensors)


def _finish(graph: OneGraphViT, rows: Tensor, size: Tensor | None = None) -> Tensor:
    return graph.finish(_tokens(graph, rows, size))


def _tokens(graph: OneGraphViT, rows: Tensor, size: Tensor | None) -> Tokens:
    if not graph.cut.host.reads_places:
        return Tokens(rows, size)
    return Tokens(rows, size, torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1))


def _deciding(graph: OneGraphViT, cut: TokenCut) -> OneGraphViT:
    """A graph that shares all but the decider of a block, whose ``cut`` is this one."""
    cuts = copy.copy(graph.cut)
    decider: Any = copy.deepcopy(cuts.deciders[str(cut.block)])
    decider.cut = cut
    cuts._modules = {**cuts._modules, "deciders": nn.ModuleDict({str(cut.block): decider})}
    return OneGraphViT(cuts)
