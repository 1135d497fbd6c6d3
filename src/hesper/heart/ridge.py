"""Linear least squares with a ridge, accumulated batch by batch: memory does not grow with the number of samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Ridge:
    """min |A x + c - y|^2 + ridge |x|^2 over samples added in any number of batches; the offset c is not penalised.

    Example:
        >>> fit = Ridge(1)
        >>> fit.add(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 5.0]))
        >>> weights, offset, explained = fit.solve(ridge=0.0)
        >>> weights.tolist(), offset, round(explained, 6)
        ([2.0], 1.0, 1.0)
    """

    features: int
    moments: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start with no samples."""
        # One matrix of second moments of (features, target, 1) holds all that least squares needs.
        self.moments = torch.zeros(self.features + 2, self.features + 2, dtype=torch.float64)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add samples: ``[samples, features]`` and ``[samples]``."""
        rows = torch.cat([features, target[:, None], torch.ones_like(target)[:, None]], 1).double()
        self.moments += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """Mean of the features, ``[features]``."""
        return self.moments[-1, : self.features] / self.moments[-1, -1]

    def solve(self, ridge: float) -> tuple[Tensor, float, float]:
        """Weights ``[features]``, offset, and the share of the target's variance they explain on these samples."""
        n = float(self.moments[-1, -1])
        mean = self.moments[-1, :-1] / n
        centred = self.moments[:-1, :-1] - n * torch.outer(mean, mean)
        gram, moment, spread = centred[:-1, :-1], centred[:-1, -1], float(centred[-1, -1])
        penalised = (gram + ridge * torch.eye(self.features, dtype=torch.float64)).numpy()
        # Least squares rather than a plain solve: a feature that never varies makes the matrix singular when the ridge is zero.
        weights = torch.from_numpy(np.linalg.lstsq(penalised, moment.numpy(), rcond=None)[0])
        error = float(spread - 2 * weights @ moment + weights @ gram @ weights)
        return weights, float(mean[-1] - weights @ mean[:-1]), 1 - error / spread if spread > 0 else 0.0
