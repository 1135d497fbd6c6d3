"""Threads that decode: none of them brings helpers, and they end with the iterator they belong to."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hesper.data import ImageSet, batches, open_folder
from hesper.errors import UsageError


def images(folder: Path, seen: list[tuple[str, int]]) -> ImageSet:
    for number in range(6):
        Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(folder / f"{number}.png")

    def transform(image: Image.Image) -> Tensor:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    return open_folder(folder, transform=transform, class_map=None, labelled=False)


def decoding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hesper-decode")]


def test_operators_in_a_decoding_thread_use_no_others_and_everyone_else_keeps_theirs(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    later: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [len(batch.images) for batch in batches(images(tmp_path, seen), 4)] == [4, 2]
        assert len(seen) == 6 and all(name.startswith("hesper-decode") and threads == 1 for name, threads in seen)
        assert torch.get_num_threads() == 3
        new = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


def test_threads_that_cannot_start_leave_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, started = threading.Thread.start, list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="start new thread"):
            next(batches(images(tmp_path, []), 2, workers=2))
        assert started and not decoding() and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_fails_ends_the_iterator_and_its_threads(tmp_path: Path) -> None:
    found = images(tmp_path, [])
    Image.new("RGB", (5, 4)).save(tmp_path / "3.png")
    held = batches(found, 2)
    assert len(next(held).images) == 2
    with pytest.raises(UsageError, match="different shapes"):
        next(held)
    assert not decoding() and list(held) == []


def test_that_nothing_could_be_decoded_is_said_once(tmp_path: Path) -> None:
    found = images(tmp_path, [])
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"no picture")
    held = batches(found, 4)
    with pytest.raises(UsageError, match="decoded"):
        next(held)
    assert list(held) == []


def test_an_iterator_still_held_when_the_program_ends_says_nothing(tmp_path: Path) -> None:
    images(tmp_path, [])
    program = (
        "import sys, numpy, torch\nfrom hesper.data import batches, open_folder\n"
        "def transform(image): return torch.from_numpy(numpy.array(image))\n"
        "held = batches(open_folder(sys.argv[1], transform=transform, class_map=None, labelled=False), 2)\nnext(held)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_iterator_that_nobody_holds_any_more_ends_its_threads(tmp_path: Path) -> None:
    held = batches(images(tmp_path, []), 2, workers=2)
    next(held)
    assert len(decoding()) == 2
    del held
    assert not decoding()
    assert len(next(iter(batches(images(tmp_path, []), 2))).images) == 2
    assert not decoding()
