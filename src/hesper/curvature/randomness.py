"""Where random draws come from: one generator, or one for every image so that an image's draws depend on the image alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Randomness", "image_generators"]

# One generator for all that is drawn, or one for each image of the batch.
Randomness = torch.Generator | Sequence[torch.Generator]


def image_generators(images: Tensor, generator: torch.Generator) -> tuple[torch.Generator, ...]:
    """A generator for each image, seeded by the generator's own seed and the image's content: ``[images, ...]``.

    What an image draws then depends neither on the batch it is in, nor on what was drawn before, nor on the process that draws.

    >>> batch = torch.arange(6.0).reshape(3, 2)
    >>> seed = torch.Generator().manual_seed(0)
    >>> alone, among = image_generators(batch[2:], seed)[0], image_generators(batch, seed)[2]
    >>> alone.initial_seed() == among.initial_seed()
    True
    """
    seed = generator.initial_seed().to_bytes(8, "little")
    found = []
    for image in images.detach().cpu().contiguous():
        digest = hashlib.blake2b(image.view(torch.uint8).numpy(), digest_size=8, key=seed).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
    return tuple(found)
