"""What a job has finished so far, kept in a folder beside its result, so that a killed job goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError

from hesper.errors import HesperError, Interrupted, UsageError
from hesper.parallel import Alone, Team, jointly
from hesper.runs import write_bytes, write_text

if sys.platform != "win32":
    import fcntl

__all__ = ["Kept", "KeptNowhere", "Pace", "Work", "work_beside"]

_SHARE = 20  # keeping may take one part in so many of the time


@dataclass(frozen=True, eq=False)
class Kept:
    """Arrays by name, and notes in plain values."""

    arrays: Mapping[str, NDArray[Any]]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Work(Protocol):
    """Where a job keeps what it has finished."""

    def load(self, name: str) -> Kept | None:
        """What was kept under ``name``, or None."""

    def save(self, name: str, kept: Kept) -> None:
        """Keep something under ``name``, whole or not at all, in place of what was there."""

    def rows(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, *, new: bool) -> NDArray[Any]:
        """An array for more numbers than memory should hold; with ``new`` empty, otherwise as it was left (OSError: it is not whole)."""


class KeptNowhere:
    """For a job that need not go on: arrays live in memory, and nothing is kept."""

    def load(self, name: str) -> Kept | None:
        """Nothing."""
        return None

    def save(self, name: str, kept: Kept) -> None:
        """Nothing."""

    def rows(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, *, new: bool) -> NDArray[Any]:
        """An array in memory."""
        return np.empty(shape, dtype)


class Pace:
    """Says when to keep what has grown since: so often that keeping takes at most a twentieth of the time."""

    def __init__(self) -> None:
        self._cost, self._since = 0.0, time.monotonic()

    def due(self) -> bool:
        """Whether enough was done since the last time."""
        return time.monotonic() - self._since >= _SHARE * self._cost

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Take the time that keeping takes."""
        started = time.monotonic()
        yield
        self._since = time.monotonic()
        self._cost = self._since - started


class _Folder:
    """A process's files in the work folder."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part

    def load(self, name: str) -> Kept | None:
        try:
            with safetensors.safe_open(self._file(name), "np") as file:
                return Kept({key: file.get_tensor(key) for key in list(file.keys())}, json.loads((file.metadata() or {})["notes"]))
        except (OSError, SafetensorError, KeyError, ValueError):  # not there, or damaged: then it is done again
            return None

    def save(self, name: str, kept: Kept) -> None:
        arrays = {key: np.asarray(value, order="C") for key, value in kept.arrays.items()}
        write_bytes(self._file(name), safetensors.numpy.save(arrays, {"notes": json.dumps(kept.notes)}))

    def rows(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, *, new: bool) -> NDArray[Any]:
        if 0 in shape:
            return np.empty(shape, dtype)
        path, size = self.path / f"{name}.{self.part}.rows", int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not new and path.stat().st_size != size:  # mapped memory would make up what is missing
            raise FileNotFoundError(f"{path} is damaged")
        if new:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # on a full disk, writing to mapped memory would end the process without a word
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
        return np.memmap(path, dtype, "r+", shape=shape)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.{self.part}.safetensors"

    def kept(self) -> bool:
        return any(self.path.glob("*.safetensors"))


@contextlib.contextmanager
def work_beside(
    out: str | Path,
    request: Mapping[str, Any],
    *,
    team: Team | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Work]:
    """The work folder of the result ``out``, with what an earlier process kept for the same ``request`` (names to plain values).

    It is removed when the job is done, or fails in a way that trying again would not mend; it stays when the job is stopped. Work
    for another request is removed, and ``note`` is told. Of the processes of a ``team`` that of rank 0 takes the folder and removes it.
    UsageError when ``out`` exists or cannot be written, or is being made by another process; Interrupted in place of
    KeyboardInterrupt where something is kept.
    """
    team = team or Alone()
    target = Path(os.path.abspath(out))
    if os.path.lexists(target):
        raise UsageError(f"{out} exists already; give --out a new folder or remove the old one")
    path = target.with_name(f".{target.name}.work")
    with contextlib.ExitStack() as held:
        # The folder is rank 0's to take: what is in it may be another job's until then.
        made = jointly(team, lambda: _taken(path, out, held) if team.rank == 0 else [])
        jointly(team, lambda: _make(path))  # elsewhere than on rank 0's machine it may not be there
        work = _Folder(path, f"{team.rank}of{team.size}")
        if team.rank == 0:  # a process killed while it wrote the result left this
            for partial in target.parent.glob(f".{target.name}.*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        try:
            jointly(team, lambda: _begin(work, request, note or (lambda text: None)))
            yield work
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            if stopped and work.kept():
                what = str(error) if isinstance(error, Interrupted) else "interrupted; run the same command again"
                raise Interrupted(f"{what}, and it goes on with what {path.name} keeps") from error
            # Trying again would not mend other errors that are understood; on a full disk, what is kept may be what fills it.
            if team.rank == 0 and (not work.kept() or isinstance(error, (HesperError, OSError))):
                _remove(path, made)
            raise
        if team.rank == 0:
            _remove(path, [])


def _taken(path: Path, out: str | Path, held: contextlib.ExitStack) -> list[Path]:
    """Take the folder as long as ``held`` is open; gives the folders that were made for it."""
    made = _make(path)
    held.enter_context(_locked(path / "lock", out))
    return made


def _begin(work: _Folder, request: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Use what is there for the same request; remove what is there for another."""
    manifest = work.path / f"request.{work.part}.json"
    text = json.dumps(request, sort_keys=True, default=str)
    found = _read(manifest)
    if found == json.loads(text):
        if work.kept():
            note(f"Goes on with the work of an earlier process, kept in {work.path.name}.")
        return
    wanted = json.loads(text)
    other = sorted(name for name in wanted if found.get(name) != wanted[name]) if found else []
    team = work.part.partition("of")[2]
    if not found and any(file.stem.rpartition("of")[2] != team for file in work.path.glob("request.*.json")):
        other = ["number of processes"]
    for file in list(work.path.iterdir()):
        if f".{work.part}." in file.name:
            file.unlink()
    if other:
        note(f"What {work.path.name} keeps is of another request ({', '.join(other)}) and is not used.")
    write_text(manifest, text)


def _read(manifest: Path) -> dict[str, Any]:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _make(path: Path) -> list[Path]:
    """Make the folder and those above it; gives those that were made."""
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the folder {path.parent} cannot be made or written ({reason}); give --out a place that can be") from error
    return missing


def _remove(path: Path, made: list[Path]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _locked(file: Path, out: str | Path) -> Iterator[None]:
    # The lock goes with its process, however that ends; only one process of a team takes it.
    if sys.platform == "win32":
        yield
        return
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is making {out} right now; wait for it, or give --out another folder") from error
        except OSError:  # some network file systems cannot lock
            pass
        yield
    finally:
        os.close(handle)
