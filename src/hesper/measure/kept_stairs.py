"""Staircases that were measured before on this machine, kept by its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hesper.graft.pieces import Decision
from hesper.measure.fingerprint import Fingerprint
from hesper.measure.stairs import Stairs
from hesper.plan import ModelRef
from hesper.runs import write_text

__all__ = ["folder_of_stairs", "kept_or_measured"]

FORMAT = 2


def folder_of_stairs() -> Path | None:
    """Where staircases are kept: ``hesper/stairs`` in the user's cache folder, which XDG_CACHE_HOME names; None for a user without one."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named if named and Path(named).is_absolute() else Path.home() / ".cache") / "hesper" / "stairs"
    except RuntimeError:  # in a container, for a user that the system does not know
        return None


def kept_or_measured(
    machine: Fingerprint,
    ref: ModelRef,
    device: str,
    batch_size: int,
    decisions: Sequence[Decision],
    measure: Callable[[], Stairs],
    *,
    runtime: str = "",
    keep: bool = True,
    folder: Path | None = None,
) -> Stairs:
    """The staircase of a model's shape on this machine as it was kept, or else as it is measured now.

    Another processor, other versions or settings, another number of threads: another staircase. What cannot be read is measured again,
    and what cannot be kept is not.

    Args:
        machine: its fingerprint, of which what is fixed counts.
        ref: the model; its weights do not matter.
        device: "cpu" or "cuda".
        batch_size: images at a time.
        decisions: on tokens, that are timed.
        measure: measures.
        runtime: in words, where it is another than PyTorch.
        keep: whether what is measured may serve later; False where the machine was busy.
        folder: where they are kept, instead of :func:`folder_of_stairs`.
    """
    asked: dict[str, Any] = {
        "format": FORMAT,
        "machine": dict(machine.fixed),
        "model": [ref.name, ref.library, dataclasses.asdict(ref.anatomy)],
        "device": device,
        "runtime": runtime,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "decisions": [dataclasses.asdict(each) for each in decisions],
    }
    text = json.dumps(asked, sort_keys=True)
    place = folder or folder_of_stairs()
    if place is None:
        return measure()
    file = place / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["asked"] == json.loads(text):
            return Stairs.of(values["stairs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    stairs = measure()
    if keep:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"asked": asked, "stairs": stairs.plain()}, indent=1))
        except OSError:
            pass
    return stairs
