"""ExecuTorch: a program for phones and microcontrollers, its linear layers in XNNPACK."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

from torch import Tensor

from hesper.errors import JobError, UsageError
from hesper.exporting.formats import Runner
from hesper.exporting.notes import KEY, Notes
from hesper.exporting.quiet import innermost, quietly
from hesper.exporting.torch_format import exported
from hesper.graft.one_graph import OneGraphViT

__all__ = ["EXECUTORCH"]


class ExecuTorch:
    """The format; its memory is planned for one image, since it would be planned for the largest batch there may be."""

    name = "executorch"
    suffix = ".pte"
    opset: int | None = None
    any_batch = False
    fused = False

    def write(self, graph: OneGraphViT, example: Tensor, notes: Notes, opset: int | None, path: Path) -> dict[str, Any]:
        """Write the graph, lowered to XNNPACK where that has the operators and to ExecuTorch's own otherwise."""
        _require()
        if not graph.fixed:
            raise UsageError(
                "ExecuTorch plans its memory beforehand, and this run's counts adapt to the image; prune with --counts fixed, or export to "
                "onnx or torch."
            )
        with quietly():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

        program = exported(graph, example, notes)
        try:
            with quietly():
                lowered = to_edge_transform_and_lower(
                    program, partitioner=[XnnpackPartitioner()], constant_methods={KEY: notes.dumps()}
                ).to_executorch()
        except Exception as error:
            raise JobError(f"ExecuTorch cannot take this model: {innermost(error)}") from error
        path.write_bytes(lowered.buffer)
        return {"bytes": len(lowered.buffer)}

    def open(self, path: Path, device: str, provider: str | None, threads: int | None) -> Runner:
        """The program in ExecuTorch's own runtime."""
        _require()
        with quietly():
            from executorch.runtime import Runtime

        try:
            program = Runtime.get().load_program(path)
            named = set(program.method_names)
        except Exception as error:
            raise UsageError(f"{path} is no ExecuTorch program that can be run here.") from error
        text = program.load_method(KEY).execute([])[0] if KEY in named else None
        notes = Notes.loads(text, path)
        method = program.load_method("forward")

        def run(images: Tensor) -> Tensor:
            logits: Tensor = method.execute([images.contiguous()])[0]
            return logits.clone()

        return Runner(run, notes, "ExecuTorch")


def _require() -> None:
    if util.find_spec("executorch") is None:
        raise UsageError("ExecuTorch programs need the package executorch; install hesper[executorch], or export to onnx.")


EXECUTORCH = ExecuTorch()
