"""A model's pieces in ONNX Runtime: how long an exported run takes at any count of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hesper.exporting.onnx_format import ONNX
from hesper.exporting.onnx_session import bound, drawn, need, open_session, packed, runtime_of
from hesper.graft.graph_pieces import GraphPieces
from hesper.graft.pieces import Decision
from hesper.plan import ModelRef

__all__ = ["onnx_pieces"]

NAMES = ("images", "tokens")


def onnx_pieces(device: str, threads: int) -> Callable[[nn.Module, ModelRef, Decision | None], GraphPieces]:
    """Takes models apart into graphs that ONNX Runtime runs on ``device``, each drawn when it first runs.

    Raises:
        UsageError: a package or the provider is missing.
    """
    need("onnx", "onnxscript", "onnxruntime")
    runtime_of(device)

    def prepare(piece: nn.Module, example: tuple[Tensor, ...], free: tuple[int, ...]) -> Callable[..., object]:
        dims = {place: torch.export.Dim(NAMES[place], min=1 if place == 0 else 2, max=1 << 12) for place in free}
        # Of one image torch would take it that there is never another.
        drawn_on = tuple(torch.cat([each, each]) if 0 in free and len(each) == 1 else each for each in example)
        names = [f"input_{place}" for place in range(len(example))]
        # Free dimensions go by the argument they belong to, and a piece takes any number of tensors as one.
        model = drawn(piece, drawn_on, ONNX.opset, names, (tuple(dims for _ in example),) if dims else None)
        return bound(open_session(packed(model), device, None, threads).own)

    def take_apart(module: nn.Module, ref: ModelRef, decision: Decision | None) -> GraphPieces:
        return GraphPieces(module, ref, decision, prepare)

    return take_apart
