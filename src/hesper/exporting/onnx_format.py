"""ONNX: one file for ONNX Runtime and TensorRT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hesper.errors import UsageError
from hesper.exporting.formats import Runner
from hesper.exporting.notes import KEY, Notes
from hesper.exporting.onnx_session import bound, drawn, need, open_session, packed
from hesper.exporting.tensorrt import refused_by_tensorrt
from hesper.graft.one_graph import OneGraphViT

__all__ = ["ONNX"]

OPSETS = range(18, 24)


class Onnx:
    """The format; ``opset`` is the one written where none is asked for."""

    name = "onnx"
    suffix = ".onnx"
    opset: int = 20
    any_batch = True
    fused = False

    def write(self, graph: OneGraphViT, example: Tensor, notes: Notes, opset: int | None, path: Path) -> dict[str, Any]:
        """Write the graph by torch's dynamo exporter; ``images`` in, ``logits`` out, weights inside."""
        need("onnx", "onnxscript", "onnxruntime")
        wanted = opset or self.opset
        if wanted not in OPSETS:
            raise UsageError(f"Opset {wanted} is not one that is exported; use one from {OPSETS[0]} to {OPSETS[-1]}.")
        any_batch = ({0: torch.export.Dim("batch", min=1, max=4096)},) if notes.largest_batch is None else None
        model = drawn(graph, (example,), wanted, ["images"], any_batch)
        model.producer_name = KEY
        model.metadata_props.add(key=KEY, value=notes.dumps())
        path.write_bytes(packed(model))
        operators = Counter(node.op_type for node in model.graph.node)
        return {
            "opset": next(own.version for own in model.opset_import if not own.domain),
            "operators": dict(sorted(operators.items())),
            "tensorrt_refuses": refused_by_tensorrt(model),
        }

    def open(self, path: Path, device: str, provider: str | None, threads: int | None) -> Runner:
        """A session of ONNX Runtime."""
        need("onnxruntime")
        session = open_session(path, device, provider, threads)
        notes = Notes.loads(session.own.get_modelmeta().custom_metadata_map.get(KEY), path)
        run = cast(Callable[[Tensor], Tensor], bound(session.own, (notes.classes,))) if session.there else _copied(session.own)
        return Runner(run, notes, session.runtime, on_host=not session.there)


def _copied(session: Any) -> Callable[[Tensor], Tensor]:
    """Runs a session on images of main memory."""
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])

    return run


ONNX = Onnx()
