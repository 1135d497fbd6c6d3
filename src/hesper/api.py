"""The verbs, in Python: prune, load, evaluate. The command line calls these and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hesper.artefact import load_cut, open_dense, save_model
from hesper.benchmark.this_device import ThisDevice, find_this_device
from hesper.data import ImageSet, Skipped, batches, check_labels, open_images, read_class_map, require_readable
from hesper.device import use_device
from hesper.errors import HesperError, JobError, UsageError
from hesper.graft import GraftedViT, graft
from hesper.heart.gallery import choose_images, make_gallery, save_gallery
from hesper.heart.prune import Pruned
from hesper.heart.prune import prune as prune_model
from hesper.heart.settings import Settings
from hesper.hosts import open_host
from hesper.hosts.open import HF, OpenModel, check_rebuildable, open_model
from hesper.measure.evaluate import Evaluation, join, measure
from hesper.parallel import jointly, leads, team
from hesper.plan import dumps, empty_plan
from hesper.runs import (
    MODEL,
    PLAN,
    RECORD,
    Entry,
    RunFolder,
    append,
    environment,
    new_run,
    once_written,
    open_run,
    seal,
    utc_now,
    write_text,
)
from hesper.version import __version__
from hesper.work import work_beside

Progress = Callable[[str, int, int], None]


def prune(
    model: str | OpenModel,
    *,
    calib: str | Path,
    out: str | Path,
    settings: Settings,
    weights: str | Path | None = None,
    class_map: str | Path | None = None,
    data: str | Path | None = None,
    labelled: bool | None = None,
    device: str = "cpu",
    meter: str = "auto",
    asked: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> RunFolder:
    """Prune a model within a budget and write a run folder: plan, weights, record, gallery.

    Args:
        model: a timm name, ``hf:`` and a Hugging Face name or folder, or a model that is open already.
        calib: calibration images, half of which only verify: a folder, tar shards, or ``hfds:NAME[:SPLIT]``.
        out: the run folder to make; it must not exist.
        settings: budget and method.
        weights: a weights file for a name, instead of its pretrained weights.
        class_map: class names by label, one a line; without it the sorted class folders are the classes.
        data: images to evaluate the pruned model on afterwards; the record gets a second entry.
        labelled: whether to use the class folders of ``data`` as labels; None finds out.
        device: where to compute, "cpu" or "cuda"; what a budget on a device is about.
        meter: that reads energy where the budget is one: a meter's name, or "auto".
        asked: what the user asked for, in their words, for the record; without it the arguments of this call.
        progress: told (stage, done, total).
        note: told, in a sentence, whether the work of an earlier process goes on.

    A job that is killed goes on when it is asked for again: what it has finished lies in a folder beside ``out`` until it is done. Under
    torchrun the processes share the images, and that of rank 0 writes; all return the same.

    Raises:
        UsageError: wrong input.
        JobError: no plan keeps the budget, the disk is full, or an output is not finite.
    """
    crew = team()
    use_device(device)
    if os.path.lexists(out):  # said before the model is opened
        raise UsageError(f"{out} exists already; give --out a new folder or remove the old one")
    if asked is None:
        paths = {"calib": calib, "out": out, "weights": weights, "class_map": class_map, "data": data}
        asked = _asked(model, paths, settings, labels=labelled, device=device, meter=meter)
    opened = open_model(model, weights=weights) if isinstance(model, str) else model
    check_rebuildable(opened)
    images = _images(calib, opened, class_map, settings.criterion.needs_labels)
    # Opened before the work begins, so that a wrong folder is found out now and not at the end.
    judged = None if data is None else _images(data, opened, class_map, labelled)
    with work_beside(out, _request(opened, images, settings, device), team=crew, note=note) as work:
        moved = dataclasses.replace(images, device=device)
        there = _on(opened, device)

        def find(settings: Settings) -> ThisDevice:
            return find_this_device(there, moved, settings, device=device, meter=meter, progress=progress)

        pruned = prune_model(there, moved, settings, progress, crew, work, find)
        cut = pruned.model.cpu()
        # Nobody goes on before the run is there.
        jointly(crew, lambda: _write_run(out, opened, images, pruned, asked) if crew.rank == 0 else None)
    if judged is not None:
        with once_written(f"the run {out} is complete but for its evaluation, which 'hesper eval {out} --data {data}' makes"):
            result, skipped = _compare(opened, cut, judged, settings.batch_size, device, progress)
            if crew.rank == 0:
                append(Path(out) / RECORD, _entry(result, judged, skipped, asked.get("data", data), settings.batch_size))
    return crew.first(open_run(out) if crew.rank == 0 else None)  # type: ignore[return-value]


def _asked(model: str | OpenModel, paths: Mapping[str, str | Path | None], settings: Settings, **plain: object) -> dict[str, Any]:
    """The arguments of a call, in plain values."""
    written = {name: None if path is None else str(path) for name, path in paths.items()}
    return {"model": model if isinstance(model, str) else model.ref.name, **written, **plain, **dataclasses.asdict(settings)}


def _write_run(out: str | Path, opened: OpenModel, images: ImageSet, pruned: Pruned, asked: Mapping[str, Any]) -> None:
    with new_run(out) as folder:
        cut = pruned.model
        write_text(folder / PLAN, dumps(pruned.chosen.plan))
        save_model(folder / MODEL, opened, cut)
        chosen = [pruned.verify[i] for i in choose_images(pruned.chosen.evaluation.macs.tolist())]
        save_gallery(folder, make_gallery(opened, cut, images, chosen))
        seal(folder, "prune", asked=asked, results=_results(pruned, images, pruned.skipped))


def _request(opened: OpenModel, images: ImageSet, settings: Settings, device: str) -> dict[str, Any]:
    """All that the outcome of pruning depends on, in plain values: work kept for the same request may be used."""
    labels = None if images.labels is None else hashlib.sha256(repr(images.labels).encode()).hexdigest()
    return {
        "hesper": __version__,
        "torch": torch.__version__,
        "model": opened.ref.name,
        "weights": opened.ref.weights_sha256,
        "preprocessing": repr(opened.transform),
        "images": images.sha256,
        "labels": labels,
        "device": device,
        **dataclasses.asdict(settings),
    }


def load(run: str | Path) -> GraftedViT:
    """The pruned model of a run folder: a module from images to logits, in evaluation mode.

    Raises:
        UsageError: no run, a file missing, or one changed since the run was made.
    """
    return load_cut(open_run(run))


def evaluate(
    target: str | Path,
    *,
    data: str | Path,
    weights: str | Path | None = None,
    class_map: str | Path | None = None,
    labelled: bool | None = None,
    dial: float | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    asked: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    skipped: Callable[[Sequence[Skipped]], None] | None = None,
) -> Evaluation:
    """Evaluate a run folder, or a dense model by name, on a folder of images, paired with the dense model; a run's record gets an entry.

    Args:
        target: a run folder, a timm name, or ``hf:`` and a Hugging Face name or folder.
        data: images: a folder (with class folders they are labelled), tar shards, or ``hfds:NAME[:SPLIT]``.
        weights: a weights file, for a name.
        class_map: class names by label; a run remembers the one it was made with.
        labelled: whether to use class folders as labels; None finds out.
        dial: price in nats below which tokens go, instead of the run's own; warns outside the verified range.
        batch_size: images at a time.
        device: where to compute, "cpu" or "cuda".
        asked: what the user asked for, in their words, for the record.
        progress: told (stage, done, total).
        skipped: told the files that could not be used, if there are any.

    Raises:
        UsageError: wrong input.
        JobError: an output is not finite.
    """
    team()  # connected first, so that a failure is said once
    use_device(device)
    run = _run_of(target)
    if run is None:
        opened = open_model(str(target), weights=weights)
        blank = dataclasses.replace(empty_plan(opened.ref.name, opened.ref.anatomy), model=opened.ref)
        cut, classes = graft(opened.host.module, blank, check_weights=False), None
        if dial is not None:
            raise UsageError(f"{target} is a dense model and has no dial; leave --dial out or give a RUN folder.")
    else:
        if weights is not None:
            raise UsageError(f"{target} is a run folder, which holds its own weights; leave --weights out.")
        opened, cut, classes = open_dense(run), load_cut(run), _classes_of(run)
        if dial is not None:
            cut.set_dial(dial)
    images = _images(data, opened, class_map, labelled, classes)
    result, unread = _compare(opened, cut, images, batch_size, device, progress)
    if skipped and (every := (*images.skipped, *unread)):
        skipped(every)
    if run is not None and leads():
        _record(run, _entry(result, images, unread, (asked or {}).get("data", data), batch_size, dial))
    return result


def _run_of(target: str | Path) -> RunFolder | None:
    """The run at ``target``; None where it can only be the name of a model."""
    path = Path(target)
    if path.is_dir():
        return open_run(path)
    if str(target).startswith(HF):
        return None
    if path.exists():
        raise UsageError(f"{target} is a file; give the RUN folder it lies in, or the name of a model.")
    if len(path.parts) > 1:  # no model's name holds a path separator
        raise UsageError(f"There is no run folder {target}; give the folder that --out of an earlier command named.")
    return None


def _on(opened: OpenModel, device: str) -> OpenModel:
    """``opened`` on a device; elsewhere than on the processor a copy, since the original is never touched."""
    if device == "cpu":
        return opened
    return dataclasses.replace(opened, host=open_host(copy.deepcopy(opened.host.module).to(device)))


def _compare(
    opened: OpenModel, cut: GraftedViT, images: ImageSet, batch_size: int, device: str, progress: Progress | None
) -> tuple[Evaluation, tuple[Skipped, ...]]:
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("Evaluate", done, loader.asked)

    crew = team()
    loader = batches(dataclasses.replace(images, device=device), batch_size, share=(crew.rank, crew.size))
    share = jointly(crew, lambda: measure(cut.to(device), _on(opened, device).host.module, loader, step))
    skipped = tuple(sorted({skip for skips in crew.every(loader.skipped) for skip in skips}, key=lambda skip: skip.file))
    if len(skipped) == len(images):
        require_readable(images, skipped)
    return join(crew.every(share)), skipped


def _record(run: RunFolder, entry: Entry) -> None:
    """Add an entry to a run's record; where that fails, the error says what would have stood there."""
    try:
        append(run.path / RECORD, entry)
    except (HesperError, OSError) as error:
        found = entry.results["evaluation"]
        raise JobError(
            f"The evaluation is done, but {run.path / RECORD} could not take it ({str(error).rstrip('.')}); it found drift "
            f"{found['drift_kl']:.4g} nats, agreement {found['agreement']:.4f}, MACs {found['macs_ratio']:.4f} of the dense ones"
            f"{'' if found['top1'] is None else ', top-1 ' + format(found['top1'], '.4f')} on {found['n']} images."
        ) from error


def _entry(
    result: Evaluation, images: ImageSet, skipped: Sequence[Skipped], data: object, batch_size: int, dial: float | None = None
) -> Entry:
    """The record's account of an evaluation."""
    asked = {"data": str(data), "data_sha256": images.sha256, "batch_size": batch_size, **({} if dial is None else {"dial": dial})}
    return Entry("eval", utc_now(), asked, environment(), _evaluation(result, images, skipped), {})


def _images(
    where: str | Path,
    opened: OpenModel,
    class_map: str | Path | None,
    labelled: bool | None,
    classes: tuple[str, ...] | None = None,
) -> ImageSet:
    names = classes if class_map is None else read_class_map(class_map)
    images = open_images(where, transform=opened.transform, class_map=names, labelled=labelled)
    wanted = opened.ref.anatomy.classes
    if images.labels is not None and names is None and not images.numbered and len(images.classes) != wanted:
        raise UsageError(
            f"{where} has {len(images.classes)} class names and the model {wanted} classes, so names alone do not say which label "
            "each has; give --class-map, a text file with the model's class names in order, one a line."
        )
    if names is not None and len(names) != wanted:
        raise UsageError(f"The class map names {len(names)} classes and the model has {wanted}; give the model's own class map.")
    if images.numbered and len(images.classes) != wanted:
        images = dataclasses.replace(images, classes=())  # names of some classes only would mislead a later evaluation
    if images.labels is None and names is None and len(own := images.source.classes) == wanted:
        # Not needed now, but an evaluation on another folder can then tell which class is which.
        images = dataclasses.replace(images, classes=own)
    check_labels(images, wanted)
    return images


def _classes_of(run: RunFolder) -> tuple[str, ...] | None:
    names = run.entries[0].results.get("classes")
    return tuple(names) if names else None


def _results(pruned: Pruned, images: ImageSet, skipped: Sequence[Skipped]) -> dict[str, Any]:
    atlas = pruned.atlas
    return {
        **_evaluation(pruned.chosen.evaluation, images, skipped),
        "family": pruned.chosen.family.name,
        "dial": pruned.chosen.dial,
        "improvements": {attempt.name: dataclasses.asdict(attempt) for attempt in pruned.chosen.attempts},
        "contenders": [dataclasses.asdict(contender) for contender in pruned.chosen.contenders],
        "checks": [dataclasses.asdict(check) for check in pruned.checks],
        "check_warnings": list(pruned.warnings),
        "classes": list(images.classes),
        "atlas": {
            "tokens": atlas.tokens.tolist(),
            "heads": atlas.heads.tolist(),
            "heads_stderr": atlas.heads_stderr.tolist() if atlas.images > 1 else None,
            "images": atlas.images,
        },
        "router_explained": list(pruned.tables.explained),
        "gates_explained": list(pruned.tables.gates_explained),
        "seconds": pruned.seconds,
    }


def _evaluation(result: Evaluation, images: ImageSet, skipped: Sequence[Skipped]) -> dict[str, Any]:
    names = ("drift_kl", "agreement", "macs", "top1", "top5", "loss", "dense_top1", "dense_loss")
    columns = {name: getattr(result, name) for name in names}
    return {
        "evaluation": result.summary(),
        "per_image": {"files": list(result.files), **{name: column.tolist() for name, column in columns.items() if column is not None}},
        "tokens": {name: getattr(result.tokens, name)(axis=0).tolist() for name in ("mean", "min", "max")},
        "skipped": [{"file": s.file, "reason": s.reason} for s in (*images.skipped, *skipped)],
    }
