"""What a set of images is, wherever it lies: names in a fixed order, labels, hashes, and bytes on demand."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hesper.errors import UsageError
from hesper.registry import did_you_mean

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageSet",
    "LoadedBatch",
    "Skipped",
    "Source",
    "Transform",
    "check_labels",
    "hashed",
    "labels_of",
    "read_class_map",
    "reason",
    "require_readable",
    "split",
    "total",
]

Transform = Callable[[Image.Image], Tensor]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_SYNSET = re.compile(r"(n\d{8})\s")


class Source(Protocol):
    """Where images lie; nothing is held in memory but where to find each."""

    @property
    def where(self) -> str:
        """How messages call it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes the data themselves name, sorted or by label; empty where they name none."""

    def read(self, file: str) -> bytes:
        """The encoded image by its name; OSError when it cannot be read. May be called from several threads."""


@dataclass(frozen=True)
class Skipped:
    """A file that was not used, relative to its folder, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order by name; ``labels`` index ``classes``; ``sha256`` covers names and contents.

    ``skipped`` holds what is no image by its name; files that fail to decode are found by ``batches``. ``device`` is where batches
    are put, in torch's words. ``digests`` are the files' SHA-256, ``sha256`` that of all with their names. ``numbered`` labels are
    the data's own numbers, not positions of names.
    """

    source: Source
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    sha256: str
    transform: Transform
    digests: tuple[bytes, ...]
    device: str = "cpu"
    numbered: bool = False

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class LoadedBatch:
    """Images ``[B, 3, H, W]``, labels ``[B]`` (int64, or None without labels) and the B files they come from.

    ``places`` are the images' positions in the order that was asked for.
    """

    images: Tensor
    labels: Tensor | None
    files: tuple[str, ...]
    places: tuple[int, ...] = ()


def read_class_map(path: str | Path) -> tuple[str, ...]:
    """Class names by label: line n (from 0) names label n; of ``n01440764 tench`` the first word counts.

    UsageError for a missing or empty file, an empty line between names, or a name given twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the class map {path} cannot be read ({error}); give a text file with one class name a line") from error
    if not lines:
        raise UsageError(f"the class map {path} is empty; write one class name a line, the label being the line number from 0")
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        synset = _SYNSET.match(line)
        name = synset.group(1) if synset else line.strip()
        if not name:
            raise UsageError(f"line {number} of the class map {path} is empty; labels are line numbers, so every line needs a name")
        if name in seen:
            raise UsageError(f"the class map {path} names {name!r} on lines {seen[name]} and {number}; each class may appear once")
        seen[name] = number
    return tuple(seen)


def labels_of(names: Sequence[str | int], classes: Sequence[str] | None, where: str) -> tuple[tuple[int, ...], tuple[str, ...], bool]:
    """Labels of images from the ``names`` of their classes, the classes, and whether the labels are numbers of the data's own.

    Whole numbers are labels as they stand, and ``classes`` only name them; words are positions in ``classes``, or else among the sorted
    words. UsageError for a word that ``classes`` lack, for words among numbers, and for negative numbers.
    """
    numbers = [name for name in names if isinstance(name, int)]
    if numbers and len(numbers) == len(names):
        if min(numbers) < 0:
            raise UsageError(f"{where} has the label {min(numbers)}; labels are whole numbers from 0, so give the images without labels")
        return tuple(numbers), tuple(classes or ()), True
    if numbers:
        raise UsageError(f"some labels in {where} are numbers and some are names; use one kind, or give --no-labels")
    words = [str(name) for name in names]
    known = tuple(classes) if classes is not None else tuple(sorted(set(words)))
    label_of = {name: label for label, name in enumerate(known)}
    for word in dict.fromkeys(words):
        if word not in label_of:
            raise UsageError(f"{where} has a class {word!r} that the class map does not name; {did_you_mean(word, known)}")
    return tuple(label_of[word] for word in words), known, False


def hashed(source: Source, files: Iterable[str], skipped: list[Skipped]) -> dict[str, bytes]:
    """SHA-256 of every file that can be read, in order; the others join ``skipped``. UsageError when none can be read."""
    digests = {}
    before = len(skipped)
    for name in files:
        try:
            digests[name] = hashlib.sha256(source.read(name)).digest()
        except OSError as error:
            skipped.append(Skipped(name, reason(error)))
    if not digests:
        raise UsageError(
            f"none of the {len(skipped) - before} image files in {source.where} can be read ({skipped[-1].reason}); make them readable"
        )
    return digests


def total(digests: dict[str, bytes]) -> str:
    """SHA-256 over names and contents, 64 hex digits."""
    whole = hashlib.sha256()
    for name, digest in digests.items():
        whole.update(os.fsencode(name) + b"\0" + digest)
    return whole.hexdigest()


def check_labels(images: ImageSet, classes: int) -> None:
    """Raise UsageError when a label lies outside a model's number of ``classes``."""
    if images.labels is None:
        return
    label = max(images.labels)
    if label >= classes:
        name = images.classes[label] if label < len(images.classes) else str(label)
        raise UsageError(f"class {name!r} has label {label}, but the model has only {classes} classes; give the model's own class map")


def split(images: ImageSet, fractions: Sequence[float], seed: int) -> tuple[tuple[int, ...], ...]:
    """Disjoint, shuffled indices of ``images``, one group per fraction, the same for the same seed on every machine.

    UsageError when the fractions are not positive, add up to more than 1, or leave a group without an image.
    """
    if any(not fraction > 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise UsageError(f"the fractions {list(fractions)} must be positive and add up to at most 1")
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)  # Python keeps this sequence stable across versions, torch does not promise to
    ends = [round(len(order) * sum(fractions[: count + 1])) for count in range(len(fractions))]
    groups = tuple(tuple(order[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    if not all(groups):
        raise UsageError(f"{len(order)} images are too few to split into {list(fractions)}; add images")
    return groups


def require_readable(images: ImageSet, skipped: Sequence[Skipped]) -> None:
    """Raise UsageError, after a pass that yielded nothing, naming the first of the ``skipped`` files."""
    first = skipped[0]
    raise UsageError(
        f"none of the {len(skipped)} files in {images.source.where} can be decoded ({first.file}: {first.reason}); give real images"
    )


def reason(error: Exception) -> str:
    """Why a file could not be used, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
