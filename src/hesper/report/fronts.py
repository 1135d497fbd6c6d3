"""Which of several runs to take: how good each is against what it costs in time, energy or multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from hesper.report.collect import RunFacts
from hesper.report.device_charts import Candidate, pareto_chart
from hesper.report.devices import Timing
from hesper.report.figures import significant

__all__ = ["fronts_of"]

Costs = Callable[[RunFacts], tuple[float | None, float | None]]
"""What an image costs a run, and what its dense model; None where that is not known."""


def fronts_of(runs: Sequence[RunFacts]) -> list[tuple[str, str]]:
    """A chart for every cost that at least two runs know, with what it is in words: MACs, then time and energy by batch size."""
    known = [facts for facts in runs if facts.main is not None]
    labelled = all(_figure(facts, "top1") is not None and _figure(facts, "dense_top1") is not None for facts in known)
    charts = [_chart(known, "kept MACs, share of dense", labelled, _share)]
    measured = [facts for facts in known if facts.benches]
    for machine in dict.fromkeys(facts.benches[-1].machine for facts in measured):  # times of two machines would compare these
        there = [facts for facts in measured if facts.benches[-1].machine == machine]
        for size in sorted({row.batch_size for facts in there for row in facts.benches[-1].rows}):
            images = f"batches of {size}" if size > 1 else "one image at a time"
            charts.append(_chart(there, f"ms an image, {images}", labelled, partial(_costs, size=size, of=_milliseconds), machine))
            for meter in dict.fromkeys(facts.benches[-1].meter for facts in there):
                alike = [facts for facts in there if facts.benches[-1].meter == meter]
                charts.append(_chart(alike, f"joules an image, {images}", labelled, partial(_costs, size=size, of=_joules), machine))
    return [drawn for drawn in charts if drawn is not None]


def _chart(runs: Sequence[RunFacts], cost: str, labelled: bool, costs: Costs, machine: str = "") -> tuple[str, str] | None:
    """Each run, and the dense model of each once, where their cost is known; None for fewer than two runs."""
    candidates: list[Candidate] = []
    dense: dict[str, Candidate] = {}
    for facts in runs:
        own, other = costs(facts)
        good, before = _figure(facts, "top1" if labelled else "agreement"), _figure(facts, "dense_top1") if labelled else 1.0
        if own is None or good is None:
            continue
        candidates.append(Candidate(facts.name, own, good, f"{cost} {significant(own)}"))
        if other is not None and before is not None:
            name, details = facts.plan.model.name, f"{cost} {significant(other)}, beside {facts.name}"
            dense.setdefault(name, Candidate(f"{name}, dense", other, before, details, dense=True))
    if len(candidates) < 2:
        return None
    return f"{cost}{', on ' if machine else ''}{machine}", pareto_chart(
        [*candidates, *dense.values()], cost, "top-1 accuracy" if labelled else "agreement with dense"
    )


def _figure(facts: RunFacts, name: str) -> float | None:
    return None if facts.main is None else facts.main.figures.get(name)


def _share(facts: RunFacts) -> tuple[float | None, float | None]:
    return _figure(facts, "macs_ratio"), 1.0


def _costs(facts: RunFacts, size: int, of: Callable[[Timing, int], float | None]) -> tuple[float | None, float | None]:
    """What an image costs a run and its baseline in the last bench, in batches of ``size``."""
    row = facts.benches[-1].at(size) if facts.benches else None
    if row is None or row.target is None:
        return None, None
    dense = row.baseline if facts.benches[-1].dense_baseline else None
    return of(row.target, size), None if dense is None else of(dense, size)


def _milliseconds(timing: Timing, size: int) -> float:
    return timing.ms[0] / size


def _joules(timing: Timing, _: int) -> float | None:
    return timing.joules
