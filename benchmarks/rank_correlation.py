"""Rank correlation of each criterion with the measured loss of truly deleting single tokens and single heads.

    python benchmarks/rank_correlation.py --data DATA

For random images, blocks and patches (or heads) the loss without that token (or head) is measured by a forward pass in which it is
gone, and compared with the price each criterion put on it beforehand. Spearman's rank correlation over all of them, with a
bootstrap 95 % interval. Takes about six minutes for both models on two cores.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from common import Place, arguments, say
from scipy.stats import spearmanr

from hesper.curvature import CrossEntropy, DenseKL, ImageBatch
from hesper.data import batches
from hesper.heart.criteria import Criterion, Sensitivity, sensitivity
from hesper.heart.gated import HEAD_GATES, TOKEN_GATES, gated_forward, ones
from hesper.hosts import Host

CRITERIA = {
    "kl, T = 4": Criterion("kl", 4.0, 8),
    "kl, T = 1": Criterion("kl", 1.0, 8),
    "ce": Criterion("ce", draws=8),
    "heart": Criterion("heart", draws=8),
}
PER_IMAGE = 8


def measured(host: Host, image: torch.Tensor, label: torch.Tensor, name: str, cuts: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """KL drift and change of cross-entropy of each single cut of one image."""
    many = image.expand(len(cuts), -1, -1, -1)
    gates = ones(host, len(cuts), name, like=image)
    for row, (block, index) in enumerate(cuts):
        gates[name][row, block, index] = 0.0
    with torch.inference_mode():
        dense, cut = gated_forward(host, image[None]).logits, gated_forward(host, many, gates).logits
    batch, base = ImageBatch(many, label.expand(len(cuts))), ImageBatch(image[None], label[None])
    loss = CrossEntropy()
    return {
        "KL": DenseKL().per_image(cut, batch, dense.expand_as(cut)).numpy(),
        "CE": (loss.per_image(cut, batch) - loss.per_image(dense, base)).numpy(),
    }


def correlation(price: np.ndarray, truth: np.ndarray) -> str:
    """Spearman's correlation with its bootstrap interval."""
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(price), len(price)) for _ in range(500)]
    low, high = np.quantile([spearmanr(price[p], truth[p]).statistic for p in picks], [0.025, 0.975])
    return f"{spearmanr(price, truth).statistic:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    options = arguments(__doc__.splitlines()[0], images=40)
    place = Place(options.data)
    for key in options.models:
        model = place.model(key)
        images = place.images("calib", model)
        indices = random.Random(1).sample(range(len(images)), options.images)
        host, anatomy = model.host, model.ref.anatomy
        prices: dict[str, list[Sensitivity]] = {name: [] for name in CRITERIA}
        loaded = list(batches(images, 8, indices=indices))
        for name, criterion in CRITERIA.items():
            generator = torch.Generator().manual_seed(0)
            prices[name] = [sensitivity(host, batch, criterion, generator) for batch in loaded]
        pixels, labels = torch.cat([b.images for b in loaded]), torch.cat([b.labels for b in loaded])
        for kind, gate, size in (("tokens", TOKEN_GATES, anatomy.tokens - anatomy.prefix_tokens), ("heads", HEAD_GATES, anatomy.heads)):
            rng = random.Random(2)
            last = anatomy.depth - 1 if kind == "tokens" else anatomy.depth
            cuts = [[(rng.randrange(last), rng.randrange(size)) for _ in range(PER_IMAGE)] for _ in indices]
            truth = [measured(host, pixels[n], labels[n], gate, cuts[n]) for n in range(len(indices))]
            for name in CRITERIA:
                table = torch.cat([getattr(s, kind) for s in prices[name]])
                price = np.array([float(table[n, b, i]) for n in range(len(indices)) for b, i in cuts[n]])
                row = {loss: correlation(price, np.concatenate([t[loss] for t in truth])) for loss in ("KL", "CE")}
                say(f"{key:7} {kind:7} {name:10} n = {len(price)}  measured KL {row['KL']}  measured CE {row['CE']}")


if __name__ == "__main__":
    main()
