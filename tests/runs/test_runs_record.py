from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hesper.errors import UsageError
from hesper.runs import Entry, append, environment, read, sha256_file, utc_now, write_bytes, write_text

NOW = "2026-01-31T12:00:00+00:00"
ENTRY = Entry("prune", NOW, {"loss_budget": 0.05}, {"cpu": "x"}, {"kl": [0.1, None], "ok": True}, {"plan.toml": "ab"})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
tables = st.dictionaries(st.text(), json_values, max_size=3)


@settings(max_examples=25, deadline=None)  # every example waits for the disk
@given(st.lists(st.builds(Entry, st.text(), st.just(NOW), tables, tables, tables, st.dictionaries(st.text(), st.text())), max_size=3))
def test_what_is_appended_is_read_back(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]) -> None:
    path = tmp_path_factory.mktemp("record") / "record.json"
    append(path, ENTRY)
    for entry in entries:
        append(path, entry)
    assert read(path) == (ENTRY, *entries)


def test_the_file_has_the_documented_form(tmp_path: Path) -> None:
    append(tmp_path / "record.json", ENTRY)
    document = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert document == {"schema": 1, "entries": [dataclasses.asdict(ENTRY)]}
    assert os.listdir(tmp_path) == ["record.json"]


def test_earlier_entries_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    append(path, ENTRY)
    before = path.read_bytes().rstrip(b"]}\n ")
    append(path, Entry("eval", utc_now(), results={"top1": np.float64(0.1), "n": (1, 2)}))
    assert path.read_bytes().startswith(before)
    assert read(path)[1].results == {"top1": 0.1, "n": [1, 2]}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"results.a.b\[1\] is nan.*record None"),
        ({"a": float("-inf")}, "results.a is -inf"),
        ({"a": np.zeros(2)}, "results.a is a ndarray"),
        ({"a": Path("x")}, "results.a is a PosixPath"),
        ({"a": {1: 2}}, "results.a has the key 1; the keys of a record are strings"),
    ],
)
def test_values_that_json_cannot_hold_are_refused(tmp_path: Path, results: dict[str, Any], message: str) -> None:
    path = tmp_path / "record.json"
    append(path, ENTRY)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        append(path, Entry("eval", NOW, results=results))
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["yesterday", "2026-01-31T12:00:00", "2026-01-31T12:00:00+02:00"])
def test_times_must_be_utc(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="write UTC as ISO 8601"):
        append(tmp_path / "record.json", Entry("eval", text))
    append(tmp_path / "record.json", Entry("eval", "2026-01-31T12:00:00Z"))
    assert len(read(tmp_path / "record.json")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 1, "entries": 3}',
        '{"schema": 1, "entries": [3]}',
        '{"schema": 1, "entries": [{"kind": "eval"}]}',
        '{"schema": 1, "entries": [{"kind": 1, "time": "", "asked": {}, "environment": {}, "results": {}, "files": {}}]}',
        '{"schema": 1, "entries": [{"kind": "", "time": "", "asked": {}, "environment": {}, "results": {"a": NaN}, "files": {}}]}',
        '{"schema": 1, "entries": [',
        "[" * 100_000,
    ],
)
def test_a_damaged_record_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    for act in (lambda: read(path), lambda: append(path, ENTRY)):
        with pytest.raises(UsageError, match=r"record\.json is damaged"):
            act()
    assert path.read_text(encoding="utf-8") == text


def test_a_missing_or_newer_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(UsageError, match="there is no record at"):
        read(path)
    path.write_text('{"schema": 2, "entries": {}}', encoding="utf-8")
    with pytest.raises(UsageError, match="schema 2, newer than this hesper reads"):
        read(path)


def test_appending_from_several_threads_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: append(path, Entry("eval", NOW, results={"n": number})), range(20)))
    assert sorted(entry.results["n"] for entry in read(path)) == list(range(20))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_bytes_are_written_whole_and_hashed(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"abc")
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_environment_is_plain_and_says_what_is_there(tmp_path: Path) -> None:
    import torch

    found = environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert isinstance(found["cores"], int) and found["cores"] >= 1 and found["cpu"]
    assert {"hesper", "platform", "governor", "cuda", "timm", "numpy", "board"} <= found.keys()
    append(tmp_path / "record.json", Entry("eval", NOW, environment=found))
    assert read(tmp_path / "record.json")[0].environment == found


def test_reading_runs_needs_no_torch() -> None:
    import hesper.runs

    code = "import sys, hesper.runs; print('torch' in sys.modules)"
    source = Path(hesper.runs.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}, check=True
    )
    assert done.stdout.strip() == "False"
