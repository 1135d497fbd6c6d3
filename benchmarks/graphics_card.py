"""ViT-B/16 and DeiT-B/16 shapes on a graphics card: pruned there, for MACs and for latency, exported, and benched with their energy.

    python benchmarks/graphics_card.py --data DATA --out FOLDER

The weights are the trained tiny models' in the shape of the base ones (benchmarks/widen.py). Runs of 0.505 and 0.66 of the MACs and files
of them are made several at a time; benches, and the run for 0.7 of the latency, have the card to themselves. The most important comes
first. FOLDER keeps runs, files and logs. One JSON object a line; after ``--until`` seconds no further step is begun. ``--quick`` takes
fewer batch sizes and shorter stretches, to see whether everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MODELS, say
from safetensors.torch import load_file, save_file
from widen import widened

import hesper
from hesper.artefact import load_cut
from hesper.data import batches, open_images
from hesper.exporting import format_of
from hesper.exporting.parity import compare_logits
from hesper.hosts.open import open_model
from hesper.runs import environment, open_run

BASE = {"augreg": "vit_base_patch16_224.augreg_in21k_ft_in1k", "deit": "deit_base_patch16_224"}
BUDGETS = ("0.505", "0.66")
DEVICE_BATCH = 64
REPLAYED = "reduce-overhead"


@dataclass(frozen=True)
class Desk:
    """Where things are, and until when work may begin."""

    data: Path
    out: Path
    start: float
    until: float
    quick: bool
    device: str

    @property
    def val(self) -> Path:
        return self.data / "imagenet" / "val"

    def weights(self, key: str) -> Path:
        return self.out / f"{key}.safetensors"

    def run(self, key: str, budget: str) -> Path:
        return self.out / f"{key}-{budget}"

    def tell(self, step: str, **row: Any) -> None:
        print(json.dumps({"step": step, "at": round(time.monotonic() - self.start, 1), **row}), flush=True)

    def has_time(self) -> bool:
        return time.monotonic() - self.start < self.until


def hesper_verb(desk: Desk, name: str, *words: object) -> tuple[str, float, subprocess.Popen[bytes]]:
    """A verb of the command line, begun; its output goes to a log."""
    log = (desk.out / f"{name}.log").open("wb")
    command = [sys.executable, "-m", "hesper", *map(str, words)]
    few = {**os.environ, "OMP_NUM_THREADS": "4"}  # several run at a time
    return name, time.monotonic(), subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=few)


def all_of(desk: Desk, step: str, begun: list[tuple[str, float, subprocess.Popen[bytes]]]) -> None:
    """Wait for verbs, and tell how long each took and how it ended."""
    left = list(begun)
    while left:
        for each in [one for one in left if one[2].poll() is not None]:
            name, start, process = each
            lines = (desk.out / f"{name}.log").read_text(errors="replace").splitlines()
            desk.tell(step, name=name, seconds=round(time.monotonic() - start, 1), code=process.returncode, said=lines[-1:])
            left.remove(each)
        time.sleep(0.2)


def prune(desk: Desk, key: str, name: str, *budget: object) -> tuple[str, float, subprocess.Popen[bytes]]:
    """``hesper prune`` of a base model on the card."""
    pictures = desk.data / "imagenet"
    given = (
        "--weights",
        desk.weights(key),
        "--calib",
        pictures / "calib",
        "--class-map",
        pictures / "classes.txt",
        "--device",
        desk.device,
    )
    return hesper_verb(desk, f"{key}-{name}", "prune", BASE[key], *given, *budget, "--out", desk.run(key, name))


def export(desk: Desk, key: str, budget: str, precision: str) -> tuple[str, float, subprocess.Popen[bytes]]:
    """``hesper export`` of a run, or of the dense model for the budget "dense"."""
    target = (BASE[key], "--weights", desk.weights(key)) if budget == "dense" else (desk.run(key, budget),)
    name = f"{key}-{budget}-{precision}"
    half = ("--precision", "fp16", "--opset", 18) if precision == "fp16" else ()
    return hesper_verb(desk, name, "export", *target, *half, "--out", desk.out / f"{name}.onnx")


def bench(desk: Desk, target: Path, sizes: tuple[int, ...], energy: bool = False, **options: Any) -> None:
    """Bench on the card, and tell what was found batch size by batch size; ``energy`` takes half a minute more for each."""
    words = {name: str(value) for name, value in options.items()}
    for size in sizes[:2] if desk.quick else sizes:
        if not desk.has_time():
            desk.tell("bench", target=target.name, batch=size, skipped=True, **words)
            continue
        found = hesper.bench(
            target,
            batch_sizes=(size,),
            data=desk.val,
            device=desk.device,
            rounds=20,
            processes=1,
            stretch_seconds=4.4,  # NVML's counter moves ten times a second, and forty moves are needed
            meter="auto" if energy and not desk.quick else "none",
            memory=False,
            **options,
        ).summary()
        (cell,) = found["cells"]
        for each in cell["models"].values():
            del each["seconds"], each["stretches"]
        meter = found["meter"] or found["meter_reason"]
        desk.tell("bench", target=target.name, **words, meter=meter, cell=cell, warnings=found["warnings"])


def parity(desk: Desk, key: str, budget: str, precision: str) -> None:
    """An exported file in ONNX Runtime beside PyTorch, both on the card, on validation images."""
    file = desk.out / f"{key}-{budget}-{precision}.onnx"
    runner, cut = format_of(str(file)).open(file, desk.device, None, None), load_cut(open_run(desk.run(key, budget))).to(desk.device)
    transform = open_model(BASE[key], weights=desk.weights(key)).transform
    pictures = open_images(str(desk.val), transform=transform, class_map=None, labelled=False)
    images = (batch.images.to(desk.device) for batch in batches(pictures, 64))
    found = compare_logits(cut, runner.run, images, None)
    desk.tell("parity", file=file.name, runtime=runner.runtime, images=found.images, agreement=found.agreement, error=found.max_error)


def steps(desk: Desk) -> Iterator[Callable[[], None]]:
    """Everything, the most important first."""
    augreg, deit = ({budget: desk.run(key, budget) for budget in (*BUDGETS, "adaptive", "latency")} for key in MODELS)
    yield lambda: first_runs(desk)
    for precision in ("fp16", "fp32"):
        yield partial(bench, desk, augreg["0.505"], (64, 1, 256), energy=True, precision=precision, compile=REPLAYED)
    yield partial(bench, desk, deit["0.505"], (64, 1, 256), precision="fp16", compile=REPLAYED)
    yield lambda: more_runs(desk)
    yield partial(bench, desk, augreg["0.66"], (64, 1, 256), precision="fp16", compile=REPLAYED)
    yield partial(bench, desk, deit["0.66"], (64, 1, 256), precision="fp16", compile=REPLAYED)
    yield lambda: all_of(desk, "latency", [prune(desk, "augreg", "latency", "--latency", "0.7", "--device-batch", DEVICE_BATCH)])
    yield partial(bench, desk, augreg["latency"], (DEVICE_BATCH,), precision="fp32")
    yield lambda: files(desk)
    for precision in ("fp32", "fp16"):
        dense, cut = (desk.out / f"augreg-{name}-{precision}.onnx" for name in ("dense", "0.505"))
        yield partial(bench, desk, cut, (64, 1, 256), baseline=dense)
        yield partial(parity, desk, "augreg", "0.505", precision)
    for precision in ("fp32", "fp16"):
        yield partial(bench, desk, augreg["0.505"], (256, 64, 1), energy=True, precision=precision)
    yield partial(bench, desk, deit["0.505"], (64,), precision="fp32")
    yield partial(bench, desk, augreg["0.505"], (8, 16, 128), precision="fp16", compile=REPLAYED)
    yield partial(bench, desk, augreg["adaptive"], (64, 256, 1), precision="fp16")


def first_runs(desk: Desk) -> None:
    """Weights, and the smaller run of both models."""
    for key, (_, file) in MODELS.items():
        save_file(widened(load_file(desk.data / "weights" / file), 4), desk.weights(key))
    small = BUDGETS[0]
    all_of(desk, "make", [prune(desk, key, small, "--macs", small, "--counts", "fixed") for key in MODELS])


def more_runs(desk: Desk) -> None:
    """The other runs of both models."""
    small, large = BUDGETS
    begun = [prune(desk, key, large, "--macs", large, "--counts", "fixed") for key in MODELS]
    all_of(desk, "make", [*begun, prune(desk, "augreg", "adaptive", "--macs", small)])


def files(desk: Desk) -> None:
    """ONNX files of one run and of its dense model."""
    all_of(
        desk, "export", [export(desk, "augreg", budget, precision) for budget in ("dense", BUDGETS[0]) for precision in ("fp32", "fp16")]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    desk = Desk(asked.data, asked.out, time.monotonic(), asked.until, asked.quick, asked.device)
    desk.tell("environment", environment=environment(), torch=torch.__version__)
    for step in steps(desk):
        if not desk.has_time():
            break
        try:
            step()
        except Exception as error:
            say(f"{type(error).__name__}: {error}")
            desk.tell("failed", error=f"{type(error).__name__}: {error}"[:2000])


if __name__ == "__main__":
    main()
