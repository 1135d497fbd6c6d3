"""A model's pieces in ONNX Runtime: how long an exported run takes at any count of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hesper.exporting.onnx_format import ONNX
from hesper.exporting.onnx_session import bound, drawn, need, open_session
from hesper.graft.graph_pieces import GraphPieces
from hesper.graft.pieces import Decision
from hesper.plan import ModelRef

__all__ = ["onnx_pieces"]


def onnx_pieces(device: str, threads: int) -> Callable[[nn.Module, ModelRef, Decision | None], GraphPieces]:
    """Takes models apart into graphs that ONNX Runtime runs on ``device``, each drawn when it first runs.

    Raises:
        UsageError: a package or the provider is missing.
    """
    need("onnx", "onnxscript", "onnxruntime")

    def prepare(piece: nn.Module, example: tuple[Tensor, ...], any_count: bool) -> Callable[..., object]:
        shapes = tuple({1: torch.export.Dim("tokens", min=2, max=1 << 16)} for _ in example) if any_count else None
        names = [f"input_{place}" for place in range(len(example))]
        # Dynamic shapes go by the argument they belong to, and a piece takes any number of tensors as one.
        model = drawn(piece, example, ONNX.opset, names, None if shapes is None else (shapes,))
        return bound(open_session(model.SerializeToString(), device, None, threads).own)

    def take_apart(module: nn.Module, ref: ModelRef, decision: Decision | None) -> GraphPieces:
        return GraphPieces(module, ref, decision, prepare, separate=True)

    return take_apart
