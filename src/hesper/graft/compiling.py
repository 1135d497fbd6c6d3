"""What ``torch.compile`` may look into: a host's halves, and nothing that decides, packs or unpacks.

Token counts depend on the images, so a graph over them would be made anew for almost every batch. The halves see rows alone: one
graph for any number of them serves all blocks of a shape. Where counts are fixed, :mod:`hesper.graft.one_graph` is one graph in all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

REASON = (
    "Which tokens stay is decided image by image, so a grafted model does not compile as one graph; use hesper.compiled, which makes one "
    "where counts are fixed, or torch.compile without fullgraph."
)

# Older releases of torch refuse without saying why.
_WHY: dict[str, Any] = {"reason": REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}

Run = TypeVar("Run", bound=Callable[..., Any])


def seam(function: Run) -> Run:
    """A function that is never compiled itself, while what it calls may be."""
    return cast(Run, torch.compiler.disable(function, recursive=False, **_WHY))  # type: ignore[no-untyped-call]


def eager(function: Run) -> Run:
    """A function that is never compiled, nor anything it calls."""
    return cast(Run, torch.compiler.disable(function, **_WHY))  # type: ignore[no-untyped-call]
