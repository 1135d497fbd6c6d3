"""What every benchmark needs: the folders it is given, the two models, their images, and a resumable book of results."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hesper.data import ImageSet, open_folder, read_class_map
from hesper.hosts.open import OpenModel, open_model
from hesper.runs import environment, utc_now

MODELS = {
    "augreg": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"),
    "deit": ("deit_tiny_patch16_224", "deit_tiny_patch16_224.safetensors"),
}


@dataclass(frozen=True)
class Place:
    """The data folder: ``weights/``, ``imagenet/{calib,val}/`` and ``imagenet/classes.txt``."""

    root: Path

    def model(self, key: str) -> OpenModel:
        name, file = MODELS[key]
        return open_model(name, weights=self.root / "weights" / file)

    def images(self, split: str, model: OpenModel) -> ImageSet:
        classes = read_class_map(self.root / "imagenet" / "classes.txt")
        return open_folder(self.root / "imagenet" / split, transform=model.transform, class_map=classes, labelled=True)


class Book:
    """Results by key, one JSON line each, appended as they are found; what is there already is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was being written when the run was stopped counts as not there
        if whole != text:
            path.write_text(whole)
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {"key": key, "time": utc_now(), **row}
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")


def arguments(what: str, **options: Any) -> argparse.Namespace:
    """Parse ``--data``, ``--out`` and further options given as name=default."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/ and imagenet/")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    say(f"{what}\n{json.dumps(environment())}")
    return found


def arguments_for_runs(what: str) -> argparse.Namespace:
    """Parse ``--data``, ``--runs`` and ``--book``."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--book", type=Path, required=True)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
