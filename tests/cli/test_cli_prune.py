from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors import safe_open

import hesper as package
from cli_helpers import NAME, QUICK, hesper, sentence, write_images
from hesper.cli import main
from hesper.cli.options import declined
from hesper.cli.prune import BLOCKS
from hesper.heart.family import STAGES, steps_of
from hesper.plan import Budget
from hesper.plan.show import render
from hesper.runs import open_run


def test_prune_writes_a_whole_run_and_shows_the_plan(pruned: tuple[Path, Result]) -> None:
    out, result = pruned
    run = open_run(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "gallery.safetensors",
        "model.safetensors",
        "plan.toml",
        "record.json",
        "report.html",
    ]
    assert render(run.plan, declined(run)) in result.stdout
    assert str(out) in result.stdout and str(out / "report.html") in result.stdout
    assert run.plan.measured is not None and run.plan.measured.macs.mean <= 0.8
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    (out.parent / "plain").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(out.parent / "plain").stat().st_mode}
    (out.parent / "plain").unlink()


def test_the_record_says_what_was_asked_and_holds_the_evaluation(pruned: tuple[Path, Result]) -> None:
    out, result = pruned
    first, second = open_run(out).entries
    assert first.asked["macs"] == 0.8 and first.asked["criterion"] == "kl"
    (contender,) = first.results["contenders"]
    assert contender["family"] in first.results["family"] and contender["after"] <= contender["before"]
    assert first.asked["command"].startswith(f"hesper prune {NAME} --calib ") and "--blocks alternate-early" in first.asked["command"]
    assert "--temperature" not in first.asked["command"]
    assert second.kind == "eval" and second.results["evaluation"]["n"] == 24
    assert "top-1" in result.stdout


def test_the_pruned_model_loads_and_answers_like_its_record(pruned: tuple[Path, Result], images: Path, tmp_path: Path) -> None:
    assert package.load(pruned[0])(torch.zeros(2, 3, 160, 160)).shape == (2, 3)
    run = shutil.copytree(pruned[0], tmp_path / "run")  # evaluating adds to its record
    recorded = open_run(run).entries[0].results["per_image"]
    found = package.evaluate(run, data=images)
    where = [found.files.index(file) for file in recorded["files"]]
    assert len(where) >= 8
    assert found.macs[where].tolist() == recorded["macs"] and found.agreement[where].tolist() == recorded["agreement"]
    assert found.drift_kl[where] == pytest.approx(recorded["drift_kl"], abs=1e-5) and max(recorded["drift_kl"]) > 1e-4


def test_json_is_all_there_is_on_stdout(tmp_path: Path, weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    result = hesper("prune", NAME, "--weights", weights, "--calib", images, "--loss-budget", 0.5, "--out", out, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["run"] == str(out) and found["data"] is None and found["skipped"] == 0
    assert "at most 0.5 nats" in found["statement"]


@pytest.mark.parametrize(("heads", "figure"), [("static", "heads_removed"), ("adaptive", "blocks_gated")])
def test_runs_without_some_heads_load_and_evaluate(
    heads: str, figure: str, tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesper.heart.family.DECISION_TIME", 0.0)  # gates are too slow for so narrow a model
    out = tmp_path / "run"
    quick = [word for word in QUICK if word not in ("--heads", "none")]
    asked = ("prune", NAME, "--weights", weights, "--calib", images, "--loss-budget", 5, "--heads", heads, "--out", out, "--json")
    result = hesper(*asked, *quick)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)[figure] > 0
    again = hesper("eval", out, "--data", images, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["macs_ratio"] < 1


@pytest.mark.parametrize("words", [("--combine", "drop"), ("--counts", "fixed"), ("--schedule", "symmetric")])
def test_runs_of_every_kind_of_cut_load_and_evaluate(words: tuple[str, ...], tmp_path: Path, weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    result = hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.85, "--out", out, *words, *QUICK)
    assert result.exit_code == 0, result.stderr
    again = hesper("eval", out, "--data", images, "--json")
    assert again.exit_code == 0, again.stderr
    found, measured = json.loads(again.stdout), open_run(out).plan.measured
    assert measured is not None and abs(found["macs_ratio"] - measured.macs.mean) < 0.05


def test_counts_are_multiples_as_asked_and_rounds_are_measured(tmp_path: Path, weights: Path, images: Path) -> None:
    runs = {}
    for name, words in (("asked", ("--multiple", 5, "--rounds", 3)), ("auto", ())):
        result = hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.85, "--out", tmp_path / name, *words, *QUICK)
        assert result.exit_code == 0, result.stderr
        runs[name] = open_run(tmp_path / name)
        left = package.load(tmp_path / name).run(torch.rand(6, 3, 160, 160)).traffic.attended
        multiple = runs[name].plan.tokens[0].multiple
        assert f"in multiples of {multiple}" in hesper("show", tmp_path / name).stdout
        assert ((left % multiple == 0) | (left == 101)).all() and (left < 101).any()
    first, second = (runs[name].plan for name in ("asked", "auto"))
    assert first.pricing is not None and second.pricing is not None
    assert (first.tokens[0].multiple, first.pricing.rounds) == (5, 3)
    assert second.tokens[0].multiple == steps_of(second.model.anatomy) == 4 and second.pricing.rounds in (1, 2)


def test_a_budget_that_steps_cannot_keep_is_kept_without_them(tmp_path: Path, weights: Path, images: Path) -> None:
    words = ("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.307, *QUICK)
    said = sentence(hesper(*words, "--multiple", 8, "--out", tmp_path / "steps"), 1)
    assert "with counts in multiples of 8; smaller multiples keep less" in said
    result = hesper(*words, "--out", tmp_path / "auto")
    assert result.exit_code == 0, result.stderr
    assert {cut.multiple for cut in open_run(tmp_path / "auto").plan.tokens} == {1}


def test_the_command_line_and_python_ask_for_the_same_by_default() -> None:
    own = {field.name: field.default for field in dataclasses.fields(package.Settings) if field.default is not dataclasses.MISSING}
    asked = {option.name: option.default for option in main.commands["prune"].params}  # type: ignore[attr-defined]
    shown = {name: asked[name] for name in own if name in asked and name != "criterion"}
    assert shown == {name: own[name] for name in shown} and {"rank", "gamma", "rounds", "refine", "heads", "blocks", "seed"} <= shown.keys()
    criterion = {field.name: field.default for field in dataclasses.fields(package.Criterion)}
    assert (asked["criterion"], asked["temperature"], asked["draws"]) == tuple(criterion[name] for name in ("name", "temperature", "draws"))


def test_every_set_of_blocks_can_be_asked_for() -> None:
    assert set(BLOCKS) == set(STAGES) and len(BLOCKS) == len(STAGES)


def test_a_failed_evaluation_leaves_the_finished_run(tmp_path: Path, weights: Path, images: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "data"
    (data / "ant").mkdir(parents=True)
    (data / "ant" / "broken.png").write_bytes(b"no picture")
    words = ("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.9, "--out", out, "--data", data, "--no-labels")
    said = sentence(hesper(*words, *QUICK), 1)
    assert "can be decoded" in said and "complete but for its evaluation" in said
    assert [entry.kind for entry in open_run(out).entries] == ["prune"]


def test_copies_of_fitting_images_do_not_verify(tmp_path: Path, weights: Path, images: Path) -> None:
    calib = shutil.copytree(images, tmp_path / "calib")
    for file in sorted(calib.rglob("*.png")):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    result = hesper("prune", NAME, "--weights", weights, "--calib", calib, "--macs", 0.9, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.stderr
    made = open_run(tmp_path / "run").plan.provenance
    assert made.fit_images == 24 and made.verify_images < 24


def test_unreadable_files_are_named_skipped_and_counted(tmp_path: Path, weights: Path) -> None:
    calib = write_images(tmp_path / "calib", 8)
    (calib / "ant" / "broken.png").write_bytes(b"no picture")
    (calib / "bee" / "notes.txt").write_text("not an image")
    out = tmp_path / "run"
    result = hesper("prune", NAME, "--weights", weights, "--calib", calib, "--macs", 0.9, "--out", out, "--data", calib, *QUICK)
    assert result.exit_code == 0, result.stderr
    # On a busy machine stages that took over two seconds have said so before.
    said = result.stderr.splitlines()[-1]
    assert said.startswith("Skipped 4 files: bee/notes.txt (not an image by its file name); ant/broken.png (not an image); ")
    assert open_run(out).entries[1].results["evaluation"]["n"] == 24


def test_the_same_seed_makes_the_same_plan(tmp_path: Path, pruned: tuple[Path, Result], weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    result = hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.8, "--out", out, *QUICK)
    assert result.exit_code == 0, result.stderr
    first, second = open_run(pruned[0]).plan, open_run(out).plan
    assert (first.tokens, first.heads, first.measured) == (second.tokens, second.heads, second.measured)


def test_an_existing_folder_is_refused_and_stays(tmp_path: Path, pruned: tuple[Path, Result], weights: Path, images: Path) -> None:
    taken = tmp_path / "run"
    shutil.copytree(pruned[0], taken)
    result = hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.9, "--out", taken, *QUICK)
    assert "exists already" in sentence(result, 2)
    assert open_run(taken).plan == open_run(pruned[0]).plan and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (("--counts", "fixed"), 0.8),
        (("--counts", "fixed", "--schedule", "symmetric"), 0.66),
        (("--schedule", "symmetric"), 0.8),
        (("--combine", "drop", "--counts", "fixed"), 0.8),
        (("--no-tokens", "--heads", "static"), 0.95),
        (("--no-tokens", "--heads", "static"), 0.85),
        (("--no-tokens", "--heads", "adaptive"), 0.9),
        (("--heads", "adaptive"), 0.8),
        (("--heads", "adaptive", "--combine", "drop", "--schedule", "symmetric"), 0.8),
        (("--criterion", "ce"), 0.8),
        (("--criterion", "heart", "--combine", "drop"), 0.8),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_budget_of_macs_is_kept_and_nearly_spent_whatever_is_cut(
    words: tuple[str, ...], share: float, tmp_path: Path, weights: Path, images: Path
) -> None:
    out = tmp_path / "run"
    result = hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", share, "--out", out, *QUICK, *words)
    assert result.exit_code == 0, result.stderr
    measured = open_run(out).plan.measured
    assert measured is not None
    assert share - 0.03 - 3 * measured.macs.stderr < measured.macs.mean <= share


def test_a_gated_run_is_the_model_that_was_verified_and_turns_with_its_dial(tmp_path: Path, weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    words = ("--weights", weights, "--calib", images, "--macs", 0.9, *QUICK, "--no-tokens", "--heads", "adaptive")
    assert hesper("prune", NAME, *words, "--out", out).exit_code == 0
    run = open_run(out)
    assert [gate.block for gate in run.plan.gates] == list(range(6)) and not run.plan.tokens and run.plan.dial is not None
    assert len(run.entries[0].results["gates_explained"]) == 6 and any(point.verified for point in run.plan.points)
    shown = hesper("show", out)
    assert shown.exit_code == 0 and "if <= " in shown.stdout
    page = (out / "report.html").read_text()
    assert "In 6 blocks heads sit out image by image." in page and "nats sit out" in page
    milder = hesper("eval", out, "--data", images, "--dial", run.plan.dial / 8, "--json")
    whole = hesper("eval", out, "--data", images, "--json")
    assert milder.exit_code == 0 and whole.exit_code == 0, milder.stderr
    assert json.loads(whole.stdout)["macs_ratio"] < json.loads(milder.stdout)["macs_ratio"]


def test_sets_of_blocks_are_compared_on_all_fitting_images(
    tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesper.heart.prune.TUNE_IMAGES", 4)
    stages: dict[str, int] = {}
    package.prune(
        NAME,
        weights=weights,
        calib=images,
        out=tmp_path / "run",
        settings=package.Settings(Budget("macs", 0.9, 0.9), package.Criterion(draws=1), rank=4, heads="none", batch_size=8),
        progress=lambda stage, done, total: stages.update({stage: total}),
    )
    compared = {stage: total for stage, total in stages.items() if stage.startswith("Compare sets of blocks")}
    assert len(compared) > 1 and set(compared.values()) == {12}
    assert {total for stage, total in stages.items() if stage.startswith("Search the dial")} == {4}


def test_prices_are_fitted_again_along_the_cut_and_kept_where_they_drift_less(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesper.heart.prune.TUNE_IMAGES", 8)
    monkeypatch.setattr("hesper.heart.prune.LEAST_FIT_IMAGES", 8)
    images = write_images(tmp_path / "calib", 32)
    words = ("--weights", weights, "--calib", images, "--macs", 0.75, "--refine", 0, "--rounds", 2, "--multiple", 1, *QUICK)
    runs = {}
    for switch in ("--refit", "--no-refit"):
        result = hesper("prune", NAME, *words, switch, "--out", tmp_path / switch)
        assert result.exit_code == 0, result.stderr
        runs[switch] = open_run(tmp_path / switch).plan
        assert ("along the cut model" in hesper("show", tmp_path / switch).stdout) == (switch == "--refit")
    again, plain = runs["--refit"], runs["--no-refit"]
    assert again.pricing is not None and plain.pricing is not None and (again.pricing.refit, plain.pricing.refit) == (True, False)
    assert [cut.block for cut in again.tokens] == [cut.block for cut in plain.tokens]
    first, second = (package.load(tmp_path / switch) for switch in ("--refit", "--no-refit"))
    assert all(not torch.equal(first.deciders[block].root, second.deciders[block].root) for block in first.deciders)


def test_merging_is_refined_on_images_that_do_not_place_the_dial(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.heart.prune.TUNE_IMAGES", 8)
    monkeypatch.setattr("hesper.heart.prune.LEAST_FIT_IMAGES", 8)
    images = write_images(tmp_path / "calib", 16)
    words = ("--weights", weights, "--calib", images, "--macs", 0.5, *QUICK)
    for name, epochs in (("plain", 0), ("refined", 6)):
        result = hesper("prune", NAME, *words, "--refine", epochs, "--out", tmp_path / name)
        assert result.exit_code == 0, result.stderr
    plain, refined = (open_run(tmp_path / name) for name in ("plain", "refined"))
    assert plain.plan.pricing is not None and refined.plan.pricing is not None and refined.plan.measured is not None
    assert (plain.plan.pricing.refine, refined.plan.pricing.refine) == (0, 6)
    assert "learned in 6 epochs" in " ".join(hesper("show", tmp_path / "refined").stdout.split())
    drift = [json.loads(hesper("eval", tmp_path / name, "--data", images, "--json").stdout)["drift_kl"] for name in ("plain", "refined")]
    assert drift[1] < drift[0]
    model = package.load(tmp_path / "refined")
    assert not torch.equal(model.size_exponent, torch.ones_like(model.size_exponent))
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "refined")]
    with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as two:
        network = [key for key in one.keys() if key.startswith("network.")]  # noqa: SIM118  # no mapping
        assert network and all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in network)


def test_why_what_could_improve_a_run_did_not_is_said(tmp_path: Path, weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    words = ("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.75, "--no-refit", "--json", "--out", out, *QUICK)
    result = hesper(*words)
    assert result.exit_code == 0, result.stderr
    refit, refine = (json.loads(result.stdout)["improvements"][name] for name in ("refit", "refine"))
    assert (refit["taken"], refit["why"]) == (False, "not asked for")
    assert refine["taken"] is False and "do not place the dial; it takes 64" in refine["why"]
    shown = hesper("show", out).stdout
    assert "refined   no: 0 images fit and do not place the dial" in shown and "refitted" not in shown


def test_a_disk_that_fills_after_the_run_is_written_leaves_the_run(
    tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hesper.api.append", full)
    out = tmp_path / "run"
    said = sentence(
        hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.9, "--out", out, "--data", images, *QUICK), 1
    )
    assert said.startswith("the disk is full; the run ") and "complete but for its evaluation" in said
    assert [entry.kind for entry in open_run(out).entries] == ["prune"]
