"""How to prune: budget, criterion and method, refused where they mean nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hesper.errors import UsageError
from hesper.heart.criteria import Criterion, check_prices_heads
from hesper.heart.family import Counts, Heads, Stages
from hesper.kinds import check_kinds
from hesper.plan import Budget, Combine, Schedule, check_budget, on_device

__all__ = ["Settings"]

Runtime = Literal["torch", "onnx"]


@dataclass(frozen=True)
class Settings:
    """How to prune.

    ``rank``, ``gamma`` and ``rounds`` shape merging, whose prices are fitted again on the cut model where ``refit`` says so and which is
    refined in ``refine`` epochs (0: not at all); ``blocks`` says which blocks may let tokens go. "auto" measures which blocks, and one
    or two rounds. Adaptive counts are multiples of ``multiple``; "auto" takes :func:`~hesper.heart.family.steps_of` the model, or 1 where
    that cannot keep the budget. A budget on a device is about batches of ``device_batch`` images in a ``device_runtime``: the run as it is
    in PyTorch, or as it is exported in ONNX Runtime.
    """

    budget: Budget
    criterion: Criterion = field(default_factory=Criterion)
    combine: Combine = "merge"
    counts: Counts = "adaptive"
    schedule: Schedule = "asymmetric"
    tokens: bool = True
    heads: Heads = "static"
    rank: int = 24
    gamma: float = 0.35
    rounds: int | Literal["auto"] = "auto"
    multiple: int | Literal["auto"] = "auto"
    refit: bool = True
    refine: int = 5
    blocks: Stages | Literal["auto"] = "auto"
    batch_size: int = 32
    seed: int = 0
    device_batch: int = 1
    device_runtime: Runtime = "torch"

    def __post_init__(self) -> None:
        """Refuse words and numbers that mean nothing; UsageError names them."""
        check_budget(self.budget)
        check_kinds(self, "setting")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"The seed is {self.seed}; it must be a whole number from 0 to 2^63 - 1.")
        for name in ("rank", "batch_size", "rounds", "multiple", "device_batch"):
            number = getattr(self, name)
            if number != "auto" and number < 1:
                raise UsageError(f"The setting {name} is {number!r}; it must be a whole number of at least 1.")
        if not 0 <= self.gamma < float("inf"):
            raise UsageError(f"The setting gamma is {self.gamma}; it must be a number of at least 0.")
        if self.multiple != "auto" and (self.counts == "fixed" or not self.tokens):
            raise UsageError("A multiple is about counts that adapt; leave it at 'auto' where counts are fixed or no tokens go.")
        if self.refine < 0:
            raise UsageError(f"Merging cannot be refined in {self.refine} epochs; use 0 for not at all.")
        if self.device_runtime != "torch":
            self._check_exportable()
        if self.heads == "adaptive":
            check_prices_heads(self.criterion)
            if self.counts == "fixed":
                raise UsageError("Fixed counts promise every image the same work, which heads that adapt break; use --heads static.")

    def _check_exportable(self) -> None:
        """UsageError for what no exported file can do."""
        if not on_device(self.budget):
            raise UsageError("A runtime is about a budget on this device; use --latency, --latency-ms or --energy, or leave it out.")
        if self.heads == "adaptive":
            raise UsageError("Heads that sit out image by image are not exported; use --heads static, or --device-runtime torch.")
        if self.tokens and self.counts == "adaptive" and self.device_batch > 1:
            raise UsageError(
                f"An exported run whose counts adapt takes one image at a time, not {self.device_batch}; use --counts fixed, or "
                "--device-batch 1."
            )
