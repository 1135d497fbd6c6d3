"""Models to measure, opened, and the images they are measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hesper.artefact import load_cut, open_dense
from hesper.benchmark.request import Subject
from hesper.data import Transform, batches, open_images
from hesper.errors import UsageError
from hesper.exporting import format_of
from hesper.graft import GraftedViT, graft
from hesper.graft.one_graph import compiled
from hesper.heart.gallery import Gallery, load_gallery
from hesper.hosts.open import open_model, transform_of
from hesper.plan import empty_plan
from hesper.precision import dtype_of
from hesper.runs import PLAN, open_run

__all__ = ["Opened", "images_for", "open_subject", "timed_images"]

IMAGES = 64


@dataclass(frozen=True, eq=False)
class View:
    """The images that a model takes: their channels and size, how files become such, and its last step, per channel."""

    channels: int
    image_size: tuple[int, int]
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Opened:
    """A model ready to run: ``macs`` gives the multiply-accumulates that a batch of images needs, a mean over them.

    Of a file that is the mean its notes say. ``on_host`` wants images in main memory; ``adapts`` takes as long as an image needs.
    ``dtype`` is that of the images it takes.
    """

    model: Callable[[Tensor], object]
    macs: Callable[[Tensor], float]
    view: View
    subject: Subject
    runtime: str
    on_host: bool = False
    adapts: bool = False
    dtype: torch.dtype = torch.float32


def open_subject(
    subject: Subject, device: str, batch_size: int = 1, threads: int | None = None, precision: str = "fp32", compile: str | None = None
) -> Opened:
    """Open a model on a device.

    One in PyTorch in a ``precision`` of weights and activations (under halves tokens are let go in single precision), and as torch.compile
    makes it where a mode of it is given.

    Raises:
        UsageError: there is no such run, model or file, its weights do not fit, or it does not take so many images at a time.
        JobError: pretrained weights cannot be had.
    """
    if subject.kind == "file":
        return _open_file(subject, device, batch_size, threads)
    by_name = subject.kind == "dense"
    dense = open_model(subject.where, weights=subject.weights) if by_name else open_dense(open_run(subject.where))
    anatomy = dense.ref.anatomy
    view, dtype = View(anatomy.channels, anatomy.image_size, dense.transform, dense.mean, dense.std), dtype_of(precision)
    how = [*([] if precision == "fp32" else [precision]), *([] if compile is None else [f"compiled ({compile})"])]
    runtime, ready = ", ".join([f"torch {torch.__version__}", *how]), _ready if compile is None else partial(compiled, mode=compile)
    if subject.kind == "run":
        cut = load_cut(open_run(subject.where)).to(device)
        cut.network.to(dtype)
        return Opened(ready(cut), lambda images: _mean_macs(cut, images), view, subject, runtime, dtype=dtype)
    blank = dataclasses.replace(empty_plan(dense.ref.name, dense.ref.anatomy), model=dense.ref)
    count = float(graft(dense.host.module, blank, check_weights=False).dense_macs)
    return Opened(ready(dense.host.module.to(device, dtype)), lambda images: count, view, subject, runtime, dtype=dtype)


def _ready(model: nn.Module) -> Callable[[Tensor], object]:
    return model


def _open_file(subject: Subject, device: str, batch_size: int, threads: int | None) -> Opened:
    runner = format_of(subject.where).open(Path(subject.where), device, subject.provider, threads or torch.get_num_threads())
    notes = runner.notes
    if notes.largest_batch is not None and batch_size > notes.largest_batch:
        raise UsageError(
            f"{subject.where} takes one image at a time; leave --batch-size at 1, or export a run that was pruned with --counts fixed to "
            "onnx or torch."
        )
    words = notes.preprocessing
    transform = transform_of(words)
    view = View(len(words["mean"]), notes.image_size, transform, tuple(words["mean"]), tuple(words["std"]))
    return Opened(runner.run, lambda images: notes.macs, view, subject, runner.runtime, runner.on_host, notes.adaptive)


def images_for(opened: Mapping[str, Opened], data: str | None, batch_size: int, device: str) -> dict[str, tuple[Tensor, ...]]:
    """Batches of the same real images for each model, normalised as it expects, at least two.

    They are of ``data``, evenly spread, or else those that a run keeps for its report; ``data`` may be a run too.
    Without any run and any data the models are given noise, on which those of fixed counts take as long.

    Raises:
        UsageError: the models take images of different sizes, or there are none; or an exported file's counts would follow noise.
    """
    first, *others = (each.view for each in opened.values())
    for other in others:
        if (other.image_size, other.channels) != (first.image_size, first.channels):
            raise UsageError(
                f"The models take images of {first.image_size} and {other.image_size} pixels, so no image serves both; compare others."
            )
    mean, std = _scale(first)
    if data is not None:
        is_run = (Path(data) / PLAN).is_file()
        images = (_of_run(data, first.image_size) - mean) / std if is_run else _of_folder(first.transform, data, batch_size)
    else:
        images = _noise(first.channels, first.image_size)
        kept = [found for each in opened.values() if each.subject.kind != "dense" and (found := _of_gallery(each)) is not None]
        if not kept and (adaptive := [each.subject.where for each in opened.values() if each.adapts]):
            raise UsageError(f"{adaptive[0]} keeps as many tokens as an image needs, so noise would say nothing; give --data DIR.")
        images = (kept[0] - mean) / std if kept else images
    count = max(2, -(-len(images) // batch_size)) * batch_size
    pictures = images[torch.arange(count) % len(images)] * std + mean
    batches_of = {}
    for name, each in opened.items():
        own_mean, own_std = _scale(each.view)
        own = ((pictures - own_mean) / own_std).to("cpu" if each.on_host else device, each.dtype)
        batches_of[name] = tuple(torch.split(own, batch_size))
    return batches_of


def _scale(view: View) -> tuple[Tensor, Tensor]:
    """What a model's preprocessing takes off and divides by, per channel."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (view.mean, view.std))
    return mean, std


def _mean_macs(cut: GraftedViT, images: Tensor) -> float:
    with torch.inference_mode():
        return float(cut.run(images).macs.mean())


def _of_folder(transform: Transform, data: str, batch_size: int) -> Tensor:
    images = open_images(data, transform=transform, class_map=None, labelled=False)
    found = [batch.images for batch in batches(images, batch_size, indices=timed_images(len(images), batch_size))]
    if not found:
        raise UsageError(f"No image of {data} can be decoded; give other images.")
    return torch.cat(found)


def _of_run(where: str, image_size: tuple[int, int]) -> Tensor:
    """Pictures between 0 and 1 that a run keeps."""
    gallery = load_gallery(open_run(where).path)
    if gallery is None or gallery.pictures.shape[1:3] != image_size:
        raise UsageError(f"The run {where} keeps no images of {image_size[0]} x {image_size[1]} pixels; give --data a folder of images.")
    return _pictures(gallery)


def timed_images(images: int, batch_size: int) -> list[int]:
    """Which of so many images are run in batches, evenly spread.

    Example:
        >>> timed_images(256, 1)[:3], len(timed_images(256, 100))
        ([0, 4, 8], 200)
    """
    wanted = min(images, max(IMAGES, 2 * batch_size))
    return [place * images // wanted for place in range(wanted)]


def _of_gallery(opened: Opened) -> Tensor | None:
    """Pictures between 0 and 1."""
    if opened.subject.kind == "file":
        return None
    gallery = load_gallery(Path(opened.subject.where))
    if gallery is None:
        return None
    return _pictures(gallery)


def _pictures(gallery: Gallery) -> Tensor:
    return gallery.pictures.permute(0, 3, 1, 2).float() / 255


def _noise(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(IMAGES // 8, channels, *size, generator=torch.Generator().manual_seed(0))
