"""Folders of images, with or without a folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hesper.data.images import IMAGE_SUFFIXES, ImageSet, Skipped, Transform, hashed, reason, total
from hesper.errors import UsageError
from hesper.registry import did_you_mean

__all__ = ["class_folders", "open_folder"]

_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True)
class _Folder:
    """Files under a folder, by relative path."""

    root: Path

    @property
    def where(self) -> str:
        return str(self.root)

    @property
    def classes(self) -> tuple[str, ...]:
        return class_folders(self.root)

    def read(self, file: str) -> bytes:
        path = self.root / file
        if not path.is_file():  # a broken link, or a pipe that would be read for ever
            raise OSError("not a regular file")
        return path.read_bytes()


def open_folder(path: str | Path, *, transform: Transform, class_map: Sequence[str] | None, labelled: bool) -> ImageSet:
    """List and hash the images under ``path``: a folder per class, or, when not ``labelled``, in any arrangement.

    ``transform`` turns a decoded RGB image into a ``[3, H, W]`` tensor. Labels are positions in ``class_map``, or else in the sorted
    class folder names. UsageError for a missing, empty or flat-but-labelled folder and for a class folder the map does not know.
    """
    root = Path(path)
    if not os.path.exists(root):
        raise UsageError(f"there is no folder {root}; give a folder of images")
    if not os.path.isdir(root):
        raise UsageError(f"{root} is not a folder; give a folder of images")
    files, skipped = _candidates(root, labelled)
    if not files:
        raise UsageError(f"{root} holds no images; give a folder of JPEG or PNG files, or of class folders with such files")
    classes = tuple(class_map) if class_map is not None else class_folders(root) if labelled else ()
    label_of = {name: label for label, name in enumerate(classes)}
    if labelled:
        for folder in dict.fromkeys(_class_of(name) for name in files):
            if folder not in label_of:
                hint = did_you_mean(folder, classes).rstrip("?")
                raise UsageError(
                    f"{root} has a class folder {folder!r} that the class map does not name; {hint}, or are folders no classes "
                    "(--no-labels)?"
                )
    source = _Folder(root)
    digests = hashed(source, files, skipped)
    labels = tuple(label_of[_class_of(name)] for name in digests) if labelled else None
    in_order = tuple(sorted(skipped, key=lambda skip: skip.file))
    return ImageSet(source, tuple(digests), labels, classes, in_order, total(digests), transform, tuple(digests.values()))


def _walk(folder: Path, prefix: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder above would be walked for ever
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read ({reason(error)}); make it readable") from error
    for entry in entries:
        if _is_clutter(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
        else:
            yield prefix + entry.name


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders under ``root``, sorted: the classes, where no class map says otherwise."""
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_clutter(entry.name)))


def _class_of(name: str) -> str:
    return name.split("/", 1)[0]


def _candidates(root: Path, labelled: bool) -> tuple[list[str], list[Skipped]]:
    found = sorted(_walk(root, ""))
    files = [name for name in found if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    skipped = [Skipped(name, "not an image by its file name") for name in found if Path(name).suffix.lower() not in IMAGE_SUFFIXES]
    loose = [name for name in files if "/" not in name]
    if not labelled or not loose:
        return files, skipped
    if len(loose) == len(files):
        raise UsageError(
            f"{root} holds images but no class folders; put the images of each class in a folder named after it, or give --no-labels"
        )
    return [name for name in files if "/" in name], skipped + [Skipped(name, "not in a class folder") for name in loose]
