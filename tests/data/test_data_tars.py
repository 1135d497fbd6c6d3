"""Tar shards, written by another library, hold the same images as the folder they were packed from."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from cli_helpers import CLASSES, NAME, hesper, sentence, write_images
from hesper.data import ImageSet, batches, open_folder, open_images
from hesper.errors import UsageError


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def opened(where: object, class_map: tuple[str, ...] | None = None, labelled: bool | None = None) -> ImageSet:
    return open_images(str(where), transform=to_tensor, class_map=class_map, labelled=labelled)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("tars") / "folder", 4)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The folder in three shards, labels as numbers, with a further text member in every sample."""
    files = sorted(folder.rglob("*.png"))
    (folder.parent / "shards").mkdir()
    with webdataset.ShardWriter(str(folder.parent / "shards" / "calib-%04d.tar"), maxcount=4, verbose=0) as writer:
        for file in files:
            label = CLASSES.index(file.parent.name)
            writer.write({"__key__": f"{file.parent.name}/{file.stem}", "png": file.read_bytes(), "cls": label, "txt": "a caption"})
    return folder.parent / "shards"


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade,) * 3).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", ["calib-{0000..0002}.tar", "calib-*.tar", "calib-{0000,0001,0002}.tar", ""])
def test_shards_hold_what_the_folder_holds(folder: Path, packed: Path, name: str) -> None:
    plain = open_folder(folder, transform=to_tensor, class_map=None, labelled=True)
    images = opened(packed / name)
    assert images.labels == plain.labels and images.digests == plain.digests
    assert images.numbered and images.classes == ()
    for ours, theirs in zip(batches(images, 5), batches(plain, 5), strict=True):
        assert torch.equal(ours.images, theirs.images)
    assert images.files[0] == "calib-0000.tar/ant/00.png"
    assert images.sha256 == opened(packed / "calib-*.tar").sha256 != plain.sha256
    assert opened(packed, labelled=False).labels is None


def test_labels_may_be_words_or_json(tmp_path: Path) -> None:
    words = {"a.png": png(1), "a.cls": b"dog", "b.jpg": png(2), "b.json": json.dumps({"label": "cat"}).encode()}
    images = opened(pack(tmp_path / "words.tar", words))
    assert images.classes == ("cat", "dog") and images.labels == (1, 0) and not images.numbered
    assert opened(tmp_path / "words.tar", ("eel", "cat", "dog")).labels == (2, 1)
    with pytest.raises(UsageError, match="a class 'dog' that the class map does not name"):
        opened(tmp_path / "words.tar", ("eel", "cat"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "holds no images"),
        ({"a.png": png(1)}, "neither a .cls nor a .json"),
        ({"a.png": png(1), "a.json": b'{"caption": "a dog"}'}, "a .json without any of label, cls, class, target"),
        ({"a.png": png(1), "a.cls": b""}, "write a number or a class name, or give --no-labels"),
        ({"a.png": png(1), "a.json": b"{"}, "cannot be read"),
        ({"a.png": png(1), "a.cls": b"-1"}, "has the label -1"),
        ({"a.png": png(1), "a.cls": b"1", "b.png": png(2), "b.cls": b"dog"}, "some labels"),
    ],
)
def test_shards_whose_labels_cannot_serve_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        opened(pack(tmp_path / "odd.tar", members), labelled=True)


def test_a_json_about_other_things_is_no_label(tmp_path: Path) -> None:
    captions = {"a.png": png(1), "a.json": b'{"caption": "a dog", "url": "x"}', "b.png": png(2), "b.json": b'{"label": 1}'}
    shard = pack(tmp_path / "captions.tar", captions)
    assert opened(shard).labels is None and len(opened(shard)) == 2


def test_shards_that_are_not_there_or_not_whole_are_named(tmp_path: Path, packed: Path) -> None:
    for where, message in (
        (packed / "calib-{0000..0003}.tar", "there is no shard .*calib-0003.tar"),
        (packed / "other-*.tar", "no file matches"),
        (packed / "calib-0000.tar.gz", "is compressed"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(where)
    (tmp_path / "text.tar").write_text("this is no tar file")
    with pytest.raises(UsageError, match="text.tar is not a whole tar file"):
        opened(tmp_path / "text.tar")


def test_a_shard_cut_short_is_refused_and_damaged_images_are_skipped(tmp_path: Path, packed: Path) -> None:
    whole = (packed / "calib-0001.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="short.tar is not a whole tar file"):
        opened(tmp_path / "short.tar")
    with tarfile.open(packed / "calib-0001.tar") as tar:
        second = tar.getmembers()[1].offset
    torn = whole[:second] + b"\xff" * tarfile.BLOCKSIZE + whole[second + tarfile.BLOCKSIZE :]
    for damaged in (whole[:second], whole[: second + 100], torn):  # tarfile takes each of these for the end
        (tmp_path / "short.tar").write_bytes(damaged)
        with pytest.raises(UsageError, match=f"short.tar is not a whole tar file .*at byte {second}"):
            opened(tmp_path / "short.tar")
    images = opened(pack(tmp_path / "odd.tar", {"a.png": png(1), "b.png": b"no picture", "c.png": png(3), "c.jpg": png(4)}))
    run = batches(images, 8)
    assert [batch.files for batch in run] == [("odd.tar/a.png", "odd.tar/c.png")]
    assert [skip.file for skip in (*images.skipped, *run.skipped)] == ["odd.tar/c.jpg", "odd.tar/b.png"]


def test_eval_takes_shards_and_gives_the_figures_of_the_folder(folder: Path, packed: Path, weights: Path) -> None:
    found = [hesper("eval", NAME, "--weights", weights, "--data", data, "--json") for data in (folder, packed / "calib-{0000..0002}.tar")]
    assert all(result.exit_code == 0 for result in found), found[1].stderr
    first, second = (json.loads(result.stdout) for result in found)
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and first["n"] == 12
    assert "no shard" in sentence(hesper("eval", NAME, "--weights", weights, "--data", packed / "calib-9.tar"), 2)


def test_a_companion_of_an_image_is_not_taken_for_it(tmp_path: Path) -> None:
    images = opened(pack(tmp_path / "depth.tar", {"a.depth.png": png(1), "a.jpg": png(2), "a.cls": b"3"}))
    assert images.files == ("depth.tar/a.jpg",) and not images.skipped
