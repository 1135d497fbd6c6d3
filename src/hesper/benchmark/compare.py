"""Two benches side by side: how times differ, with an interval, and what keeps them from being compared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hesper.errors import UsageError
from hesper.measure.fingerprint import Fingerprint, differences
from hesper.measure.processes import ratio_apart
from hesper.runs import RECORD, read

__all__ = ["Compared", "Row", "compare_benches", "read_bench"]


@dataclass(frozen=True)
class Row:
    """One model at one batch size: median milliseconds in either bench, and how many times as long the second took, with 95 % interval.

    ``speedups`` are how many times as fast the target was than its baseline in either, with intervals, where both were there; ``joules``
    those of an image.
    """

    batch_size: int
    model: str
    ms: tuple[float, float]
    ratio: float
    low: float
    high: float
    speedups: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    joules: tuple[float | None, float | None]


@dataclass(frozen=True)
class Compared:
    """What two benches have in common, row by row, and in words what makes comparing them doubtful."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


def read_bench(where: str | Path) -> dict[str, Any]:
    """The last bench of a run folder or of a ``record.json``, or one that ``hesper bench --json`` printed into a file.

    Raises:
        UsageError: there is none, or the file is damaged.
    """
    path = Path(where)
    record = path / RECORD if path.is_dir() else path
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no record {record}; give a RUN folder, a record.json, or a file of 'hesper bench --json'.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{record} cannot be read as JSON; give a RUN folder, a record.json, or a file of 'hesper bench --json'."
        ) from error
    if isinstance(values, dict) and "entries" in values:
        benches = [entry for entry in read(record) if entry.kind == "bench"]
        if not benches:
            raise UsageError(f"{record} holds no bench; make one with 'hesper bench {record.parent}'.")
        values = benches[-1].results
    try:
        return _checked_bench(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{record} holds no bench; give a RUN folder, a record.json, or a file of 'hesper bench --json'.") from error


def compare_benches(first: Mapping[str, Any], second: Mapping[str, Any], seed: int = 0) -> Compared:
    """Compare what both measured; the samples of each are drawn again on their own, since they were not taken in turns.

    Raises:
        UsageError: they have no batch size with times in common.
    """
    cells = {cell["batch_size"]: cell for cell in second["cells"]}
    pairs = [(cell, cells[cell["batch_size"]]) for cell in first["cells"] if cell["batch_size"] in cells]
    rows = [_row(one, other, name, seed) for one, other in pairs for name in one["models"] if name in other["models"]]
    if not rows:
        raise UsageError("The two benches have no batch size with times in common; bench both with the same --batch-size.")
    return Compared(tuple(rows), tuple(_warnings(first, second, pairs)))


def _checked_bench(values: Mapping[str, Any]) -> dict[str, Any]:
    """A bench of which everything that is read here is of its kind; ValueError and the like where it is not."""
    fixed, warnings = dict(values["machine"]["fixed"]), values.get("warnings") or []
    if not isinstance(warnings, (list, tuple)):
        raise TypeError("warnings are no list")
    machine = {**values["machine"], "fixed": fixed}
    return {
        **values,
        "machine": machine,
        "warnings": [str(said) for said in warnings],
        "cells": [_checked(cell) for cell in values["cells"]],
    }


def _checked(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell with the times of every model as arrays, process by process; ValueError where one is none."""
    gain = cell.get("speedup")
    if gain is not None and not all(math.isfinite(gain[name]) for name in ("ratio", "low", "high")):
        raise ValueError("a speed-up is no number")
    if not all(each.get("joules_per_image") is None or math.isfinite(each["joules_per_image"]) for each in cell["models"].values()):
        raise ValueError("joules are no number")
    models = {name: {**each, "seconds": [_times(process) for process in each["seconds"]]} for name, each in cell["models"].items()}
    if not all(each["seconds"] for each in models.values()):
        raise ValueError("no times")
    return {**cell, "batch_size": int(cell["batch_size"]), "models": models}


def _times(process: Sequence[float]) -> NDArray[np.float64]:
    seconds = np.asarray(process, dtype=np.float64)
    if seconds.ndim != 1 or not len(seconds) or not ((seconds > 0) & np.isfinite(seconds)).all():
        raise ValueError("no times")
    return seconds


def _row(one: Mapping[str, Any], other: Mapping[str, Any], name: str, seed: int) -> Row:
    taken = [cell["models"][name]["seconds"] for cell in (one, other)]
    found = ratio_apart(taken[1], taken[0], seed)
    before, after = (1000 * float(np.median(np.concatenate(seconds))) for seconds in taken)
    gains = [cell.get("speedup") for cell in (one, other)]
    both = tuple((gain["ratio"], gain["low"], gain["high"]) for gain in gains) if name == "target" and all(gains) else None  # type: ignore[index]
    joules = tuple(cell["models"][name].get("joules_per_image") for cell in (one, other))
    return Row(one["batch_size"], name, (before, after), found.ratio, found.low, found.high, both, joules)  # type: ignore[arg-type]


def _runtime(cell: Mapping[str, Any], name: str) -> str:
    """In words without versions, which the machine's fingerprint has."""
    return re.sub(r" \d[\w.+]*", "", str(cell["models"][name].get("runtime") or "unknown"))


def _warnings(
    first: Mapping[str, Any], second: Mapping[str, Any], pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> list[str]:
    """What is not alike, and what each bench said of itself."""
    machines = [Fingerprint(each["machine"].get("fixed", {}), {}) for each in (first, second)]
    said = [f"not the same {difference}" for difference in differences(*machines)]
    for name in ("device", "target", "baseline", "meter"):
        if first.get(name) != second.get(name):
            said.append(f"not the same {name}: {first.get(name) or 'none'} and {second.get(name) or 'none'}")
    for one, other in pairs:
        if one.get("threads") != other.get("threads"):
            said.append(f"not as many threads for batches of {one['batch_size']}: {one.get('threads')} and {other.get('threads')}")
    runtimes = {(_runtime(one, name), _runtime(other, name)) for one, other in pairs for name in one["models"] if name in other["models"]}
    said += [f"not the same runtime: {mine} and {its}" for mine, its in sorted(runtimes) if mine != its]
    if any(len(each["seconds"]) == 1 for pair in pairs for cell in pair for each in cell["models"].values()):
        said.append("times of a single process, whose intervals know nothing of how processes differ; bench with more --processes")
    for place, each in (("first", first), ("second", second)):
        said += [f"the {place} said: {warning}" for warning in each.get("warnings", ())]
    return said
