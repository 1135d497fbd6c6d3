"""Training of the demo's vision transformer: small enough for two CPU cores and a minute, and nothing but timm's own architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hesper.data import ImageSet, batches
from hesper.demo.digits import SIDE
from hesper.hosts.open import build
from hesper.plan import Anatomy

__all__ = ["ARCHITECTURE", "SMALL", "all_images", "train", "untrained"]

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 4
GRID = SIDE // PATCH
# 64 patches and the class token, so that there is something to let go of.
SMALL = Anatomy(
    depth=6,
    width=96,
    heads=3,
    head_dim=32,
    mlp_width=384,
    tokens=1 + GRID * GRID,
    prefix_tokens=1,
    classes=10,
    patch_values=3 * PATCH * PATCH,
    image_size=(SIDE, SIDE),
    grid=(GRID, GRID),
    reads_patches=False,
)
BATCH, RATE, SHIFT = 24, 1e-3, 2


def untrained(seed: int) -> nn.Module:
    """The small architecture with weights that learn quickly from few images.

    timm's initial values suit long training on large data sets: at this size they leave attention almost uniform for many epochs,
    and position unknown. Here every layer keeps its input's variance, and positions begin as sines and cosines.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build(ARCHITECTURE, SMALL)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    with torch.no_grad():
        model.pos_embed[0, SMALL.prefix_tokens :] = _waves(SMALL.width, GRID) / 2
    return model  # type: ignore[no-any-return]


def all_images(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Every image of a labelled folder ``[n, 3, height, width]`` and its label ``[n]``, in memory."""
    loaded = list(batches(images, 64))
    return torch.cat([batch.images for batch in loaded]), torch.cat([batch.labels for batch in loaded if batch.labels is not None])


def train(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Train ``model`` in place with AdamW, one rise and fall of the learning rate, and shifts of a few pixels as augmentation.

    Args:
        model: to train; left in evaluation mode without gradients.
        images: ``[n, 3, height, width]``, ready for the model.
        labels: ``[n]``.
        epochs: passes over the images.
        seed: of order and shifts.
        progress: told (done, total) in steps.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=epochs * steps, pct_start=0.15)
    model.train().requires_grad_(True)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step, chosen in enumerate(order[: steps * BATCH].view(steps, -1)):
            loss = cross_entropy(model(_shifted(images[chosen], generator)), labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if progress:
                progress(epoch * steps + step + 1, epochs * steps)
    model.eval().requires_grad_(False)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by a few pixels; the digits' margins are empty, so rolling over the edge does no harm."""
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    return images.roll((down, right), (2, 3))


def _waves(width: int, side: int) -> Tensor:
    """``[side * side, width]``: sines and cosines of row and column at falling frequencies."""
    frequency = 30.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
