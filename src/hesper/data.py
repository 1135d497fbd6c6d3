"""Folders of images: listed in a fixed order, hashed, decoded lazily by a few threads; what cannot be read is named and skipped."""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hesper.errors import UsageError
from hesper.registry import did_you_mean

__all__ = [
    "Batches",
    "ImageSet",
    "LoadedBatch",
    "Skipped",
    "Transform",
    "batches",
    "check_labels",
    "class_folders",
    "open_folder",
    "read_class_map",
    "split",
]

Transform = Callable[[Image.Image], Tensor]

_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_SYNSET = re.compile(r"(n\d{8})\s")
# What Pillow raises for damaged files, found by feeding it some: its decoders let their own parsing errors through.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Skipped:
    """A file that was not used, relative to its folder, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class ImageSet:
    """Images of a folder by sorted relative path; ``labels`` index ``classes``; ``sha256`` covers names and contents.

    ``skipped`` holds what is no image by its name; files that fail to decode are found by ``batches``. ``device`` is where batches
    are put, in torch's words. ``digests`` are the files' SHA-256, ``sha256`` that of all with their names.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    sha256: str
    transform: Transform
    digests: tuple[bytes, ...]
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class LoadedBatch:
    """Images ``[B, 3, H, W]``, labels ``[B]`` (int64, or None without labels) and the B files they come from."""

    images: Tensor
    labels: Tensor | None
    files: tuple[str, ...]


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
                raise UsageError(f"{root} has a class folder {folder!r} that the class map does not name; {did_you_mean(folder, classes)}")
    digests = _digests(root, files, skipped)
    labels = tuple(label_of[_class_of(name)] for name in digests) if labelled else None
    total = hashlib.sha256(b"".join(os.fsencode(name) + b"\0" + digest for name, digest in digests.items()))
    in_order = tuple(sorted(skipped, key=lambda skip: skip.file))
    return ImageSet(root, tuple(digests), labels, classes, in_order, total.hexdigest(), transform, tuple(digests.values()))


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


def check_labels(images: ImageSet, classes: int) -> None:
    """Raise UsageError when a label lies outside a model's number of ``classes``."""
    if images.labels is None:
        return
    label = max(images.labels)
    if label >= classes:
        name = images.classes[label]
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


def batches(images: ImageSet, batch_size: int, *, workers: int = 2, indices: Sequence[int] | None = None) -> Batches:
    """Iterate over ``images`` (or those at ``indices``, in that order) in full batches, the last one excepted."""
    if batch_size < 1 or workers < 1:
        raise UsageError(f"batch size {batch_size} and workers {workers} must be at least 1")
    return Batches(images, batch_size, workers, range(len(images)) if indices is None else indices)


class Batches(Iterator[LoadedBatch]):
    """The iterator ``batches`` returns; ``yielded`` and ``skipped`` grow while it runs and are final when it ends.

    Files that cannot be decoded are skipped and the batch is filled from the files after them, so what is yielded depends on the
    data alone, not on the threads' timing. UsageError when no file at all could be decoded or the transform's shapes differ.
    """

    def __init__(self, images: ImageSet, batch_size: int, workers: int, indices: Sequence[int]) -> None:
        self.yielded = 0
        self.skipped: tuple[Skipped, ...] = ()
        self._images = images
        self._run = self._generate(batch_size, workers, indices)

    def __next__(self) -> LoadedBatch:
        return next(self._run)

    def close(self) -> None:
        """Stop early: cancel what is waiting to be decoded and end the threads."""
        self._run.close()

    def _generate(self, batch_size: int, workers: int, indices: Sequence[int]) -> Generator[LoadedBatch, None, None]:
        ready: list[tuple[int, Tensor]] = []
        for index, image in _decoded(self._images, indices, workers, ahead=batch_size + workers):
            if isinstance(image, str):
                self.skipped += (Skipped(self._images.files[index], image),)
                continue
            ready.append((index, image))
            if len(ready) == batch_size:
                yield self._batch(ready)
                ready = []
        if ready:
            yield self._batch(ready)
        if self.yielded == 0 and self.skipped:
            first = self.skipped[0]
            raise UsageError(
                f"none of the {len(self.skipped)} files in {self._images.root} can be decoded ({first.file}: {first.reason}); "
                "give real images"
            )

    def _batch(self, ready: list[tuple[int, Tensor]]) -> LoadedBatch:
        shapes = {tuple(image.shape) for _, image in ready}
        if len(shapes) > 1:
            raise UsageError(f"the transform gives images of different shapes, {sorted(shapes)}; make it resize and crop to one")
        self.yielded += len(ready)
        labels, device = self._images.labels, self._images.device
        return LoadedBatch(
            torch.stack([image for _, image in ready]).to(device),
            None if labels is None else torch.tensor([labels[index] for index, _ in ready], dtype=torch.int64, device=device),
            tuple(self._images.files[index] for index, _ in ready),
        )


def _decoded(images: ImageSet, indices: Sequence[int], workers: int, *, ahead: int) -> Iterator[tuple[int, Tensor | str]]:
    # At most ``ahead`` images wait decoded, which bounds memory and still keeps a batch coming while the model works.
    left = iter(indices)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hesper-decode")
    try:
        queue: deque[tuple[int, Future[Tensor | str]]] = deque()
        queue.extend((index, pool.submit(_decode, images, index)) for index in islice(left, ahead))
        while queue:
            index, future = queue.popleft()
            queue.extend((following, pool.submit(_decode, images, following)) for following in islice(left, 1))
            yield index, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(images: ImageSet, index: int) -> Tensor | str:
    try:
        with Image.open(images.root / images.files[index]) as image:
            rgb = _rgb(image)
    except _UNREADABLE as error:
        return _reason(error)
    return images.transform(rgb)  # outside the try: a transform that fails is a mistake to see, not a file to skip


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these to 255 when it converts them; 16-bit values keep their contrast when scaled first.
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    # Pillow warns about palettes with transparency unless they pass through RGBA; the colours come out the same.
    return (image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


def _walk(folder: Path, prefix: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder above would be walked for ever
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read ({_reason(error)}); make it readable") from error
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
    files = [name for name in found if Path(name).suffix.lower() in _IMAGE_SUFFIXES]
    skipped = [Skipped(name, "not an image by its file name") for name in found if Path(name).suffix.lower() not in _IMAGE_SUFFIXES]
    loose = [name for name in files if "/" not in name]
    if not labelled or not loose:
        return files, skipped
    if len(loose) == len(files):
        raise UsageError(
            f"{root} holds images but no class folders; put the images of each class in a folder named after it, or give --no-labels"
        )
    return [name for name in files if "/" in name], skipped + [Skipped(name, "not in a class folder") for name in loose]


def _digests(root: Path, files: Sequence[str], skipped: list[Skipped]) -> dict[str, bytes]:
    digests = {}
    for name in files:
        try:
            if not (root / name).is_file():  # a broken link, or a pipe that would be read for ever
                raise OSError("not a regular file")
            digests[name] = hashlib.sha256((root / name).read_bytes()).digest()
        except OSError as error:
            skipped.append(Skipped(name, _reason(error)))
    if not digests:
        raise UsageError(f"none of the {len(files)} image files in {root} can be read ({skipped[-1].reason}); make them readable")
    return digests
