"""What a bench found: raw times of every call, memory, energy, and what became of every batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hesper.measure.fingerprint import Fingerprint, warnings_between
from hesper.measure.latency import Latency, latency
from hesper.measure.processes import Ratio, ratio_in_turns
from hesper.meters import Energy

__all__ = ["Bench", "Cell", "Ending", "Series"]

Ending = Literal["done", "out of memory", "crashed", "timed out", "refused", "interrupted"]


@dataclass(frozen=True)
class Series:
    """One model at one batch size.

    ``processes`` has the seconds of each timed call of every process, in order; ``macs`` an image, a mean; peaks of memory in bytes,
    loading included, or why there are none; ``energies`` of stretches without a pause and ``images`` that ran in each; ``runtime`` is what
    ran it.
    """

    processes: tuple[tuple[float, ...], ...]
    macs: float
    host_bytes: int | None = None
    device_bytes: int | None = None
    energies: tuple[Energy, ...] = ()
    images: tuple[int, ...] = ()
    no_memory_because: str | None = None
    runtime: str | None = None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each timed call, whichever process it was in."""
        return tuple(each for process in self.processes for each in process)

    @property
    def latency(self) -> Latency:
        """How single calls are spread."""
        return latency(self.seconds)

    @property
    def joules_per_image(self) -> tuple[float | None, float | None, str | None]:
        """Joules an image, in all and without what the machine draws at rest; or None twice and why.

        Where the rest before was not read well enough only the second is None.
        """
        if not self.energies:
            return None, None, "energy was not measured"
        known = [(each, count) for each, count in zip(self.energies, self.images, strict=True) if each.joules is not None]
        if not known:
            return None, None, self.energies[0].reason
        total = sum(count for _, count in known)
        net = [each.net_joules for each, _ in known]
        rest = None if any(value is None for value in net) else sum(value for value in net if value is not None) / total
        return sum(each.joules or 0.0 for each, _ in known) / total, rest, None


@dataclass(frozen=True)
class Cell:
    """One batch size: how it ended (with a reason, where not well), the warm-up, and each model's series by name.

    ``idle_watts`` is what the machine drew at rest before energy was measured, or None and why.
    """

    batch_size: int
    ending: Ending
    reason: str | None
    warmup_rounds: int
    settled: bool
    series: Mapping[str, Series]
    threads: int | None = None
    idle_watts: float | None = None
    no_idle_because: str | None = None

    def compare(self) -> Ratio | None:
        """How many times faster the target was than the baseline, with its interval; None without both."""
        if set(self.series) != {"target", "baseline"}:
            return None
        return ratio_in_turns(self.series["baseline"].processes, self.series["target"].processes)


@dataclass(frozen=True)
class Bench:
    """A whole bench: models in words and of which kind, device, meter and what it covers or why there is none, the machine, cells.

    ``precision`` and ``compile`` are those of models in PyTorch.
    """

    target: str
    baseline: str | None
    target_kind: str
    baseline_kind: str | None
    device: str
    meter: str | None
    meter_reason: str
    before: Fingerprint
    after: Fingerprint
    cells: tuple[Cell, ...]
    precision: str = "fp32"
    compile: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes its figures doubtful, in words."""
        restless = [
            f"times of batches of {cell.batch_size} had not settled before they were taken" for cell in self.cells if _restless(cell)
        ]
        return (*warnings_between(self.before, self.after), *restless)

    def summary(self) -> dict[str, Any]:
        """Everything in plain values, as the record and ``hesper bench --json`` have it: raw times too."""
        return {
            "target": self.target,
            "baseline": self.baseline,
            "target_kind": self.target_kind,
            "baseline_kind": self.baseline_kind,
            "device": self.device,
            "precision": self.precision,
            "compile": self.compile,
            "meter": self.meter,
            "meter_reason": self.meter_reason,
            "warnings": list(self.warnings),
            "machine": {"fixed": dict(self.before.fixed), "before": dict(self.before.state), "after": dict(self.after.state)},
            "cells": [_cell(cell) for cell in self.cells],
        }


def _restless(cell: Cell) -> bool:
    return bool(cell.series) and not cell.settled


def _cell(cell: Cell) -> dict[str, Any]:
    compared = cell.compare()
    speedup = None if compared is None else dataclasses.asdict(compared)
    return {
        "batch_size": cell.batch_size,
        "ending": cell.ending,
        "reason": cell.reason,
        "warmup_rounds": cell.warmup_rounds,
        "settled": cell.settled,
        "threads": cell.threads,
        "idle_watts": cell.idle_watts,
        "no_idle_because": cell.no_idle_because,
        "speedup": speedup,
        "models": {name: _series(each, cell.batch_size) for name, each in cell.series.items()},
    }


def _series(series: Series, batch_size: int) -> dict[str, Any]:
    spread = series.latency
    total, net, reason = series.joules_per_image
    return {
        "latency_ms": {name: 1000 * getattr(spread, name) for name in ("mean", "p50", "p90", "p95", "p99")},
        "images_per_s": batch_size / spread.p50,
        "macs_mean": series.macs,
        "host_bytes": series.host_bytes,
        "device_bytes": series.device_bytes,
        "no_memory_because": series.no_memory_because,
        "runtime": series.runtime,
        "joules_per_image": total,
        "net_joules_per_image": net,
        "no_energy_because": reason,
        "seconds": [list(process) for process in series.processes],
        "stretches": [
            {"images": count, **{name: getattr(each, name) for name in ("joules", "net_joules", "watts", "readings", "reason")}}
            for each, count in zip(series.energies, series.images, strict=True)
        ],
    }
