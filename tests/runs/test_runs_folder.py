from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hesper.errors import JobError, UsageError
from hesper.plan import dumps, plan_hash
from hesper.runs import MODEL, PLAN, RECORD, Entry, append, new_run, open_run, seal, sha256_file, write_text
from strategies import EXAMPLE_PLAN


def fill(folder: Path) -> None:
    write_text(folder / PLAN, dumps(EXAMPLE_PLAN))
    save_file({"weight": torch.arange(4.0)}, folder / MODEL)
    seal(folder, "prune", asked={"loss_budget": 0.05}, results={"kl": 0.03})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with new_run(tmp_path / "run") as folder:
        fill(folder)
    return tmp_path / "run"


def test_a_run_appears_whole_and_opens(run: Path) -> None:
    opened = open_run(run)
    assert opened.path == run and opened.plan == EXAMPLE_PLAN
    (entry,) = opened.entries
    assert entry.kind == "prune" and entry.asked == {"loss_budget": 0.05}
    assert entry.results == {"kl": 0.03, "plan_hash": plan_hash(EXAMPLE_PLAN)}
    assert entry.files == {PLAN: sha256_file(run / PLAN), MODEL: sha256_file(run / MODEL)}
    assert os.listdir(run.parent) == ["run"]


def test_a_run_has_the_permissions_of_any_new_folder(run: Path) -> None:
    (run.parent / "plain").mkdir()
    assert run.stat().st_mode == (run.parent / "plain").stat().st_mode


def test_nothing_is_at_the_destination_while_the_run_is_made(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as folder:
        assert not (tmp_path / "run").exists() and folder.parent == tmp_path
        fill(folder)
    assert open_run(tmp_path / "run").plan == EXAMPLE_PLAN


def test_an_existing_destination_is_refused_up_front(run: Path) -> None:
    (run.parent / "link").symlink_to(run.parent / "nowhere")
    for name in ("run", "run/", "link", "run/record.json"):
        with pytest.raises(UsageError, match="exists already"), new_run(f"{run.parent}/{name}"):
            raise AssertionError("the body must not run")
    assert sorted(os.listdir(run.parent)) == ["link", "run"]


def test_missing_parents_are_made_and_removed_again_on_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), new_run(tmp_path / "a" / "b" / "run") as folder:
        fill(folder)
        raise RuntimeError("broken")
    assert os.listdir(tmp_path) == []
    with new_run(tmp_path / "a" / "b" / "run") as folder:
        fill(folder)
    assert open_run(tmp_path / "a" / "b" / "run").plan == EXAMPLE_PLAN


def test_a_parent_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be made .file exists"), new_run(tmp_path / "file" / "run"):
        raise AssertionError("the body must not run")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, ValueError, UsageError])
def test_any_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), new_run(tmp_path / "run") as folder:
        fill(folder)
        raise failure
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_a_failed_job_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the disk is full, so .* was not written"), new_run(tmp_path / "run") as folder:
        (folder / MODEL).symlink_to("/dev/full")
        (folder / MODEL).write_bytes(b"x")
    assert os.listdir(tmp_path) == []


def test_safetensors_reports_a_full_disk_in_words_only(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the disk is full"), new_run(tmp_path / "run"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="other"), new_run(tmp_path / "run"):
        raise SafetensorError("other")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [PLAN, MODEL, RECORD])
def test_an_incomplete_run_is_neither_made_nor_opened(tmp_path: Path, run: Path, name: str) -> None:
    with pytest.raises(JobError, match=f"left without {name}"), new_run(tmp_path / "other") as folder:
        fill(folder)
        (folder / name).unlink()
    assert os.listdir(tmp_path) == ["run"]
    (run / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        open_run(run)


def test_a_destination_made_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="made by another process meanwhile"), new_run(tmp_path / "run") as folder:
        fill(folder)
        (tmp_path / "run").mkdir()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("name", [PLAN, MODEL])
def test_a_changed_file_is_named(run: Path, name: str) -> None:
    with (run / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(UsageError, match=f"{name} is not the file the record names"):
        open_run(run)


def test_a_plan_hash_that_does_not_match_is_refused(run: Path) -> None:
    document = json.loads((run / RECORD).read_text(encoding="utf-8"))
    document["entries"][0]["results"]["plan_hash"] = "0" * 64
    write_text(run / RECORD, json.dumps(document))
    with pytest.raises(UsageError, match="plan hash"):
        open_run(run)


def test_a_record_without_entries_is_refused(run: Path) -> None:
    write_text(run / RECORD, '{"schema": 1, "entries": []}')
    with pytest.raises(UsageError, match="has no entries"):
        open_run(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run folder"):
        open_run(tmp_path / "none")
    with pytest.raises(UsageError, match=r"plan\.toml is missing"):
        open_run(tmp_path)


def test_later_entries_do_not_disturb_the_check(run: Path) -> None:
    later = Entry("eval", "2026-02-01T00:00:00+00:00", results={"top1": 0.7})
    append(run / RECORD, later)
    assert open_run(run).entries[1] == dataclasses.replace(later)
