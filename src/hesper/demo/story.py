"""The demo from beginning to end, in one folder that appears when everything is done."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hesper import api
from hesper.data import open_folder
from hesper.demo.digits import write_digits
from hesper.demo.train import ARCHITECTURE, SMALL, all_images, train, untrained
from hesper.heart.settings import Settings
from hesper.hosts.open import OpenModel, open_model, wrap
from hesper.measure.timing import Comparison, compare
from hesper.plan import Budget
from hesper.report import write_report
from hesper.runs import RECORD, REPORT, Entry, append, environment, new_folder, open_run, utc_now

__all__ = ["Story", "tell"]

LOSS_BUDGET = 0.02
EPOCHS = 12
BATCH, ROUNDS, WARMUP = 32, 40, 5
WEIGHTS, DATA, RUN = "digits_vit.safetensors", "data", "run"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Story:
    """What the demo did: its folder, images per part, parameters, the figures on test images, and the times of batches of 32 images.

    ``evaluation`` is that of ``hesper eval``; ``timing`` compares the dense model (a) with the pruned one (b); ``seconds`` are those
    of each chapter.
    """

    out: Path
    images: Mapping[str, int]
    parameters: int
    statement: str
    evaluation: Mapping[str, Any]
    timing: Comparison
    threads: int
    seconds: Mapping[str, float]

    def summary(self) -> dict[str, Any]:
        """The story in plain values, for --json."""
        return {**asdict(self), "out": str(self.out)}


def tell(out: str | Path, *, seed: int = 0, epochs: int = EPOCHS, digits: int | None = None, progress: Progress | None = None) -> Story:
    """Train, prune, evaluate, time and report; everything lies under ``out`` in the end, or nothing does.

    Args:
        out: the folder to make; it must not exist.
        seed: of everything random.
        epochs: of training.
        digits: use only this many images.
        progress: told (stage, done, total).

    Raises:
        UsageError: ``out`` exists or cannot be written.
        JobError: the disk is full, or no plan keeps the budget.
    """
    note = progress or (lambda stage, done, total: None)
    clock = _Clock()
    with new_folder(out) as folder:
        images = write_digits(folder / DATA, seed=seed, most=digits)
        opened = _trained(folder, epochs, seed, note)
        clock.lap("train")
        run = api.prune(
            opened,
            calib=folder / DATA / "calib",
            out=folder / RUN,
            settings=Settings(Budget("loss", LOSS_BUDGET, 0.95), seed=seed),
            asked=_asked(Path(out), seed),
            progress=note,
        )
        api.evaluate(run.path, data=folder / DATA / "test", asked=_asked(Path(out), seed), progress=note)
        clock.lap("prune and evaluate")
        timing = _timing(opened, folder, note)
        _record_timing(run.path / RECORD, timing)
        clock.lap("time")
        write_report([run.path], run.path / REPORT)
        clock.lap("report")
    run = open_run(Path(out) / RUN)
    assert run.plan.measured is not None  # prune wrote it
    parameters = sum(parameter.numel() for parameter in opened.host.module.parameters())
    evaluation = next(entry.results["evaluation"] for entry in run.entries if entry.kind == "eval")
    return Story(Path(out), images, parameters, run.plan.measured.statement, evaluation, timing, torch.get_num_threads(), clock.seconds)


def _trained(folder: Path, epochs: int, seed: int, note: Progress) -> OpenModel:
    """Train on the folder's images, save the weights, and open them as a user of the file would."""
    model = untrained(seed)
    transform = wrap(ARCHITECTURE, model).transform
    pictures, labels = all_images(open_folder(folder / DATA / "train", transform=transform, class_map=None, labelled=True))
    train(model, pictures, labels, epochs=epochs, seed=seed, progress=lambda done, total: note("Train a small ViT", done, total))
    safetensors.torch.save_file(model.state_dict(), folder / WEIGHTS)
    return open_model(ARCHITECTURE, weights=folder / WEIGHTS, anatomy=SMALL)


def _asked(out: Path, seed: int) -> dict[str, Any]:
    """The record's account of the request, in the names the files have in the end."""
    command = shlex.join(["hesper", "demo", "--out", str(out), "--seed", str(seed)])
    paths = {"weights": out / WEIGHTS, "calib": out / DATA / "calib", "data": out / DATA / "test"}
    return {"command": command, "model": ARCHITECTURE, **{name: str(path) for name, path in paths.items()}, "seed": seed}


def _timing(opened: OpenModel, folder: Path, note: Progress) -> Comparison:
    """Dense and pruned model in turns on the same batch of test images."""
    pictures, _ = all_images(open_folder(folder / DATA / "test", transform=opened.transform, class_map=None, labelled=True))
    batch, dense, cut = pictures[:BATCH], opened.host.module, api.load(folder / RUN)
    with torch.inference_mode():
        return compare(
            lambda: dense(batch),
            lambda: cut(batch),
            rounds=ROUNDS,
            warmup=WARMUP,
            progress=lambda done: note("Time dense and pruned", done, ROUNDS),
        )


def _record_timing(record: Path, timing: Comparison) -> None:
    results = {"unit": "seconds per batch", "dense": timing.a, "pruned": timing.b}
    spread = {"ratio": timing.ratio, "ratio_low": timing.low, "ratio_high": timing.high}
    append(
        record, Entry("timing", utc_now(), {"batch_size": BATCH, "rounds": ROUNDS, "warmup": WARMUP}, environment(), {**results, **spread})
    )


class _Clock:
    """Seconds of each chapter."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, chapter: str) -> None:
        """End a chapter."""
        now = time.perf_counter()
        self.seconds[chapter], self._started = now - self._started, now
