"""The record: what was asked, where it ran and what came out, one entry after another, never rewritten."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hesper.errors import UsageError
from hesper.runs.files import write_text

if sys.platform != "win32":
    import fcntl

__all__ = ["Entry", "append", "read", "utc_now"]

_SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One thing that was done: its kind, UTC time (ISO 8601), request, environment, results and files by SHA-256.

    >>> Entry("eval", "2026-01-31T12:00:00+00:00", results={"top1": 0.75}).results["top1"]
    0.75
    """

    kind: str
    time: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def utc_now() -> str:
    """The time now in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append(path: str | Path, entry: Entry) -> None:
    """Add ``entry`` to the record at ``path``, made if missing; what was there stays as it was, also when this fails.

    UsageError for a damaged record and for values JSON cannot hold: NaN and infinity (use None), tensors, keys that are no strings.
    """
    target = Path(path)
    values = {key: _plain(value, key) for key, value in _fields(entry).items()}
    _check_time(entry.time, "the entry's time")
    with _locked(target.parent):
        earlier = _load(target) if target.exists() else []
        text = json.dumps({"schema": _SCHEMA, "entries": [*earlier, values]}, indent=1, allow_nan=False) + "\n"
        if json.loads(text)["entries"] != [*earlier, values]:
            raise UsageError(f"{target} would not read back as written; it was left as it was, so record plain values only")
        write_text(target, text)


def read(path: str | Path) -> tuple[Entry, ...]:
    """The entries of the record at ``path``, oldest first; UsageError names the file when it is missing or damaged."""
    return tuple(Entry(**entry) for entry in _load(Path(path)))


def _fields(entry: Entry) -> dict[str, Any]:
    return {item.name: getattr(entry, item.name) for item in dataclasses.fields(entry)}


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{path} is {float(value)}, which a record cannot hold; record None for what has no value")
        return float(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UsageError(f"{path} has the key {odd[0]!r}; the keys of a record are strings")
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise UsageError(f"{path} is a {type(value).__name__}, which a record cannot hold; record numbers, strings, lists and tables")


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        schema, entries = document["schema"], document["entries"]
        if type(schema) is int and schema > _SCHEMA:
            raise UsageError(f"{path} has schema {schema}, newer than this hesper reads ({_SCHEMA}); upgrade hesper")
        if schema != _SCHEMA or not isinstance(entries, list):
            raise ValueError("it has no list of entries")
        for index, entry in enumerate(entries):
            _check_entry(entry, f"entry {index}")
    except FileNotFoundError as error:
        raise UsageError(f"there is no record at {path}; give a RUN folder") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"the record {path} is damaged ({error or type(error).__name__}); restore it or make the run again") from error
    return entries


def _check_entry(entry: Any, what: str) -> None:
    kinds: dict[str, type] = {"kind": str, "time": str, "asked": dict, "environment": dict, "results": dict, "files": dict}
    if not isinstance(entry, dict) or entry.keys() != kinds.keys():
        raise ValueError(f"{what} needs exactly the keys {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(entry[key], kind):
            raise TypeError(f"{what} has a {key} of the wrong type")


def _check_time(text: str, what: str) -> None:
    try:
        # Before Python 3.11 fromisoformat does not know the Z that others write for UTC.
        offset = datetime.fromisoformat(text.replace("Z", "+00:00")).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise UsageError(f"{what} is {text!r}; write UTC as ISO 8601, such as {utc_now()}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Two processes that append at once would each keep only their own entry. Locking the folder leaves no lock file behind.
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot lock; appending alone is still safe there.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
