"""The curvature metric in few dimensions: coordinates in which a squared distance is a loss in nats."""

from __future__ import annotations

import torch
from torch import Tensor


def metric_root(metric: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The best ``rank``-dimensional coordinates y = x R for the quadratic form delta^T M delta / 2.

    With S = (M / 2)^(1/2) and C the covariance of tokens, the form is |S delta|^2, and of all rank-r projections the principal
    axes of S C S lose least of its expectation, which is their eigenvalues' sum (Eckart and Young, 1936). Plain eigenvectors of M
    would spend dimensions where the loss is steep but tokens do not differ.

    Args:
        metric: ``[width, width]``, positive semi-definite, nats per squared activation.
        covariance: ``[width, width]``, of tokens within an image.
        rank: dimensions kept, at most the width.

    Returns:
        ``[width, rank]``.

    Example:
        >>> root = metric_root(2 * torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64)), 2)
        >>> (root @ root.T).round(decimals=6).diagonal().tolist()
        [0.0, 1.0, 1.0]
    """
    half = _square_root(metric.double() / 2)
    _, axes = torch.linalg.eigh(half @ covariance.double() @ half)
    root: Tensor = half @ axes[:, -rank:]
    return root


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
