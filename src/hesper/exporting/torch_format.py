"""A ``torch.export`` archive: the graph and its weights, for torch itself and what is built on it (AOTInductor)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from hesper.errors import JobError, UsageError
from hesper.exporting.formats import Runner
from hesper.exporting.notes import KEY, Notes
from hesper.exporting.quiet import innermost, quietly
from hesper.graft.one_graph import OneGraphViT

__all__ = ["ARCHIVE", "exported"]


class Archive:
    """The format."""

    name = "torch"
    suffix = ".pt2"
    opset: int | None = None
    any_batch = True
    fused = True

    def write(self, graph: OneGraphViT, example: Tensor, notes: Notes, opset: int | None, path: Path) -> dict[str, Any]:
        """Write the graph that ``torch.export`` draws."""
        program = exported(graph, example, notes)
        try:
            with quietly():
                torch.export.save(program, path, extra_files={KEY: notes.dumps()})
        except RuntimeError as error:  # its writer hides what the disk said
            raise JobError(f"The archive cannot be written: {innermost(error)}") from error
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        return {"operators": sorted(operators)}

    def open(self, path: Path, device: str, provider: str | None, threads: int | None) -> Runner:
        """The graph as a module of torch."""
        if threads is not None:
            torch.set_num_threads(threads)
        extra = {KEY: ""}
        try:
            with quietly():
                program = torch.export.load(path, extra_files=extra)
        except Exception as error:
            raise UsageError(f"{path} is no torch.export archive that torch {torch.__version__} can read.") from error
        notes = Notes.loads(extra[KEY], path)
        if device != "cpu":  # places in the graph are constants of the device it was drawn on
            program = move_to_device_pass(program, device)
        return Runner(program.module(), notes, f"torch {torch.__version__} (torch.export)", on_host=False)


def exported(graph: OneGraphViT, example: Tensor, notes: Notes) -> Any:
    """The ``ExportedProgram`` of a model; JobError where torch cannot draw one."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if notes.largest_batch is None else None
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise JobError(f"torch.export cannot draw this model as a graph: {innermost(error)}") from error


ARCHIVE = Archive()
