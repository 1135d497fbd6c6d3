from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from cli_helpers import NAME, hesper, sentence, write_images
from hesper.cli import main
from hesper.cli.options import declined
from hesper.meters import METERS
from hesper.plan import plan_hash, render
from hesper.runs import open_run

LABELLED = ["top1", "top5", "loss", "dense_top1"]
VERBS = ["demo", "prune", "eval", "bench", "compare", "export", "show", "report", "doctor"]
CONTRACT = ["n", *LABELLED, "agreement", "drift_kl", "macs_mean", "macs_min", "macs_max", "macs_dense", "seconds"]


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_every_option_is_explained_and_every_verb_has_an_example(verb: str) -> None:
    text = hesper(verb, "--help").stdout
    assert f"Example:\n\n    hesper {verb} " in text or (verb == "demo" and "hesper demo --out" in text)
    for parameter in main.commands[verb].params:
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), parameter.name


def test_help_lists_the_verbs_and_so_does_no_verb() -> None:
    for words in ([], ["--help"], ["-h"]):
        result = hesper(*words)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        start = lines.index("Commands:") + 1
        assert [line.split()[0] for line in lines[start : start + len(VERBS)]] == VERBS
        assert "..." not in "".join(lines[start : start + len(VERBS)])


def test_wrong_words_get_one_sentence() -> None:
    assert sentence(hesper("pruen"), 2) == "There is no command 'pruen'; did you mean 'prune'?"
    assert "hesper eval --help" in sentence(hesper("eval", NAME), 2)
    assert "'kll'" in sentence(hesper("prune", NAME, "--calib", "x", "--out", "y", "--macs", 0.5, "--criterion", "kll"), 2)
    assert "--bogus" in sentence(hesper("--bogus"), 2)


def test_eval_of_a_run_prints_the_contract_and_records_it(tmp_path: Path, pruned: tuple[Path, Result], images: Path) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    (tmp_path / "data").mkdir()
    data = shutil.copytree(images, tmp_path / "data" / "val")
    (data / "ant" / "broken.png").write_bytes(b"no picture")
    result = hesper("eval", run, "--data", data, "--json")
    assert result.exit_code == 0 and "ant/broken.png (not an image)" in result.stderr
    found = json.loads(result.stdout)
    assert all(isinstance(found[key], (int, float)) for key in CONTRACT)
    assert found["n"] == 24 and found["skipped"] == 1 and found["macs_mean"] < found["macs_dense"]
    assert len(open_run(run).entries) == len(open_run(pruned[0]).entries) + 1


def test_the_dial_can_be_turned_for_an_evaluation(tmp_path: Path, pruned: tuple[Path, Result], images: Path, weights: Path) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    dial = open_run(run).plan.dial
    assert dial is not None
    mild, own, far = (hesper("eval", run, "--data", images, "--dial", dial * share, "--json") for share in (0.2, 1, 1e9))
    assert mild.exit_code == own.exit_code == far.exit_code == 0
    kept = [json.loads(result.stdout)["macs_ratio"] for result in (mild, own, far)]
    assert kept[0] > kept[1] > kept[2]
    assert kept[1] == json.loads(hesper("eval", run, "--data", images, "--json").stdout)["macs_ratio"]
    assert far.stderr.startswith("hesper: The plan was verified from ") and "Warning" not in far.stderr and not mild.stderr
    assert [entry.asked.get("dial") for entry in open_run(run).entries[-4:]] == [dial * 0.2, dial, dial * 1e9, None]
    for target, words, message in (
        (run, ("--dial", "-1"), "a price in nats, 0 or more"),
        (NAME, ("--weights", weights, "--dial", "1"), "is a dense model and has no dial"),
    ):
        result = hesper("eval", target, "--data", images, *words)
        assert result.exit_code == 2 and message in result.stderr


def test_an_evaluation_that_cannot_be_recorded_says_what_it_found(
    tmp_path: Path, pruned: tuple[Path, Result], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hesper.runs.record.write_text", full)
    said = sentence(hesper("eval", run, "--data", images), 1)
    assert "No space left" in said and "it found drift" in said and "on 24 images" in said
    assert open_run(run).entries == open_run(pruned[0]).entries


def test_a_class_map_of_another_length_is_refused(tmp_path: Path, weights: Path, images: Path) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    said = sentence(hesper("eval", NAME, "--weights", weights, "--data", images, "--class-map", tmp_path / "names.txt"), 2)
    assert "names 4 classes and the model has 3" in said


def test_eval_of_a_dense_model_drifts_nowhere(weights: Path, images: Path) -> None:
    result = hesper("eval", NAME, "--weights", weights, "--data", images, "--json")
    found = json.loads(result.stdout)
    assert (found["drift_kl"], found["agreement"], found["macs_ratio"]) == (0, 1, 1)


def test_eval_without_labels_leaves_out_what_needs_them(pruned: tuple[Path, Result], images: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    result = hesper("eval", run, "--data", images, "--no-labels")
    assert result.exit_code == 0
    assert "agreement" in result.stdout and "top-1" not in result.stdout


def test_eval_of_nothing_there(pruned: tuple[Path, Result], images: Path, weights: Path) -> None:
    assert "no run folder runs/missing" in sentence(hesper("eval", "runs/missing", "--data", images), 2)
    assert "is a file" in sentence(hesper("eval", pruned[0] / "plan.toml", "--data", images), 2)
    assert "leave --weights out" in sentence(hesper("eval", pruned[0], "--data", images, "--weights", weights), 2)


def test_an_evaluation_folder_with_a_strange_class(tmp_path: Path, pruned: tuple[Path, Result]) -> None:
    data = write_images(tmp_path / "val", 2, ("ant", "bee", "dog"))
    before = (pruned[0] / "record.json").read_bytes()
    (tmp_path / "map.txt").write_text("ant\nbee\ncat\n")
    said = sentence(hesper("eval", pruned[0], "--data", data, "--class-map", tmp_path / "map.txt"), 2)
    assert "'dog' that the class map does not name" in said
    assert (pruned[0] / "record.json").read_bytes() == before


def test_show_prints_the_plan_of_a_run_and_of_a_file(pruned: tuple[Path, Result]) -> None:
    run = open_run(pruned[0])
    for target, expected in ((pruned[0], render(run.plan, declined(run))), (pruned[0] / "plan.toml", render(run.plan))):
        result = hesper("show", target)
        assert result.exit_code == 0 and result.stdout == expected
        assert len(result.stdout.splitlines()) <= 40
        told = json.loads(hesper("show", target, "--json").stdout)
        plan = open_run(pruned[0]).plan
        assert told["hash"] == plan_hash(plan)
        assert told["plan"]["budget"] == {"kind": "macs", "value": 0.8, "confidence": 0.95}
        assert [cut["block"] for cut in told["plan"]["tokens"]] == [cut.block for cut in plan.tokens]


def test_show_of_what_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("schema = ")
    assert "not valid TOML" in sentence(hesper("show", tmp_path / "plan.toml"), 2)
    assert "is missing" in sentence(hesper("show", tmp_path), 2)
    assert "no plan at" in sentence(hesper("show", tmp_path / "missing"), 2)


def test_report_writes_a_page_and_never_over_another_unasked(tmp_path: Path, pruned: tuple[Path, Result]) -> None:
    out = tmp_path / "report.html"
    result = hesper("report", pruned[0], pruned[0], "--out", out)
    assert result.exit_code == 0 and str(out) in result.stdout
    assert out.read_text(encoding="utf-8").lstrip().startswith("<!")
    out.write_text("mine")
    assert "--force" in sentence(hesper("report", pruned[0], "--out", out), 2)
    assert out.read_text() == "mine"
    told = json.loads(hesper("report", pruned[0], "--out", out, "--force", "--json").stdout)
    assert told == {"report": str(out), "runs": [str(pruned[0])]}
    assert out.read_text(encoding="utf-8") != "mine"


def test_doctor_says_what_there_is_and_why_the_rest_is_not() -> None:
    found = json.loads(hesper("doctor", "--json").stdout)
    assert found["environment"]["torch"] and "math" in found["attention"]["cpu"]
    assert (found["cuda"]["device"] is None) == (found["cuda"]["why_not"] is not None)
    assert set(found["optional"]) == {"transformers", "datasets", "onnx", "onnxruntime", "pynvml"}
    assert found["meters"].keys() == METERS.keys() and all(state["reason"] for state in found["meters"].values())
    text = hesper("doctor").stdout
    assert all(f"meter {name}" in text for name in METERS)
    assert "CUDA" in text and "attention on cpu" in text


@pytest.mark.parametrize("error", [RuntimeError("tensor sizes\nat line 3"), ZeroDivisionError()])
def test_a_fault_of_ours_is_one_sentence_and_its_traceback_can_be_had(
    pruned: tuple[Path, Result], images: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hesper.api.evaluate", fail)
    said = sentence(hesper("eval", pruned[0], "--data", images), 1)
    assert type(error).__name__ in said and "HESPER_TRACEBACK=1" in said and "line 3" not in said
    monkeypatch.setenv("HESPER_TRACEBACK", "1")
    assert CliRunner().invoke(main, ["eval", str(pruned[0]), "--data", str(images)]).exception is error


def test_too_little_memory_is_no_fault_of_ours(pruned: tuple[Path, Result], images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.api.evaluate", lambda *_, **__: torch.empty(2**50))
    assert "smaller --batch-size" in sentence(hesper("eval", pruned[0], "--data", images), 1)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "weights.bin")

    monkeypatch.setattr("hesper.api.evaluate", fail)
    assert sentence(hesper("eval", NAME, "--data", images), 1) == "weights.bin: permission denied."


def test_the_command_line_is_also_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "hesper", "--version"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "") and found.stdout.split()[0] == "hesper"
