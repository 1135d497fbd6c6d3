"""What is to be measured, in plain values that go from one process to another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BASELINE", "TARGET", "Request", "Subject"]

TARGET, BASELINE = "target", "baseline"
"""By which names the two sides of a comparison go."""

Kind = Literal["run", "dense", "dense of a run", "file"]


@dataclass(frozen=True)
class Subject:
    """A model to run: a run folder, the dense model of one, a dense model by its name and perhaps a weights file, or an exported file.

    ``provider`` is which of ONNX Runtime's execution providers runs a file; None for the device's own.
    """

    kind: Kind
    where: str
    weights: str | None = None
    provider: str | None = None

    @property
    def words(self) -> str:
        """It in words."""
        return f"the dense model of {self.where}" if self.kind == "dense of a run" else self.where


@dataclass(frozen=True)
class Request:
    """What a process that measures does, with one batch size: ``rounds`` timed calls of each subject in turns, or a look at memory.

    With ``stretches`` above 0 each subject then runs that many times for ``stretch_seconds`` without a pause, in turns, for energy.
    ``precision`` is that of models in PyTorch, and ``compile`` the mode of torch.compile for them; an exported file has its own.
    """

    subjects: Mapping[str, Subject]
    batch_size: int
    data: str | None
    device: str
    threads: int | None
    rounds: int
    stretches: int
    stretch_seconds: float
    purpose: Literal["time", "memory"]
    precision: str = "fp32"
    compile: str | None = None

    def dumps(self) -> str:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> Request:
        """From what :meth:`dumps` gave.

        Example:
            >>> asked = Request({"target": Subject("run", "runs/a")}, 8, None, "cpu", None, 30, 0, 0.0, "time")
            >>> Request.loads(asked.dumps()) == asked
            True
        """
        values: dict[str, Any] = json.loads(text)
        values["subjects"] = {name: Subject(**subject) for name, subject in values["subjects"].items()}
        return cls(**values)
