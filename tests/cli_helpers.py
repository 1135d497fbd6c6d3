"""The command line as tests use it, a model that takes no time, and pictures for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from hesper.cli import main

CLASSES = ("ant", "bee", "cat")
NAME = "test_vit"
# The quickest settings: one family, few Fisher samples.
QUICK = ("--blocks", "alternate-early", "--heads", "none", "--draws", "1", "--batch-size", "8", "--rank", "4")


def write_images(folder: Path, per_class: int, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """Class folders of small noisy pictures, each class with its own brightness."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            noise = generator.integers(0, 120, (24, 24, 3)) + 50 * (label % 3)
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{number:02}.png")
    return folder


def write_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """Random weights of the tiny model with three classes, large enough for its outputs to depend on the image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(NAME, num_classes=len(CLASSES))
        state = {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
    if change:
        change(state)
    save_file(state, path)
    return path


def hesper(*words: object) -> Result:
    """The command line, in this process; what it raises is a failure of the test."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def sentence(result: Result, code: int) -> str:
    """The one sentence a failure says, checked to be one: an exit code, a line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == code, (result.exit_code, result.stderr)
    assert result.stdout == "" and "Traceback" not in result.stderr
    # On a busy machine stages that took over two seconds have said so before.
    (line,) = [line for line in result.stderr.splitlines() if not re.fullmatch(r"[A-Z].*: \d+ s(, .*)?", line)]
    assert line.startswith("hesper: ") and line.endswith((".", "?"))
    return line.removeprefix("hesper: ")
