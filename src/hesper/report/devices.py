"""What a record says of a device: times, memory and energy of a model and its baseline, batch size by batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesper.benchmark.compare import read_bench
from hesper.report.reading import number, table, text
from hesper.runs import RECORD, Entry

__all__ = ["BenchFacts", "BenchRow", "Timing", "bench_file", "benches_of"]

POINTS = ("p50", "p90", "p95", "p99")


@dataclass(frozen=True)
class Timing:
    """One model at one batch size: milliseconds of a call at four percentiles, images a second, MACs, bytes, joules an image."""

    ms: tuple[float, float, float, float]
    images_per_s: float
    macs: float | None
    bytes: float | None
    joules: float | None
    net_joules: float | None


@dataclass(frozen=True)
class BenchRow:
    """One batch size; ``speedup`` is how many times as fast the target was, with its interval."""

    batch_size: int
    ending: str
    target: Timing | None
    baseline: Timing | None
    speedup: tuple[float, float, float] | None

    @property
    def promise(self) -> float | None:
        """The speed-up that the ratio of MACs promises."""
        if self.target is None or self.baseline is None or not self.target.macs or not self.baseline.macs:
            return None
        return self.baseline.macs / self.target.macs


@dataclass(frozen=True)
class BenchFacts:
    """One bench: of what, beside what, when and on which machine in words, and what makes it doubtful.

    ``dense_baseline`` says that the baseline is the target's own dense model.
    """

    name: str
    time: str
    machine: str
    target: str
    baseline: str | None
    meter: str
    rows: tuple[BenchRow, ...]
    warnings: tuple[str, ...]
    dense_baseline: bool = False

    def at(self, batch_size: int) -> BenchRow | None:
        """Its row of a batch size, if the target has times there."""
        return next((row for row in self.rows if row.batch_size == batch_size and row.target is not None), None)


def benches_of(entries: Sequence[Entry], name: str) -> tuple[BenchFacts, ...]:
    """The benches that a run's record holds, oldest first."""
    made = [_bench(entry.results, name, entry.time) for entry in entries if entry.kind == "bench"]
    return tuple(bench for bench in made if bench.rows)


def bench_file(where: str | Path) -> BenchFacts:
    """A bench from elsewhere: a run folder, a copied ``record.json``, or what ``hesper bench --json`` printed.

    Raises:
        UsageError: there is none.
    """
    path = Path(where)
    name = path.resolve().name if path.is_dir() else path.stem if path.name != RECORD else path.resolve().parent.name
    return _bench(read_bench(path), name, "")


def _bench(results: Mapping[str, Any], name: str, time: str) -> BenchFacts:
    fixed = table(table(results.get("machine")).get("fixed"))
    cells = results.get("cells")
    rows = [row for cell in (cells if isinstance(cells, (list, tuple)) else ()) if (row := _row(table(cell))) is not None]
    said = results.get("warnings")
    return BenchFacts(
        name=name,
        time=time,
        machine=_machine(fixed, text(results.get("device"))),
        target=text(results.get("target")) or "not said",
        baseline=text(results.get("baseline")),
        meter=text(results.get("meter")) or f"none: {text(results.get('meter_reason')) or 'not said'}",
        rows=tuple(rows),
        dense_baseline=results.get("baseline_kind") == "dense of a run",
        warnings=tuple(words for words in said if isinstance(words, str)) if isinstance(said, (list, tuple)) else (),
    )


def _machine(fixed: Mapping[str, Any], device: str | None) -> str:
    where = text(fixed.get("cuda")) if device == "cuda" else None
    name = text(fixed.get("board")) or text(fixed.get("cpu")) or "unknown machine"
    cores = number(fixed.get("cores"))
    words = [where or name, *([f"{cores:.0f} cores"] if cores and not where else [])]
    for what, key in (("power mode", "power_mode"), ("governor", "governors"), ("torch", "torch")):
        words += [f"{what} {value}"] if (value := text(fixed.get(key))) else []
    return ", ".join(words)


def _row(cell: Mapping[str, Any]) -> BenchRow | None:
    size, models, gain = number(cell.get("batch_size")), table(cell.get("models")), table(cell.get("speedup"))
    if size is None or size < 1:
        return None
    ratio, low, high = (number(gain.get(name)) for name in ("ratio", "low", "high"))
    speedup = None if ratio is None or low is None or high is None else (ratio, low, high)
    reason = text(cell.get("reason"))
    ending = (text(cell.get("ending")) or "not said") + (f": {reason}" if reason else "")
    return BenchRow(int(size), ending, _timing(table(models.get("target"))), _timing(table(models.get("baseline"))), speedup)


def _timing(model: Mapping[str, Any]) -> Timing | None:
    spread, rate = table(model.get("latency_ms")), number(model.get("images_per_s"))
    ms = [found for point in POINTS if (found := number(spread.get(point))) is not None and found > 0]
    if len(ms) != len(POINTS) or rate is None:
        return None
    held = number(model.get("device_bytes")) or number(model.get("host_bytes"))
    joules, net = (number(model.get(name)) for name in ("joules_per_image", "net_joules_per_image"))
    return Timing((ms[0], ms[1], ms[2], ms[3]), rate, number(model.get("macs_mean")), held, joules, net)
