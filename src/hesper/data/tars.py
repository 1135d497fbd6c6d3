"""Tar shards as webdataset lays them out: headers read once, every image then read from its place, nothing unpacked."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hesper.data.images import IMAGE_SUFFIXES, ImageSet, Skipped, Transform, hashed, labels_of, reason, total
from hesper.errors import UsageError

__all__ = ["open_tars", "shards"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LABEL_KEYS = ("label", "cls", "class", "target")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class _Place:
    """Bytes of a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError("the shard ends before it")
        return data


@dataclass
class _Sample:
    """The members of a shard that share a key."""

    image: str = ""
    label: _Place | None = None
    label_suffix: str = ""


@dataclass(frozen=True)
class _Tars:
    """Images in shards, by shard and member name."""

    where: str
    places: dict[str, _Place] = field(repr=False)
    classes: tuple[str, ...] = ()

    def read(self, file: str) -> bytes:
        return self.places[file].read()


def shards(where: str | Path) -> tuple[Path, ...] | None:
    """The tar files ``where`` names: one file, a pattern with braces or stars, or a folder that holds nothing but tars.

    None where it names something else; UsageError for a missing shard and for compressed ones.

    >>> shards("pictures") is None
    True
    """
    text = os.fspath(where)
    if text.endswith(_COMPRESSED):
        raise UsageError(f"{text} is compressed, so its images cannot be read one by one; give it unpacked to a plain .tar")
    if os.path.isdir(text):
        return _in_folder(Path(text))
    if not text.endswith(".tar"):
        return None
    found = [Path(name) for pattern in _expanded(text) for name in (sorted(glob.glob(pattern)) if "*" in pattern else [pattern])]
    if not found:
        raise UsageError(f"no file matches {text}; give the tar shards by a pattern that does")
    for path in found:
        if not path.is_file():
            raise UsageError(f"there is no shard {path}; give tar files that exist, such as 'shards/{{0000..0003}}.tar'")
    return tuple(found)


def open_tars(
    files: Sequence[Path], where: str, *, transform: Transform, class_map: Sequence[str] | None, labelled: bool | None
) -> ImageSet:
    """Index and hash the images of the shards; labels come from ``.cls`` (a number or a word) or ``.json`` (its key ``label``).

    Samples are in the order of the shards and of their members. ``labelled`` None uses labels where every sample has one. UsageError for
    a damaged shard, for shards without images, and for a missing label.
    """
    places: dict[str, _Place] = {}
    samples: dict[str, _Sample] = {}
    skipped: list[Skipped] = []
    above = Path(os.path.commonpath([path.parent.absolute() for path in files]))
    for path in files:
        shard = path.absolute().relative_to(above).as_posix()
        for name, place in _members(path):
            _sort_in(f"{shard}/{name}", place, places, samples, skipped)
    labels = {sample.image: sample for sample in samples.values() if sample.image}
    if not labels:
        raise UsageError(f"{where} holds no images; give tar files with JPEG or PNG members")
    source = _Tars(where, places)
    digests = hashed(source, labels, skipped)
    in_order = tuple(sorted(skipped, key=lambda skip: skip.file))
    known, classes, numbered = None, tuple(class_map or ()), False
    if labelled or (labelled is None and all(sample.label for sample in labels.values())):
        found = [_label(labels[name]) for name in digests]
        if labelled or None not in found:  # a .json may be about other things
            given = [_demanded(label, labels[name]) for label, name in zip(found, digests, strict=True)]
            known, classes, numbered = labels_of(given, class_map, where)
    hashes = tuple(digests.values())
    return ImageSet(source, tuple(digests), known, classes, in_order, total(digests), transform, hashes, numbered=numbered)


def _in_folder(folder: Path) -> tuple[Path, ...] | None:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError:  # said by whoever lists its images
        return None
    tars = [name for name in names if name.endswith(".tar")]
    if not tars or any(Path(name).suffix.lower() in IMAGE_SUFFIXES or (folder / name).is_dir() for name in names):
        return None
    return tuple(folder / name for name in tars)


def _expanded(pattern: str) -> Iterator[str]:
    """Every name that braces stand for: ``{0000..0003}`` counts, ``{a,b}`` lists."""
    parts = _BRACES.split(pattern)  # text and the inside of braces take turns
    choices = [[part] if index % 2 == 0 else _choices(part) for index, part in enumerate(parts)]
    return ("".join(words) for words in itertools.product(*choices))


def _choices(inside: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",")
    first, last = span.groups()
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def _members(path: Path) -> Iterator[tuple[str, _Place]]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # the archive would remember every header
                if member.isreg() and not member.issparse():
                    yield member.name, _Place(path, member.offset_data, member.size)
            end = tar.offset
        with path.open("rb") as file:  # a damaged header looks like the end to tarfile; the true end is a block of zeros
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off or is damaged at byte {end}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"{path} is not a whole tar file ({reason(error)}); copy or pack it again") from error


def _sort_in(name: str, place: _Place, places: dict[str, _Place], samples: dict[str, _Sample], skipped: list[Skipped]) -> None:
    """Give a member to the sample of its key: the name up to the first dot behind the last slash."""
    member = PurePosixPath(name)
    key, _, suffixes = member.name.partition(".")
    if not key:
        return
    sample = samples.setdefault(str(member.with_name(key)), _Sample())
    if f".{suffixes.lower()}" in IMAGE_SUFFIXES:  # a companion such as 0000.depth.png is no image of its sample
        if sample.image:
            skipped.append(Skipped(name, "a second image of its sample"))
            return
        sample.image = name
        places[name] = place
    elif suffixes.lower() in ("cls", "json") and (sample.label is None or suffixes.lower() == "cls"):
        sample.label, sample.label_suffix = place, suffixes.lower()


def _demanded(label: str | int | None, sample: _Sample) -> str | int:
    if label is not None:
        return label
    lacks = "neither a .cls nor a .json" if sample.label is None else f"a .json without any of {', '.join(_LABEL_KEYS)}"
    raise UsageError(f"{sample.image} has {lacks} beside it; add labels to the shard, or give --no-labels")


def _label(sample: _Sample) -> str | int | None:
    """The label of a sample, or None where nothing beside the image gives one."""
    if sample.label is None:
        return None
    try:
        text = sample.label.read().decode().strip()
        found: object = text
        if sample.label_suffix == "json":
            table = json.loads(text)
            keys = [key for key in _LABEL_KEYS if key in table]
            if not keys:
                return None
            found = table[keys[0]]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"the label of {sample.image} cannot be read ({reason(error)}); write a number or a class name") from error
    if isinstance(found, bool) or not isinstance(found, (int, str)) or found == "":
        raise UsageError(f"the label of {sample.image} is {found!r}; write a number or a class name, or give --no-labels")
    return int(found) if isinstance(found, str) and re.fullmatch(r"-?\d+", found) else found
