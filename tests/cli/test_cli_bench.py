from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import Result

from cli_helpers import NAME, hesper, sentence
from hesper.cli.bench import bench
from hesper.graft.one_graph import COMPILE_MODES
from hesper.precision import PRECISIONS
from hesper.runs import open_run

QUICK = ("--threads", 1, "--rounds", 3, "--processes", 1)


def test_a_run_is_benched_and_remembers_it(pruned: tuple[Path, Result], tmp_path: Path) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    result = hesper("bench", run, "--batch-size", "3,1", "--meter", "none", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [cell["batch_size"] for cell in found["cells"]] == [1, 3] and found["meter"] is None
    for cell in found["cells"]:
        target, dense = cell["models"]["target"], cell["models"]["baseline"]
        assert cell["ending"] == "done" and cell["speedup"]["low"] <= cell["speedup"]["ratio"] <= cell["speedup"]["high"]
        assert target["macs_mean"] < dense["macs_mean"] and [len(each) for each in target["seconds"]] == [
            len(each) for each in dense["seconds"]
        ] == [3]
        assert target["images_per_s"] == pytest.approx(1000 * cell["batch_size"] / target["latency_ms"]["p50"])
        assert target["joules_per_image"] is None and target["no_energy_because"] == "energy was not measured"
    entry = open_run(run).entries[-1]
    assert entry.kind == "bench" and entry.results == found and entry.asked["meter"] == "none" and entry.asked["threads"] == 1
    assert hesper("show", run).exit_code == 0 and hesper("report", run, "--out", tmp_path / "report.html").exit_code == 0


def test_energy_stands_in_the_table(weights: Path, tmp_path: Path) -> None:
    power = tmp_path / "power.csv"
    power.write_text("seconds,watts\n0,7\n600,7\n")
    words = ("--weights", weights, "--meter", f"replay:{power}", "--energy-seconds", 0.3)
    result = hesper("bench", NAME, "--baseline", "none", *words, *QUICK)
    assert result.exit_code == 0, result.stderr
    row = next(line.split() for line in result.stdout.splitlines() if "target " in line and "MiB" in line)
    assert row[:2] == ["1", "target"] and 0 < float(row[-1]) < 7 and float(row[2]) > 0
    assert "energy    replay (as recorded)" in result.stdout


def test_a_bench_that_comes_to_nothing_says_why_and_fails(weights: Path) -> None:
    result = hesper("bench", NAME, "--weights", weights, "--batch-size", 10**8, "--meter", "none", *QUICK)
    assert f"No batch size came to an end: batches of {10**8}: out of memory" in sentence(result, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--batch-size", "1,,2"), "no list of batch sizes"),
        (("--batch-size", "0"), "no list of batch sizes"),
        (("--batch-size", "²"), "no list of batch sizes"),
        (("--rounds", "1"), "--rounds"),
        (("--meter", "wattmeter"), "There is no meter 'wattmeter'"),
        (("--meter", "replay:none.csv"), "none.csv cannot be read"),
        (("--baseline", "vit_tiny_patch16_22"), "did you mean"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--precision", "tf32"), "tf32 is how NVIDIA's cards multiply"),
        (("--precision", "int4"), "--precision"),
        (("--compile", "fastest"), "--compile"),
    ],
)
def test_wrong_benches_are_refused(weights: Path, words: tuple[str, ...], says: str) -> None:
    assert says in sentence(hesper("bench", NAME, "--weights", weights, *QUICK, *words), 2)


def test_the_command_line_offers_what_there_is() -> None:
    offered = {option.name: option.type for option in bench.params}
    assert tuple(offered["precision"].choices) == PRECISIONS and tuple(offered["compile"].choices) == COMPILE_MODES  # type: ignore[attr-defined]


def test_a_record_that_cannot_be_written_loses_nothing(
    pruned: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hesper.runs.record.write_text", full)
    said = sentence(hesper("bench", run, "--baseline", "none", "--meter", "none", *QUICK), 1)
    assert "The bench is done, but" in said and "ms for batches of 1" in said
    assert open_run(run).entries == open_run(pruned[0]).entries
