"""scikit-learn's handwritten digits as folders of PNG files: real images that need no network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hesper.errors import UsageError

__all__ = ["PARTS", "SIDE", "write_digits"]

SIDE = 32
PARTS = {"train": 0.6, "calib": 0.2, "test": 0.2}


def write_digits(folder: Path, *, seed: int, most: int | None = None) -> dict[str, int]:
    """Write the digits to ``folder``/<part>/<digit>/<number>.png; gives the number of images of each part.

    The parts are disjoint, so that calibration and test images are new to a model trained on the first. The 8 x 8 originals are
    enlarged to 32 x 32 pixels.

    Args:
        folder: where to write; made if missing.
        seed: of the division into parts.
        most: use only this many digits.
    """
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))[:most]
    ends = np.round(np.cumsum([*PARTS.values()]) * len(order)).astype(int)
    written: Counter[str] = Counter()
    for part, chosen in zip(PARTS, np.split(order, ends[:-1]), strict=True):
        for number in chosen:
            path = folder / part / str(digits.target[number]) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
            Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
            written[part] += 1
    if min(written.values(), default=0) < len(digits.target_names):
        raise UsageError(f"{len(order)} digits are too few for the demo; use at least {10 * len(digits.target_names)}.")
    return dict(written)
