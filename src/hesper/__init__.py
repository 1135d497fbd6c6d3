"""Hesper: Hessian-guided pruning for edge runtimes.

``prune``, ``load``, ``evaluate``, ``bench`` and ``export`` are the verbs of the command line, in Python. They are imported when first
used, so that the words of the project (``hesper.plan``, ``hesper.runs``) stay free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hesper.version import __version__

if TYPE_CHECKING:
    from hesper.api import evaluate, load, prune
    from hesper.benchmark import bench
    from hesper.exporting import export
    from hesper.graft.one_graph import compiled
    from hesper.heart.criteria import Criterion
    from hesper.heart.settings import Settings
    from hesper.hosts.open import open_model

_DOORS = {
    "Criterion": "hesper.heart.criteria",
    "Settings": "hesper.heart.settings",
    "bench": "hesper.benchmark",
    "compiled": "hesper.graft.one_graph",
    "evaluate": "hesper.api",
    "export": "hesper.exporting",
    "load": "hesper.api",
    "open_model": "hesper.hosts.open",
    "prune": "hesper.api",
}

__all__ = ["Criterion", "Settings", "__version__", "bench", "compiled", "evaluate", "export", "load", "open_model", "prune"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'hesper' has no attribute {name!r}")
