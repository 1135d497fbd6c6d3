"""A model's pieces in ONNX Runtime: each gives what the module gives, also at counts it was not drawn with; a staircase comes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from families import family, shots
from hesper.exporting.onnx_pieces import onnx_pieces
from hesper.exporting.onnx_session import drawn, open_session, packed
from hesper.graft import graft
from hesper.graft.graph_pieces import GraphPieces
from hesper.graft.one_graph import OneGraphViT, Tokens
from hesper.graft.pieces import Decision
from hesper.hosts.open import wrap
from hesper.measure.stairs import measure_stairs
from hesper.plan import empty_plan
from vits import pictures, vit

DECISIONS = [Decision("merge", 2, 5), Decision("merge", 1, 5, adaptive=True), Decision("drop", 1, 5)]


@pytest.mark.parametrize("decision", DECISIONS)
@torch.inference_mode()
def test_every_piece_gives_what_the_module_gives(decision: Decision) -> None:
    model = wrap("tiny", vit("registers"))
    seen = []

    def prepare(piece: nn.Module, example: tuple[Tensor, ...], free: tuple[int, ...]) -> Callable[..., object]:
        dims = {place: torch.export.Dim(["images", "tokens"][place], min=1 + place, max=99) for place in free}
        names = [f"input_{place}" for place in range(len(example))]
        shapes = (tuple(dims for _ in example),) if dims else None
        session = open_session(packed(drawn(piece, example, 20, names, shapes)), "cpu", None, 1).own

        def run(*tensors: Tensor) -> object:
            (found,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
            np.testing.assert_allclose(found, piece(*tensors).numpy(), rtol=1e-3, atol=1e-4)
            seen.append((1 in free, found.shape))
            return found

        return run

    images = 1 if decision.adaptive else 3
    pieces, every = GraphPieces(model.host.module, model.ref, decision, prepare), model.ref.anatomy.tokens
    pieces.begin(pictures(images))
    pieces.dense(pictures(images))
    pieces.with_heads(2)(pieces.stream(images, every, torch.device("cpu")))
    for count in (every, 8, every - 3)[: 3 if decision.rounds == 2 else 2]:
        stream = pieces.stream(images, count, torch.device("cpu"))
        for job in (pieces.through, pieces.feed, pieces.finish):
            job(stream)
        for lets_go in (True, False):
            pieces.decide(stream, lets_go)
    assert {shape[1] for any_count, shape in seen if any_count and len(shape) == 3} >= {8}
    left = every - decision.leave(every - model.ref.anatomy.prefix_tokens)
    assert (False, (images, left, model.ref.anatomy.width)) in seen


@pytest.mark.parametrize("kind", ["rotary", "rotary_mixed", "dinov3"])
@torch.inference_mode()
def test_blocks_that_rotate_are_drawn_as_they_rotate(kind: str) -> None:
    """Whatever was drawn before, and for copies with fewer heads too."""
    model, seen = wrap("tiny", family(kind)), list[Tensor]()

    def prepare(piece: nn.Module, example: tuple[Tensor, ...], free: tuple[int, ...]) -> Callable[..., object]:
        names = [f"input_{place}" for place in range(len(example))]
        session = open_session(packed(drawn(piece, example, 20, names, None)), "cpu", None, 1).own

        def run(*tensors: Tensor) -> object:
            (found,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
            seen.append(torch.from_numpy(found))
            return found

        return run

    pieces, every = GraphPieces(model.host.module, model.ref, None, prepare), model.ref.anatomy.tokens
    stream = pieces.stream(1, every, torch.device("cpu"))
    for job in (pieces.through, lambda _: pieces.begin(shots(kind, 1)), pieces.finish, pieces.with_heads(3)):
        job(stream)
    rows, host = stream.rows.clone(), model.host
    host.embed(shots(kind, 1))
    cut = graft(host.module, replace(empty_plan("tiny", model.ref.anatomy), model=model.ref), check_weights=False)
    graph = OneGraphViT(cut)
    place = graph.begin(shots(kind, 1)).place
    tokens = Tokens(rows, place=place)
    for block in range(model.ref.anatomy.depth):
        tokens = graph.through(block, tokens)
    for found in (seen[0], seen[-1]):
        torch.testing.assert_close(found, tokens.rows, rtol=1e-3, atol=1e-4)


def test_a_staircase_comes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.measure.stairs.DECIDING", 2)
    monkeypatch.setattr("hesper.measure.stairs.LEAST_WARMUP", 0.0)
    model = wrap("tiny", vit("plain"))
    stairs = measure_stairs(model, pictures(1), [Decision("merge", 1, 5)], pieces=onnx_pieces("cpu", 1), seconds=0.0)
    assert stairs.counts[-1] == model.ref.anatomy.tokens and stairs.dense > 0 and min(stairs.blocks) > 0
    assert stairs.deciding.keys() == {"1"} and len(stairs.attention) == len(stairs.heads) == 3
