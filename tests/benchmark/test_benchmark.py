"""The bench, with real processes: their times, their energy, and what becomes of those that end badly."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import hesper
from cli_helpers import NAME
from hesper.benchmark import Subject, launch
from hesper.benchmark.subject import images_for, open_subject
from hesper.errors import HesperError, UsageError


@pytest.fixture(scope="module")
def power(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of 7 watts for longer than any test takes."""
    file = tmp_path_factory.mktemp("power") / "power.csv"
    file.write_text("seconds,watts\n0,7\n600,7\n")
    return file


def test_a_run_is_measured_beside_its_dense_model(pruned: tuple[Path, Result], images: Path, power: Path) -> None:
    stages: set[str] = set()
    found = hesper.bench(
        pruned[0],
        batch_sizes=(2,),
        data=images,
        threads=1,
        rounds=5,
        processes=2,
        meter=f"replay:{power}",
        stretch_seconds=0.5,
        progress=lambda stage, *_: stages.add(stage),
    )
    (cell,) = found.cells
    assert cell.threads == 1
    assert (cell.ending, cell.reason, cell.batch_size) == ("done", None, 2) and cell.warmup_rounds >= 10
    comparison = cell.compare()
    assert comparison is not None and comparison.processes == 2 and 0 < comparison.low <= comparison.ratio <= comparison.high
    target, dense = cell.series["target"], cell.series["baseline"]
    assert 0.5 < target.macs / dense.macs < 0.9
    for series in (target, dense):
        assert [len(process) for process in series.processes] == [5, 5] and series.latency.p50 > 0 and series.device_bytes is None
        assert series.host_bytes is not None and series.host_bytes > 50e6
        total, net, reason = series.joules_per_image
        seconds = sum(each.joules for each in series.energies if each.joules is not None) / 7
        assert reason is None and len(series.energies) == 4 and 1.5 < seconds < 8
        assert total == pytest.approx(7 * seconds / sum(series.images)) and net == pytest.approx(0, abs=1e-6)
    assert found.meter == "replay (as recorded)" and found.baseline == f"the dense model of {pruned[0]}"
    assert {"Time batches of 2, 2 processes", "Warm up, batches of 2", "Measure memory"} <= stages


def test_without_a_meter_it_runs_and_says_so(weights: Path) -> None:
    found = hesper.bench(NAME, weights=weights, batch_sizes=(1,), threads=1, rounds=3, processes=1, meter="none")
    (cell,) = found.cells
    assert cell.ending == "done" and set(cell.series) == {"target"} and cell.compare() is None
    assert found.meter is None and "none was asked for" in found.meter_reason
    assert cell.series["target"].joules_per_image == (None, None, "energy was not measured")


def test_a_lack_of_memory_is_a_result_and_larger_batches_are_not_tried(weights: Path) -> None:
    found = hesper.bench(NAME, weights=weights, batch_sizes=(10**8, 10**9), threads=1, rounds=3, processes=1, meter="none")
    first, second = found.cells
    assert first.ending == second.ending == "out of memory" and first.series == {}
    assert second.reason == f"not tried: {10**8} images did not fit"


@pytest.mark.parametrize(
    ("script", "ending", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out of memory", "memory runs out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "signal 11"),
        ("raise ValueError('no such layer')", "crashed", "ValueError: no such layer"),
        ("pass", "crashed", "without a result"),
        ("print('hello'); print('{\"event\": \"tim', end='')", "crashed", "without a result"),
        ("import os, time; os.close(1); time.sleep(60)", "timed out", "did not end"),
        ("import time; time.sleep(60)", "timed out", "longer than 3 s"),
    ],
)
def test_however_a_process_ends_it_is_told(weights: Path, monkeypatch: pytest.MonkeyPatch, script: str, ending: str, reason: str) -> None:
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-c", script))
    monkeypatch.setattr(launch, "GRACE", 1.0)
    found = hesper.bench(NAME, weights=weights, rounds=3, processes=2, meter="none", timeout=3.0)
    (cell,) = found.cells
    assert cell.ending == ending and cell.reason is not None and reason in cell.reason and cell.series == {}


def test_what_a_later_process_fails_in_loses_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "second"  # the second process that starts, and every one after it, kills itself
    script = f"""
import os, pathlib, sys
mark = pathlib.Path({str(mark)!r})
if mark.exists():
    os.kill(os.getpid(), 9)
mark.touch()
{launch.START}
"""
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-c", script))
    found = hesper.bench(NAME, weights=weights, threads=1, rounds=4, processes=3, meter="none")
    (cell,) = found.cells
    (series,) = cell.series.values()
    assert cell.ending == "crashed" and cell.reason is not None and "after times were taken" in cell.reason
    assert [len(process) for process in series.processes] == [4] and series.host_bytes is None
    assert series.no_memory_because is not None and "out of memory" in series.no_memory_because


def test_wrong_requests_are_refused(tmp_path: Path, weights: Path, pruned: tuple[Path, Result]) -> None:
    for wrong in ({"rounds": 2}, {"processes": 0}, {"batch_sizes": (0,)}, {"stretch_seconds": 0.0}):
        with pytest.raises(UsageError, match="A bench needs"):
            hesper.bench(NAME, weights=weights, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no run folder"):
        hesper.bench(tmp_path / "nothing" / "there")
    with pytest.raises(UsageError, match="holds its own weights"):
        hesper.bench(pruned[0], weights=weights)
    with pytest.raises(UsageError, match="did you mean"):
        hesper.bench("vit_tiny_patch16_22", rounds=3, meter="none")
    with pytest.raises(UsageError, match="There is no meter"):
        hesper.bench(NAME, weights=weights, meter="watts")
    with pytest.raises(UsageError, match="There is no precision 'int8'; use fp32"):
        hesper.bench(NAME, weights=weights, precision="int8")
    with pytest.raises(UsageError, match="There is no mode 'fastest'"):
        hesper.bench(NAME, weights=weights, compile="fastest")


def test_halves_are_benched_beside_halves_and_said_to_be(pruned: tuple[Path, Result]) -> None:
    quick: dict[str, Any] = {"batch_sizes": (2,), "threads": 1, "rounds": 3, "processes": 1, "meter": "none", "memory": False}
    found = hesper.bench(pruned[0], precision="bf16", **quick)
    (cell,) = found.cells
    assert found.summary()["precision"] == "bf16" and found.summary()["compile"] is None
    assert cell.ending == "done" and cell.compare() is not None
    assert {each.runtime for each in cell.series.values()} == {f"torch {torch.__version__}, bf16"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_models_are_benched_and_said_to_be(weights: Path) -> None:
    quick: dict[str, Any] = {"threads": 1, "rounds": 3, "processes": 1, "meter": "none", "memory": False}
    (cell,) = hesper.bench(NAME, weights=weights, compile="default", **quick).cells
    assert cell.ending == "done" and cell.series["target"].runtime == f"torch {torch.__version__}, compiled (default)"


def test_without_a_compiler_it_says_what_to_do(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(HesperError, match=r"torch.compile cannot compile here: .*compiler.*; mend that, or leave --compile out"):
        hesper.bench(NAME, weights=weights, compile="default", threads=1, rounds=3, processes=1, meter="none")


def test_every_model_sees_the_same_pictures_normalised_as_it_expects(pruned: tuple[Path, Result], images: Path) -> None:
    own = open_subject(Subject("run", str(pruned[0])), "cpu")
    other = dataclasses.replace(own, view=dataclasses.replace(own.view, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4)))
    for data in (str(images), None):
        seen = images_for({"target": own, "baseline": other}, data, 4, "cpu")
        assert len(seen["target"]) == len(seen["baseline"]) >= 2
        for ours, theirs in zip(seen["target"], seen["baseline"], strict=True):
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (own.view.mean, own.view.std))
            back = theirs * torch.tensor((0.2, 0.3, 0.4)).view(1, -1, 1, 1) + torch.tensor((0.1, 0.2, 0.3)).view(1, -1, 1, 1)
            torch.testing.assert_close((back - mean) / std, ours, rtol=1e-4, atol=1e-5)
            assert float(back.min()) >= -1e-4 and float(back.max()) <= 1 + 1e-4
