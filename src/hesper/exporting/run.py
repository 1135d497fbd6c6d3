"""Exporting a run, or its dense model, to one file that is checked on real images before it is there."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesper.artefact import load_cut, open_dense
from hesper.data import batches, open_images
from hesper.errors import DISK_FULL, JobError, UsageError
from hesper.exporting.formats import FORMATS, SUFFIXES
from hesper.exporting.notes import Notes, Precision
from hesper.exporting.parity import Parity, compare_logits
from hesper.graft import GraftedViT, graft
from hesper.graft.one_graph import OneGraphViT, separated
from hesper.heart.gallery import load_gallery
from hesper.hosts import fix_image_size
from hesper.hosts.open import HF, OpenModel, open_model
from hesper.plan import empty_plan, plan_hash
from hesper.runs import RunFolder, open_run, sha256_file
from hesper.runs.files import sync_folder

__all__ = ["LEAST_AGREEMENT", "Exported", "export"]

LEAST_AGREEMENT = {"fp32": 0.99, "fp16": 0.95}
"""Share of equal top-1 decisions below which a file is not what was to be exported, and is not written; one image may always differ."""

LARGEST_ERROR = {"fp32": 1e-3, "fp16": 0.1}
"""Likewise the share of the largest logit by which the median image's logits may differ: single images differ more where tokens that
cost almost the same are decided the other way."""

BATCH = 32
Progress = Callable[[str, int, int], None]
Images = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was written: where, what it says of itself, its SHA-256, how it compares with PyTorch, and its format's ``details``."""

    path: Path
    format: str
    runtime: str
    notes: Notes
    sha256: str
    bytes: int
    parity: Parity
    details: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """Everything in plain values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def export(
    target: str | Path,
    *,
    out: str | Path,
    format: str | None = None,
    weights: str | Path | None = None,
    dense: bool = False,
    dial: float | None = None,
    data: str | Path | None = None,
    opset: int | None = None,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> Exported:
    """Write a run, or a dense model by its name, as one file, and compare it with PyTorch on real images.

    Plans of fixed counts take any number of images; where counts adapt, one at a time.

    Args:
        target: a run folder, or the name of a dense model.
        out: the file to write; it must not exist.
        format: one of :data:`~hesper.exporting.formats.FORMATS`; None goes by the ending of ``out``.
        weights: a weights file, for a name.
        dense: write the dense model of the run instead.
        dial: another price than the run's own, in nats.
        data: images to compare on; without them those that the run keeps for its report, or noise for a dense model by its name.
        opset: of ONNX; None takes the format's own.
        precision: of weights and activations; decisions are always taken in single precision.
        progress: told (stage, done, total).

    Raises:
        UsageError: wrong input, a missing package, or a model that decides what no graph can.
        JobError: the format cannot hold the model, the file computes something else, or the disk is full.
    """
    place = Path(out)
    named = format or SUFFIXES.get(place.suffix.lower())
    if named is None:
        raise UsageError(f"{out} does not say the format by its ending; end it in {', '.join(SUFFIXES)} or give --format.")
    if os.path.lexists(place):
        raise UsageError(f"{out} exists already; give --out a new file or remove the old one.")
    kind = FORMATS[named]
    if opset is not None and kind.opset is None:
        raise UsageError(f"Opsets are ONNX's; leave --opset out for --format {named}.")
    if place.suffix.lower() != kind.suffix:
        raise UsageError(f"A file of the format {named} ends in {kind.suffix}; name it so, and hesper bench will know it.")
    run, opened, cut = _models(target, weights, dense, dial)
    graph = _graph(cut, precision, kind.fused)
    images = _images(run, opened, data)
    notes = _notes(None if dense else run, opened, cut, images, precision)
    if not (graph.fixed and kind.any_batch):
        notes = dataclasses.replace(notes, largest_batch=1)
    example = torch.zeros(2 if notes.largest_batch is None else 1, cut.plan.model.anatomy.channels, *notes.image_size)
    if progress:
        progress(f"Write {named}", 0, 0)
    with _whole(place) as partial:
        details = kind.write(graph, example, notes, opset, partial)
        if progress:
            progress("Compare with PyTorch", 0, 0)
        try:
            runner = kind.open(partial, "cpu", None, None)
        except UsageError as error:
            raise JobError(f"The file cannot be run here, so it was not written: {str(error).replace(str(partial), place.name)}") from error
        parity = compare_logits(cut, runner.run, images(), notes.largest_batch)
        _check_parity(parity, precision)
    return Exported(place, named, runner.runtime, notes, sha256_file(place), place.stat().st_size, parity, details)


def _check_parity(parity: Parity, precision: Precision) -> None:
    others = round((1 - parity.agreement) * parity.images)
    if others > max(1, (1 - LEAST_AGREEMENT[precision]) * parity.images):
        what = f"agrees with PyTorch on {100 * parity.agreement:.1f} % of {parity.images} images only"
    elif parity.median_error > LARGEST_ERROR[precision] * parity.largest_logit:
        what = (
            f"differs from PyTorch by {parity.median_error:.3g} in a logit of the median image, and logits reach {parity.largest_logit:.3g}"
        )
    else:
        return
    raise JobError(f"The exported file {what}, so it was not written; another format or --precision fp32 may serve.")


def _models(
    target: str | Path, weights: str | Path | None, dense: bool, dial: float | None
) -> tuple[RunFolder | None, OpenModel, GraftedViT]:
    if Path(target).is_dir():
        if weights is not None:
            raise UsageError(f"{target} is a run folder, which holds its own weights; leave --weights out.")
        run = open_run(target)
        opened = open_dense(run)
        cut = _uncut(opened) if dense else load_cut(run)
        if dial is not None:
            cut.set_dial(dial)
        return run, opened, cut
    if not str(target).startswith(HF) and (Path(target).exists() or len(Path(target).parts) > 1):
        raise UsageError(f"There is no run folder {target}; give the folder that --out of an earlier command named.")
    if dial is not None:
        raise UsageError(f"{target} is a dense model and has no dial; leave --dial out or give a RUN folder.")
    opened = open_model(str(target), weights=weights)
    return None, opened, _uncut(opened)


def _uncut(opened: OpenModel) -> GraftedViT:
    blank = dataclasses.replace(empty_plan(opened.ref.name, opened.ref.anatomy), model=opened.ref)
    return graft(opened.host.module, blank, check_weights=False)


def _notes(run: RunFolder | None, opened: OpenModel, cut: GraftedViT, images: Images, precision: Precision) -> Notes:
    return Notes(
        model=opened.ref.name,
        plan=None if run is None else plan_hash(cut.plan),
        precision=precision,
        macs=cut.dense_macs * (1.0 if run is None else _kept(cut, images)),
        macs_dense=cut.dense_macs,
        adaptive=any(own.remove is None for own in cut.plan.tokens),
        largest_batch=None,
        classes=opened.ref.anatomy.classes,
        image_size=opened.ref.anatomy.image_size,
        preprocessing=opened.preprocessing,
    )


def _kept(cut: GraftedViT, images: Images) -> float:
    """The mean share of the dense MACs as it was verified, or at a dial where nothing was, on the first images at hand."""
    if cut.plan.measured is not None:
        return cut.plan.measured.macs.mean
    with torch.inference_mode():
        return float(cut.run(next(iter(images()))).macs.mean()) / cut.dense_macs


def _graph(cut: GraftedViT, precision: Precision, fused: bool) -> OneGraphViT:
    """A copy of the model as it is exported."""
    own = copy.deepcopy(cut)
    graph = OneGraphViT(own if fused else separated(own), fused=fused)
    fix_image_size(graph.cut.network)
    if precision == "fp16":
        graph.cut.network.half()
    return graph


def _images(run: RunFolder | None, opened: OpenModel, data: str | Path | None) -> Images:
    """Batches of images to compare on, as often as they are asked for."""
    if data is not None:
        found = open_images(data, transform=opened.transform, class_map=None, labelled=False)
        return lambda: (batch.images for batch in batches(found, BATCH))
    gallery = None if run is None else load_gallery(run.path)
    anatomy = opened.ref.anatomy
    if gallery is None:
        noise = torch.randn(8, anatomy.channels, *anatomy.image_size, generator=torch.Generator().manual_seed(0))
        return lambda: [noise]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (opened.mean, opened.std))
    pictures = (gallery.pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return lambda: [pictures]


@contextlib.contextmanager
def _whole(place: Path) -> Iterator[Path]:
    """Where to write a file that is at ``place`` whole or not at all."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent)
    except OSError as error:
        raise UsageError(f"{place} cannot be written ({error.strerror}); give --out another place.") from error
    with folder:
        try:
            yield Path(folder.name) / place.name
            os.replace(Path(folder.name) / place.name, place)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise JobError(f"The disk is full, so {place} was not written; free some space and export again.") from error
            raise
    sync_folder(place.parent)
