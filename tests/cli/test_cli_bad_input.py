from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import Result

import hesper as package
from cli_helpers import CLASSES, NAME, QUICK, hesper, sentence, write_images, write_weights
from hesper.errors import JobError, UsageError
from hesper.hosts.open import wrap
from hesper.plan import Budget
from hesper.runs import open_run

Ask = Callable[..., Result]


def test_an_unknown_model_gets_the_nearest_names(ask: Ask) -> None:
    said = sentence(ask("--macs", 0.9, model="vit_tiny_patch16_242"), 2)
    assert "no model 'vit_tiny_patch16_242'" in said and "'vit_tiny_patch16_224'" in said


def test_a_model_that_is_no_vision_transformer_is_refused(ask: Ask, tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "resnet18" in sentence(ask("--macs", 0.9, model="resnet18", weights=tmp_path / "x.safetensors"), 2)


def test_weights_that_do_not_fit_name_their_keys(ask: Ask, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["blocks.0.attn.extra"] = state.pop("blocks.0.attn.qkv.weight")
        state["norm.weight"] = torch.zeros(3)

    said = sentence(ask("--macs", 0.9, weights=write_weights(tmp_path / "odd.safetensors", change)), 2)
    assert "missing blocks.0.attn.qkv.weight" in said and "unknown blocks.0.attn.extra" in said and "misshapen norm.weight (3,)" in said


@pytest.mark.parametrize("content", [b"", b"no tensors at all", None])
def test_weights_that_are_none(ask: Ask, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "bad.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in sentence(ask("--macs", 0.9, weights=file), 2)


def test_nan_in_the_weights_is_refused_by_name(ask: Ask, tmp_path: Path) -> None:
    bad = write_weights(tmp_path / "nan.safetensors", lambda state: state["head.bias"].fill_(float("nan")))
    said = sentence(ask("--macs", 0.9, weights=bad), 2)
    assert "NaN" in said and "head.bias" in said


def test_outputs_that_are_not_finite_end_the_job(ask: Ask, tmp_path: Path) -> None:
    bad = write_weights(tmp_path / "huge.safetensors", lambda state: state["head.weight"].fill_(3e38))
    assert "not finite" in sentence(ask("--macs", 0.9, weights=bad), 1)


def test_a_folder_without_a_readable_image_is_an_error(ask: Ask, tmp_path: Path) -> None:
    calib = write_images(tmp_path / "calib", 8)
    for file in calib.rglob("*.png"):
        file.write_bytes(f"broken {file.parent.name} {file.name}".encode())
    assert "can be decoded" in sentence(ask("--macs", 0.9, calib=calib), 2)


def test_empty_and_missing_folders(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in sentence(ask("--macs", 0.9, calib=tmp_path / "empty"), 2)
    (tmp_path / "out").rmdir()
    assert "no folder" in sentence(ask("--macs", 0.9, calib=tmp_path / "missing"), 2)


def test_a_missing_evaluation_folder_is_found_before_the_work(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.api.prune_model", None)
    assert "no folder" in sentence(ask("--macs", 0.9, "--data", tmp_path / "missing"), 2)


def test_a_class_folder_that_the_map_does_not_name(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("ant\nbee\nkat\n")
    said = sentence(ask("--macs", 0.9, "--criterion", "ce", "--class-map", tmp_path / "map.txt"), 2)
    assert "'cat'" in said and "did you mean 'kat'" in said


@pytest.mark.parametrize("criterion", ["ce", "kl"])
def test_labels_out_of_range(ask: Ask, tmp_path: Path, criterion: str) -> None:
    (tmp_path / "map.txt").write_text("\n".join(["none", "nil", *CLASSES]))
    said = sentence(ask("--macs", 0.9, "--criterion", criterion, "--class-map", tmp_path / "map.txt"), 2)
    assert "names 5 classes and the model has 3" in said


def test_an_open_model_that_timm_could_not_build_again_is_refused(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.api.prune_model", None)
    scaled = wrap(NAME, timm.create_model(NAME, num_classes=3, init_values=0.1))
    with pytest.raises(UsageError, match=r"ls1\.gamma.* could not be opened"):
        package.prune(scaled, calib=images, out=tmp_path / "run", settings=package.Settings(Budget("macs", 0.9, 0.9)))
    with pytest.raises(UsageError, match="no model 'mine' in timm"):
        package.prune(
            wrap("mine", scaled.host.module), calib=images, out=tmp_path / "run", settings=package.Settings(Budget("macs", 0.9, 0.9))
        )
    assert not (tmp_path / "run").exists()


def test_as_many_class_folders_as_classes_or_a_map(ask: Ask, tmp_path: Path) -> None:
    calib = write_images(tmp_path / "calib", 4, ("ant", "bee"))
    assert "--class-map" in sentence(ask("--macs", 0.9, "--criterion", "ce", calib=calib), 2)


def test_a_criterion_with_labels_needs_class_folders(ask: Ask, images: Path) -> None:
    assert "no class folders" in sentence(ask("--macs", 0.9, "--criterion", "heart", calib=images / "ant"), 2)


@pytest.mark.parametrize("option", ["--macs", "--loss-budget", "--max-disagreement"])
@pytest.mark.parametrize("value", ["0", "-0.5", "nan"])
def test_budgets_that_make_no_sense(ask: Ask, option: str, value: str) -> None:
    assert "must " in sentence(ask(f"{option}={value}"), 2)


@pytest.mark.parametrize(("option", "value"), [("--macs", "1.5"), ("--max-disagreement", "1.5"), ("--loss-budget", "inf")])
def test_budgets_above_what_there_is(ask: Ask, option: str, value: str) -> None:
    assert "must " in sentence(ask(option, value), 2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--refit", "--criterion", "ce"), "--refit"),
        (("--refit", "--combine", "drop"), "--refit"),
        (("--refine", "2", "--combine", "drop"), "--refine"),
        (("--refine", "2", "--no-tokens"), "--refine"),
        (("--rounds", "3", "--combine", "drop"), "--rounds"),
    ],
)
def test_learning_about_merging_where_nothing_merges(ask: Ask, words: tuple[str, ...], named: str) -> None:
    assert f"{named} is about merging tokens" in sentence(ask("--macs", 0.9, *words), 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--multiple", "4", "--counts", "fixed"), "--multiple is about counts that adapt"),
        (("--multiple", "4", "--no-tokens"), "--multiple is about counts that adapt"),
        (("--multiple", "0"), "--multiple"),
        (("--multiple", "some"), "--multiple"),
        (("--multiple", "101"), "Counts of 101 tokens at most cannot be multiples of 101; use a smaller multiple"),
        (("--rounds", "9"), "--rounds"),
        (("--rounds", "few"), "--rounds"),
    ],
)
def test_numbers_of_rounds_and_multiples_that_cannot_be(ask: Ask, words: tuple[str, ...], says: str) -> None:
    assert says in sentence(ask("--macs", 0.9, *words), 2)


@pytest.mark.parametrize(
    "setting",
    [
        {"rounds": 0},
        {"rounds": "few"},
        {"multiple": 0},
        {"multiple": 2.5},
        {"rounds": True},
        {"rank": 24.0},
        {"batch_size": 0},
        {"rank": "24"},
        {"refine": 2.5},
        {"refine": "5"},
        {"seed": 1.5},
        {"gamma": "a"},
        {"gamma": True},
        {"refit": "no"},
        {"tokens": None},
        {"heads": "some"},
    ],
)
def test_settings_that_are_no_numbers(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        package.Settings(Budget("macs", 0.9, 0.9), **setting)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("mac", 0.8, 0.9), "kind is 'mac'"),
        (("macs", "0.5", 0.9), "value is '0.5'"),
        (("macs", 0.5, None), "confidence is None"),
    ],
)
def test_budgets_that_are_none(words: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        package.Settings(Budget(*words))
    with pytest.raises(UsageError, match="draws is 2.5"):
        package.Criterion(draws=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"counts": "fixed"}, {"tokens": False}])
def test_a_multiple_where_no_counts_adapt(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="counts that adapt"):
        package.Settings(Budget("macs", 0.9, 0.9), multiple=4, **other)


def test_a_budget_out_of_reach_says_what_can_be_had(ask: Ask) -> None:
    assert "least that can be had is 0." in sentence(ask("--macs", 0.05), 1)


def test_a_loss_budget_out_of_reach(ask: Ask) -> None:
    assert "budget" in sentence(ask("--loss-budget", 1e-12), 1)


def test_too_few_images_for_the_confidence(ask: Ask) -> None:
    said = sentence(ask("--max-disagreement", 0.01, "--confidence", 0.99), 2)
    assert "at least" in said and "there are 12" in said


@pytest.mark.parametrize("confidence", ["0", "1", "95"])
def test_a_confidence_is_a_probability(ask: Ask, confidence: str) -> None:
    assert "confidence must lie between 0 and 1" in sentence(ask("--macs", 0.9, "--confidence", confidence), 2)


def test_exactly_one_budget(ask: Ask) -> None:
    assert "No budget" in sentence(ask(), 2)


def test_two_budgets_are_one_too_many(ask: Ask) -> None:
    assert "--macs, --loss-budget were given together" in sentence(ask("--macs", 0.9, "--loss-budget", 0.1), 2)


def test_nothing_to_cut(ask: Ask) -> None:
    assert "nothing to cut" in sentence(ask("--macs", 0.9, "--no-tokens"), 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--counts", "fixed"), "Fixed counts promise every image the same work, which heads that adapt break; use --heads static."),
        (("--criterion", "ce"), "use the criterion 'kl', or --heads static."),
        (("--criterion", "heart", "--no-tokens"), "use the criterion 'kl', or --heads static."),
    ],
)
def test_what_heads_that_adapt_cannot_go_with(ask: Ask, words: tuple[str, ...], says: str) -> None:
    assert says in sentence(ask("--macs", 0.9, "--heads", "adaptive", *words), 2)


def test_a_rank_above_the_width(ask: Ask) -> None:
    assert "rank" in sentence(ask("--macs", 0.9, "--rank", 1000), 2)


def test_cuda_that_is_missing(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA cannot be used here" in sentence(ask("--macs", 0.9, "--device", "cuda"), 2)


def test_a_full_disk_leaves_nothing(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hesper.artefact.safetensors.torch.save_file", full)
    assert "the disk is full" in sentence(ask("--macs", 0.9), 1)


def test_an_interruption_leaves_nothing(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hesper.api.prune_model", interrupted)
    assert sentence(ask("--macs", 0.9), 1) == "interrupted; nothing was written."


@pytest.mark.parametrize(("error", "says"), [(KeyboardInterrupt(), "complete but for its report"), (JobError("no ink"), "no ink")])
def test_a_report_that_fails_leaves_the_run(
    tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, says: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("hesper.report.write_report", fail)
    out = tmp_path / "run"
    assert says in sentence(hesper("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.9, "--out", out, *QUICK), 1)
    assert open_run(out).plan.measured is not None


@pytest.mark.parametrize("name", ["plan.toml", "model.safetensors"])
@pytest.mark.parametrize("verb", ["show", "eval", "report"])
def test_a_changed_run_is_refused(tmp_path: Path, pruned: tuple[Path, Result], images: Path, name: str, verb: str) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    content = bytearray((run / name).read_bytes())
    content[-2] ^= 1
    (run / name).write_bytes(content)
    more: dict[str, list[Any]] = {"show": [], "eval": ["--data", images], "report": ["--out", tmp_path / "report.html"]}
    assert f"{run / name} is not the file the record names" in sentence(hesper(verb, run, *more[verb]), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_record_is_refused(tmp_path: Path, pruned: tuple[Path, Result]) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    (run / "record.json").write_text("{")
    assert "record.json is damaged" in sentence(hesper("show", run), 2)
    assert open_run(pruned[0])
