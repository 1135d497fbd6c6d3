"""The formats a model can be exported to: how each is written, and how a file of it is run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hesper.errors import UsageError
from hesper.exporting.notes import Notes
from hesper.graft.one_graph import OneGraphViT
from hesper.registry import Registry

__all__ = ["FORMATS", "Format", "Runner", "format_of"]


@dataclass(frozen=True, eq=False)
class Runner:
    """A file ready to run: ``run`` takes images ``[images, channels, height, width]`` in single precision and gives logits likewise.

    ``on_host`` says that it wants them in main memory, also where it runs on a device.
    """

    run: Callable[[Tensor], Tensor]
    notes: Notes
    runtime: str
    on_host: bool = True


class Format(Protocol):
    """One format; ``fused`` says that it has torch's own attention, and that one layer makes queries, keys and values there."""

    name: str
    suffix: str
    opset: int | None
    any_batch: bool
    fused: bool

    def write(self, graph: OneGraphViT, example: Tensor, notes: Notes, opset: int | None, path: Path) -> dict[str, Any]:
        """Write ``graph`` to ``path``; what is worth recording about the file, in plain values.

        ``example`` holds two images where any number may come later, else one.

        Raises:
            UsageError: a package is missing, or the runtime lacks the ``opset``.
            JobError: the model cannot be written in this format.
        """

    def open(self, path: Path, device: str, provider: str | None, threads: int | None) -> Runner:
        """A file ready to run; UsageError where it is none of this format's or of hesper's, or nothing here can run it."""


FORMATS: Registry[Format] = Registry("export format")
FORMATS.add("onnx", "hesper.exporting.onnx_format:ONNX")
FORMATS.add("torch", "hesper.exporting.torch_format:ARCHIVE")
FORMATS.add("executorch", "hesper.exporting.executorch_format:EXECUTORCH")

SUFFIXES = {".onnx": "onnx", ".pt2": "torch", ".pte": "executorch"}


def format_of(path: str | Path) -> Format:
    """The format that a file's name ends in.

    >>> format_of("vit.pt2").name
    'torch'
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path} is no exported file by its name; one ends in {', '.join(SUFFIXES)}.")
    return FORMATS[SUFFIXES[suffix]]
