from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_helpers import hesper, sentence
from hesper.benchmark.compare import compare_benches, read_bench
from hesper.runs import Entry, append


def bench_of(scale: float = 1.0, cpu: str = "A57", seed: int = 0, processes: int = 5, **more: Any) -> dict[str, Any]:
    """A bench of one batch size, around ``scale`` milliseconds: calls spread by a twentieth and processes by a fiftieth."""
    rng = np.random.default_rng(seed)
    times = (scale * (1 + 0.02 * rng.standard_normal((processes, 1))) * (1 + 0.05 * rng.standard_normal((processes, 60))) / 1000).tolist()
    slow = [[2 * t for t in process] for process in times]
    models = {"target": {"seconds": times, "joules_per_image": None}, "baseline": {"seconds": slow}}
    cell = {"batch_size": 8, "threads": 2, "models": models, "speedup": {"ratio": 2.0, "low": 1.9, "high": 2.1}}
    machine = {"fixed": {"cpu": cpu, "torch": "2.6"}, "before": {}, "after": {}}
    return {"device": "cpu", "target": "run", "baseline": None, "meter": None, "warnings": [], "machine": machine, "cells": [cell], **more}


def written(folder: Path, values: object, name: str = "bench.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder / name


def test_the_interval_holds_the_true_ratio_and_not_one_where_they_differ(tmp_path: Path) -> None:
    first, slower = (read_bench(written(tmp_path / str(scale), bench_of(scale, seed=int(scale * 10)))) for scale in (1.0, 1.5))
    found = compare_benches(first, slower)
    assert [row.model for row in found.rows] == ["target", "baseline"] and found.warnings == ()
    for row in found.rows:
        assert row.low < row.ratio < row.high and row.low < 1.5 < row.high and row.low > 1.2
    same = compare_benches(first, read_bench(written(tmp_path / "again", bench_of(1.0, seed=3))))
    assert all(row.low < 1 < row.high for row in same.rows) and found.rows[0].speedups == ((2.0, 1.9, 2.1), (2.0, 1.9, 2.1))


def test_what_is_not_alike_is_said(tmp_path: Path) -> None:
    other = bench_of(cpu="A78", device="cuda", warnings=["the processor was throttled 2 times"])
    other["cells"][0]["threads"] = 4
    files = [written(tmp_path / str(place), values) for place, values in enumerate((bench_of(), other))]
    result = hesper("compare", *files)
    assert result.exit_code == 0, result.stderr
    for words in (
        "not the same cpu: A57 and A78",
        "not the same device: cpu and cuda",
        "2 and 4",
        "the second said: the processor was throttled",
    ):
        assert words in result.stdout
    assert "1.000 [" in result.stdout and json.loads(hesper("compare", *files, "--json").stdout)["rows"][0]["batch_size"] == 8


def test_the_last_bench_of_a_record_is_taken(tmp_path: Path) -> None:
    record = tmp_path / "run" / "record.json"
    record.parent.mkdir()
    for scale in (1.0, 3.0):
        append(record, Entry("bench", "2026-01-31T12:00:00+00:00", results=bench_of(scale)))
    append(record, Entry("eval", "2026-01-31T12:00:00+00:00"))
    for where in (record, record.parent):
        assert 2.5 < 1000 * float(np.median(read_bench(where)["cells"][0]["models"]["target"]["seconds"])) < 3.5


def test_what_is_no_bench_is_refused(tmp_path: Path) -> None:
    good = written(tmp_path / "good", bench_of())
    broken = copy.deepcopy(bench_of())
    broken["cells"][0]["models"]["target"]["seconds"] = [[0.0]]
    record = tmp_path / "run" / "record.json"
    record.parent.mkdir()
    append(record, Entry("eval", "2026-01-31T12:00:00+00:00"))
    (tmp_path / "text.json").write_text("not json")
    elsewhere = bench_of()
    elsewhere["cells"][0]["batch_size"] = 1
    cases = [
        (tmp_path / "none.json", "There is no record"),
        (tmp_path / "text.json", "cannot be read as JSON"),
        (written(tmp_path / "list", [1, 2]), "holds no bench"),
        (written(tmp_path / "broken", broken), "holds no bench"),
        (record, "holds no bench; make one"),
        (written(tmp_path / "elsewhere", elsewhere), "no batch size with times in common"),
    ]
    for file, says in cases:
        assert says in sentence(hesper("compare", good, file), 2)


@pytest.mark.parametrize("seed", range(5))
def test_two_takes_of_one_thing_agree(seed: int, tmp_path: Path) -> None:
    files = [written(tmp_path / str(place), bench_of(seed=10 * seed + place)) for place in range(2)]
    (row, _) = compare_benches(*(read_bench(file) for file in files)).rows
    assert 0.93 < row.ratio < 1.07


def test_one_process_is_compared_by_its_calls_and_a_warning_says_what_they_do_not_know(tmp_path: Path) -> None:
    files = [written(tmp_path / str(scale), bench_of(scale, processes=1)) for scale in (1.0, 2.0)]
    found = compare_benches(*(read_bench(file) for file in files))
    assert all(row.low < 2 < row.high and row.high / row.low < 1.2 for row in found.rows)
    assert any("single process" in warning for warning in found.warnings)


def test_another_runtime_is_a_warning(tmp_path: Path) -> None:
    benches = [bench_of(), bench_of()]
    for bench, runtime in zip(benches, ("torch 2.6.0+cu124", "torch 2.7.1, fp16"), strict=True):
        bench["cells"][0]["models"]["target"]["runtime"] = runtime
    found = compare_benches(*(read_bench(written(tmp_path / str(place), bench)) for place, bench in enumerate(benches)))
    assert found.warnings == ("not the same runtime: torch and torch, fp16",)


@pytest.mark.parametrize("seconds", [[], [[]], [[0.1], []], [0.1, 0.2], [[0.1, float("nan")]], "fast"])
def test_times_that_are_none_are_refused(tmp_path: Path, seconds: object) -> None:
    broken = bench_of()
    broken["cells"][0]["models"]["target"]["seconds"] = seconds
    assert "holds no bench" in sentence(hesper("compare", written(tmp_path, broken), written(tmp_path / "b", bench_of())), 2)
