"""Hugging Face data sets, saved on disk or by name: memory-mapped tables whose images are read row by row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesper.data.images import ImageSet, Skipped, Transform, hashed, labels_of, total
from hesper.errors import UsageError

__all__ = ["PREFIX", "is_table", "open_table"]

PREFIX = "hfds:"
_SAVED = ("dataset_dict.json", "dataset_info.json")
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows of a table, named by their number."""

    where: str
    rows: Any
    column: str
    classes: tuple[str, ...]

    def read(self, file: str) -> bytes:
        cell = self.rows[int(file.removeprefix("row "))][self.column]
        if cell is None:
            raise OSError("empty")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def is_table(where: str | Path) -> bool:
    """Whether ``where`` names a data set: ``hfds:NAME[:SPLIT]``, or a folder that ``save_to_disk`` made.

    >>> is_table("hfds:cifar10:test"), is_table("pictures")
    (True, False)
    """
    return os.fspath(where).startswith(PREFIX) or any((Path(where) / name).is_file() for name in _SAVED)


def open_table(where: str | Path, *, transform: Transform, class_map: Sequence[str] | None, labelled: bool | None) -> ImageSet:
    """Hash the images of a data set; its image and label columns are found by their types and names.

    A column of class labels counts by its names where ``class_map`` has them, otherwise by its numbers. ``labelled`` None uses labels
    where there is such a column. UsageError without the package ``datasets``, for an unknown data set or split, and without an image
    column.
    """
    name = os.fspath(where)
    table = _opened(name)
    datasets = _datasets()
    column = _image_column(table, datasets, name)
    label = _label_column(table, datasets)
    if labelled and label is None:
        raise UsageError(f"{name} has no label column among {', '.join(table.column_names)}; give --no-labels")
    names = tuple(getattr(table.features[label], "names", None) or ()) if label else ()
    images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    source = _Table(name, images, column, names)
    skipped: list[Skipped] = []
    digests = hashed(source, (f"row {row}" for row in range(len(table))), skipped) if len(table) else {}
    if not digests:
        raise UsageError(f"{name} has no rows; give a data set with images")
    known, classes, numbered = None, tuple(class_map or ()), False
    if label is not None and labelled is not False:
        values = table.select_columns([label])[label]
        found = [values[int(file.removeprefix("row "))] for file in digests]
        odd = next((value for value in found if value is None or (names and not 0 <= value < len(names))), 0)
        if odd != 0:
            raise UsageError(f"{name} has the label {odd}, which stands for none of its classes; give a split with labels, or --no-labels")
        by_name = names and class_map is not None and set(names) & set(class_map)
        known, classes, numbered = labels_of([names[value] for value in found] if by_name else found, class_map, name)
        classes = classes if class_map is not None or not names else names
    hashes = tuple(digests.values())
    return ImageSet(source, tuple(digests), known, classes, tuple(skipped), total(digests), transform, hashes, numbered=numbered)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError("Hugging Face data sets need the package 'datasets'; install it with: pip install 'hesper[data]'") from error
    return datasets


def _opened(name: str) -> Any:
    """The table, one split of it."""
    datasets = _datasets()
    path, split = _place(name)
    try:
        if any((Path(path) / saved).is_file() for saved in _SAVED):
            found = datasets.load_from_disk(path)
            found = found if isinstance(found, datasets.DatasetDict) else {split or "train": found}
        else:
            splits = [split] if split else datasets.get_dataset_split_names(path)
            found = {each: None for each in splits}
            if len(splits) == 1:
                found = {splits[0]: datasets.load_dataset(path, split=splits[0])}
    except Exception as error:  # the hub, the network, the disk and every format raise their own kinds
        lines = str(error).strip().splitlines()
        raise UsageError(f"the data set {name} cannot be opened ({lines[0][:200] if lines else type(error).__name__})") from error
    if split is None and len(found) > 1:
        raise UsageError(f"{name} has the splits {', '.join(found)}; say which, as in {PREFIX}{path}:{next(iter(found))}")
    if split is not None and split not in found:
        raise UsageError(f"{name} has no split {split!r}; its splits are {', '.join(found)}")
    return found[split or next(iter(found))]


def _place(name: str) -> tuple[str, str | None]:
    rest = name.removeprefix(PREFIX)
    if name == rest:
        return name, None
    path, colon, split = rest.rpartition(":")
    return (path, split) if colon and split else (rest, None)


def _image_column(table: Any, datasets: Any, name: str) -> str:
    found: list[str] = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if len(found) > 1:
        found = [column for column in _IMAGE_NAMES if column in found] or found
    if not found:
        raise UsageError(f"{name} has no column of images among {', '.join(table.column_names)}; give a data set of images")
    return found[0]


def _label_column(table: Any, datasets: Any) -> str | None:
    found = [column for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [column for column in _LABEL_NAMES if column in table.column_names]
    plain = [column for column in named if getattr(table.features[column], "dtype", "") in ("int64", "int32", "int16", "uint8", "string")]
    return next((column for column in [*(c for c in named if c in found), *found, *plain]), None)
