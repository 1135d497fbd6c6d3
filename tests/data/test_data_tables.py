"""Hugging Face data sets hold the same images as the folder they were made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cli_helpers import CLASSES, NAME, hesper, write_images, write_weights
from hesper import api
from hesper.data import ImageSet, batches, open_folder, open_images
from hesper.errors import UsageError
from hesper.hosts.open import open_model


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def opened(where: object, class_map: tuple[str, ...] | None = None, labelled: bool | None = None) -> ImageSet:
    return open_images(str(where), transform=to_tensor, class_map=class_map, labelled=labelled)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("tables") / "folder", 4)


@pytest.fixture(scope="module")
def table(folder: Path) -> datasets.Dataset:
    files = sorted(folder.rglob("*.png"))
    columns = {
        "number": list(range(len(files))),
        "picture": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "animal": [CLASSES.index(file.parent.name) for file in files],
    }
    kinds = datasets.Features(
        {"number": datasets.Value("int64"), "picture": datasets.Image(), "animal": datasets.ClassLabel(names=CLASSES)}
    )
    return datasets.Dataset.from_dict(columns, features=kinds)


@pytest.fixture(scope="module")
def saved(folder: Path, table: datasets.Dataset) -> Path:
    table.save_to_disk(folder.parent / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(6))}).save_to_disk(folder.parent / "two")
    return folder.parent


def test_a_saved_data_set_holds_what_the_folder_holds(folder: Path, saved: Path) -> None:
    plain = open_folder(folder, transform=to_tensor, class_map=None, labelled=True)
    for where in (saved / "one", f"hfds:{saved / 'one'}", f"hfds:{saved / 'two'}:train"):
        images = opened(where)
        assert (images.labels, images.digests, images.classes) == (plain.labels, plain.digests, plain.classes)
        for ours, theirs in zip(batches(images, 5, workers=4), batches(plain, 5), strict=True):
            assert torch.equal(ours.images, theirs.images)
    assert len(opened(f"hfds:{saved / 'two'}:test")) == 6 and opened(saved / "one", labelled=False).labels is None


def test_class_labels_count_by_name_where_the_map_has_them_and_by_number_where_not(saved: Path) -> None:
    by_name = opened(saved / "one", ("cat", "bee", "eel", "ant"))
    assert by_name.labels == (3,) * 4 + (1,) * 4 + (0,) * 4
    by_number = opened(saved / "one", ("n01", "n02", "n03"))
    assert by_number.labels == (0,) * 4 + (1,) * 4 + (2,) * 4 and by_number.classes == ("n01", "n02", "n03")
    with pytest.raises(UsageError, match="'cat' that the class map does not name"):
        opened(saved / "one", ("ant", "bee", "eel"))


def test_damaged_and_empty_rows_are_named_and_skipped(tmp_path: Path, folder: Path) -> None:
    good = (folder / "ant" / "00.png").read_bytes()
    cells = [{"bytes": b"no picture", "path": None}, None, {"bytes": good, "path": None}]
    table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(tmp_path / "odd")
    images = opened(tmp_path / "odd")
    run = batches(images, 8)
    assert [batch.files for batch in run] == [("row 2",)] and images.labels is None
    assert [(skip.file, skip.reason) for skip in (*images.skipped, *run.skipped)] == [("row 1", "empty"), ("row 0", "not an image")]


def test_data_sets_that_cannot_serve_are_refused(saved: Path, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "words")
    for where, message in (
        (saved / "two", "has the splits train, test; say which"),
        (f"hfds:{saved / 'two'}:val", "no split 'val'; its splits are train, test"),
        (tmp_path / "words", "no column of images among text"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(where)


def test_without_the_package_one_sentence_names_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'hesper\[data\]'"):
        opened(saved / "one")


def test_eval_takes_a_data_set_by_its_prefix(folder: Path, saved: Path, weights: Path) -> None:
    words = [("eval", NAME, "--weights", weights, "--data", data, "--json") for data in (folder, f"hfds:{saved / 'two'}:train")]
    first, second = (json.loads(hesper(*each).stdout) for each in words)
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and first["n"] == 12 and first["top1"] is not None


def test_names_of_a_few_classes_are_not_taken_for_the_models(saved: Path, tmp_path: Path) -> None:
    def four(state: dict[str, Tensor]) -> None:
        state["head.weight"], state["head.bias"] = torch.randn(4, 64), torch.zeros(4)

    weights = write_weights(tmp_path / "four.safetensors", four)
    images = api._images(saved / "one", open_model(NAME, weights=weights), None, None)
    assert images.labels is not None and images.classes == ()
