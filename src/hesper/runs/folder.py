"""A RUN folder: plan, weights, record and report, made whole or not at all and checked when it is opened."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesper.errors import DISK_FULL, HesperError, JobError, UsageError
from hesper.plan.toml import plan_hash, read_plan
from hesper.plan.vocabulary import Plan
from hesper.runs.environment import environment
from hesper.runs.files import sha256_file, sync_folder
from hesper.runs.record import Entry, append, read, utc_now

__all__ = ["MODEL", "PLAN", "RECORD", "REPORT", "RunFolder", "new_folder", "new_run", "once_written", "open_run", "seal"]

PLAN, MODEL, RECORD, REPORT = "plan.toml", "model.safetensors", "record.json", "report.html"
_NEEDED = (PLAN, MODEL, RECORD)


@dataclass(frozen=True)
class RunFolder:
    """An opened run: its folder, its plan and its record's entries, oldest first."""

    path: Path
    plan: Plan
    entries: tuple[Entry, ...]


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` to fill; it becomes ``path`` at the end, and vanishes when anything is raised.

    UsageError when ``path`` exists or cannot be made; JobError when the disk is full.
    """
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        raise UsageError(f"{path} exists already; give --out a new folder or remove the old one")
    made_parents = _make_parents(target.parent)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        _make_folder(partial)
        yield partial
        _finish(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if not isinstance(error, HesperError) and _is_disk_full(error):
            raise JobError(f"the disk is full, so {path} was not written; free some space and run again") from error
        raise


@contextlib.contextmanager
def new_run(path: str | Path) -> Iterator[Path]:
    """:func:`new_folder` for a run, which must at the end hold plan, weights and record (JobError otherwise)."""
    with new_folder(path) as partial:
        yield partial
        for name in _NEEDED:
            if not (partial / name).is_file():
                raise JobError(f"the run was left without {name}, so {path} was not made; this is a fault of hesper, please report it")


def seal(folder: str | Path, kind: str, *, asked: Mapping[str, Any], results: Mapping[str, Any]) -> Entry:
    """Write the first entry of a run's record: the SHA-256 of plan and weights, the plan's hash and this environment."""
    root = Path(folder)
    files = {name: sha256_file(root / name) for name in (PLAN, MODEL)}
    results = {**results, "plan_hash": plan_hash(read_plan(root / PLAN))}
    entry = Entry(kind, utc_now(), asked, environment(), results, files)
    append(root / RECORD, entry)
    return entry


@contextlib.contextmanager
def once_written(what: str) -> Iterator[None]:
    """For what comes after a run is safe: where that fails or is interrupted, the error says so (``what``) and what stopped it."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise JobError(f"interrupted; {what}.") from error
    except Exception as error:
        reason = "the disk is full" if _is_disk_full(error) else str(error).strip() or type(error).__name__
        raise JobError(f"{reason.splitlines()[0].rstrip('.')}; {what}.") from error


def open_run(path: str | Path) -> RunFolder:
    """The run at ``path``; UsageError names the file that is missing or is not the one the record was sealed with."""
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"there is no run folder {path}; give the folder that --out of an earlier command named")
    for name in _NEEDED:
        if not (root / name).is_file():
            raise UsageError(f"{root / name} is missing, so {path} is no complete run; make the run again")
    entries = read(root / RECORD)
    if not entries:
        raise UsageError(f"{root / RECORD} has no entries, so {path} cannot be checked; make the run again")
    for name in (PLAN, MODEL):
        if sha256_file(root / name) != entries[0].files.get(name):
            raise UsageError(f"{root / name} is not the file the record names: it was changed; restore it or make the run again")
    plan = read_plan(root / PLAN)
    if plan_hash(plan) != entries[0].results.get("plan_hash"):
        raise UsageError(f"{root / PLAN} does not say what the record's plan hash stands for; restore it or make the run again")
    return RunFolder(root, plan, entries)


def _make_parents(parent: Path) -> list[Path]:
    missing = [folder for folder in (parent, *parent.parents) if not os.path.exists(folder)]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {parent} cannot be made ({_reason(error)}); give --out a place that can be written") from error
    return missing


def _make_folder(partial: Path) -> None:
    try:
        partial.mkdir()
    except OSError as error:
        if _is_disk_full(error):
            raise
        raise UsageError(f"{partial.parent} cannot be written ({_reason(error)}); give --out a place that can be") from error


def _finish(partial: Path, target: Path) -> None:
    for file in partial.iterdir():
        if file.is_file():
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors writes files for their owner alone
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if os.path.lexists(target):  # rename would silently take the place of an empty folder made meanwhile
        raise JobError(f"{target} was made by another process meanwhile; give --out a new folder and run again")
    partial.rename(target)
    sync_folder(target.parent)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    # safetensors reports the system's error in words only.
    return any(f"(os error {code})" in str(error) for code in DISK_FULL)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
