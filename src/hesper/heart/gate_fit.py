"""How much each head is worth to an image, as a linear function of the reader's row: one ridge for all heads of a block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1e-6  # of the mean over an image's heads of the block: what a price counts as at least, so that it has a logarithm
PENALTIES = tuple(4.0**power for power in range(-5, 8))  # in units of the mean variance of a feature times the number of images
# Variance, as a share of the mean square, that always counts on top: a class token before the first block varies by rounding alone,
# and no weight may be so large as to bring that up.
ROUNDING = 1e-4


@dataclass
class GateFit:
    """Ridge regressions of the heads' log prices on the reader's row, accumulated batch by batch.

    There is one sample an image, often fewer than features: the penalty is chosen by generalised cross-validation (Golub, Heath and
    Wahba, Technometrics 21, 1979), which needs no more than the sums. All heads have the same, since a choice for each would fit
    noise; not to use the row at all is among the choices.

    Example:
        >>> row = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = GateFit(3, 1)
        >>> fit.add(row, (row[:, :1] + 2).exp())
        >>> direction, offset, explained = fit.solve()
        >>> direction[:, 0].round(decimals=1).abs().tolist(), round(float(explained), 2)
        ([1.0, 0.0, 0.0], 1.0)
    """

    features: int
    heads: int
    moments: Tensor = field(init=False)
    prices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start with no images."""
        # Second moments of (row, log prices, 1) hold all that least squares needs.
        self.moments = torch.zeros(self.features + self.heads + 1, self.features + self.heads + 1, dtype=torch.float64)
        self.prices = torch.zeros(self.heads, dtype=torch.float64)

    def add(self, row: Tensor, price: Tensor) -> None:
        """Add images: rows ``[images, features]`` and prices in nats ``[images, heads]``, 0 or more."""
        price = price.double()
        floor = (SMALLEST * price.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
        sample = torch.cat([row.double(), torch.maximum(price, floor).log(), torch.ones_like(price[:, :1])], 1)
        self.moments += sample.T @ sample
        self.prices += price.sum(0)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Direction ``[features, heads]``, offset ``[heads]``, and the share ``[heads]`` of the log price's variance it will explain.

        The exponential of a predicted logarithm lies below the mean. The offset is therefore the one at which predictions, were they
        log-normal, average to the mean price; a head that nothing is known about has that very price.
        """
        n, split = float(self.moments[-1, -1]), self.features
        mean = self.moments[-1, :-1] / n
        centred = self.moments[:-1, :-1] - n * torch.outer(mean, mean)
        values, vectors = (torch.from_numpy(part) for part in np.linalg.eigh(centred[:split, :split].numpy()))
        values = values.clamp_min(0)
        along = vectors.T @ centred[:split, split:]
        unit = values.mean() + ROUNDING * self.moments[:split, :split].trace() / split
        spread = centred[split:, split:].diagonal().clamp_min(0)
        shrink, score = self._choose(values, along, spread, n, unit)
        along = along * shrink[:, None]
        weights = vectors @ along
        predicted = (along.square() * values[:, None]).sum(0) / n
        log_mean = (self.prices / n).clamp_min(torch.finfo(torch.float32).tiny).log()
        offset = log_mean - predicted / 2 - mean[:split] @ weights
        return weights, offset, torch.where(spread > 0, 1 - score, 0.0)

    def _choose(self, values: Tensor, along: Tensor, spread: Tensor, n: float, unit: Tensor) -> tuple[Tensor, Tensor]:
        """What each eigendirection is divided by, ``[features]``, and the heads' errors left, as shares of those without any row."""
        best, shrink = torch.ones_like(spread), torch.zeros_like(values)
        for penalty in PENALTIES:
            inverse = 1 / (values + penalty * unit).clamp_min(torch.finfo(torch.float64).tiny)
            free = n - 1 - float((values * inverse).sum())
            if free <= 1:
                continue
            left = spread - (along.square() * (2 * inverse - values * inverse.square())[:, None]).sum(0)
            score = left.clamp_min(0) / spread.clamp_min(torch.finfo(torch.float64).tiny) * ((n - 1) / free) ** 2
            if score.mean() < best.mean():
                best, shrink = score, inverse
        return shrink, best
