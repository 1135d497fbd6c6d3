"""A few real images with the fate of every patch: what the report draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hesper.data import ImageSet, batches
from hesper.errors import UsageError
from hesper.graft import GraftedViT
from hesper.hosts.open import OpenModel

GALLERY = "gallery.safetensors"


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures ``[images, height, width, 3]`` uint8, and where their patches went.

    ``place`` ``[images, blocks, patches]`` gives the token that stands for each patch after each block (-1: dropped); patches with
    the same number have been merged. ``kept_macs`` is the share of the dense MACs; ``dense`` and ``cut`` are the predicted classes.
    """

    pictures: Tensor
    place: Tensor
    files: tuple[str, ...]
    kept_macs: tuple[float, ...]
    dense: tuple[int, ...]
    cut: tuple[int, ...]


def choose_images(macs: Sequence[float], count: int = 6) -> list[int]:
    """Indices of images spread evenly from the fewest MACs to the most.

    Example:
        >>> choose_images([5.0, 1.0, 3.0, 2.0, 4.0], 3)
        [1, 2, 0]
    """
    order = np.argsort(np.asarray(macs), kind="stable")
    return [int(order[i]) for i in np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]


def make_gallery(model: OpenModel, cut: GraftedViT, images: ImageSet, indices: Sequence[int]) -> Gallery:
    """Run the chosen images with tracing."""
    (batch,) = list(batches(images, len(indices), indices=indices))
    with torch.inference_mode():
        outcome = cut.run(batch.images, trace=True)
        dense = model.host.module(batch.images).argmax(1).tolist()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
    pictures = ((batch.images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    place = torch.stack(outcome.sources or (), 1).to(torch.int16)
    kept = tuple(float(m) / cut.dense_macs for m in outcome.macs)
    return Gallery(pictures, place, batch.files, kept, tuple(dense), tuple(outcome.logits.argmax(1).tolist()))


def save_gallery(folder: Path, gallery: Gallery) -> None:
    """Write ``gallery.safetensors``; names and figures go into its header."""
    notes = {"files": gallery.files, "kept_macs": gallery.kept_macs, "dense": gallery.dense, "cut": gallery.cut}
    tensors = {"pictures": gallery.pictures.clone(), "place": gallery.place.contiguous().clone()}
    safetensors.torch.save_file(tensors, folder / GALLERY, {"notes": json.dumps(notes)})


def load_gallery(folder: Path) -> Gallery | None:
    """The gallery of a run folder, or None where it has none; UsageError when it is damaged."""
    path = folder / GALLERY
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["notes"])
            return Gallery(
                file.get_tensor("pictures"),
                file.get_tensor("place"),
                *(tuple(notes[name]) for name in ("files", "kept_macs", "dense", "cut")),
            )
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged; delete it, and the report goes without pictures, or make the run again.") from error
