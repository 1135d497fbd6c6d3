"""Multiply-accumulate counts of what really runs, as a function of token and head counts. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hesper.plan import Anatomy

Counts = NDArray[np.int64]


def block_macs(anatomy: Anatomy, heads: int | Counts, attended: Counts, queries: Counts, fed: Counts) -> Counts:
    """MACs of one block in which ``queries`` tokens attend to ``attended`` tokens and ``fed`` tokens pass the MLP.

    ``heads`` is one number, or one for each image. With width d, head width e = heads * head_dim, hidden width f:

        2 N d e + Q d e + 2 Q N e + Q e d + 2 M d f

    which for N = Q = M, e = d and f = 4d is the usual 4 N d^2 + 2 N^2 d + 8 N d^2.

    Example:
        >>> tiny = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
        >>> n = np.array([197])
        >>> int(block_macs(tiny, 3, n, n, n)[0]) == 12 * 197 * 192**2 + 2 * 197**2 * 192
        True
    """
    width, inner = anatomy.width, heads * anatomy.head_dim
    linear = (2 * attended + 2 * queries) * width * inner
    mixing = 2 * queries * attended * inner
    feed = 2 * fed * width * anatomy.mlp_width
    return linear + mixing + feed


def fixed_macs(anatomy: Anatomy) -> int:
    """MACs that no plan changes: patch embedding and classifier."""
    patches = anatomy.tokens - anatomy.prefix_tokens
    readout = anatomy.width * anatomy.classes if anatomy.readout_macs is None else anatomy.readout_macs
    return patches * anatomy.patch_values * anatomy.width + readout


def pooling_macs(anatomy: Anatomy, tokens: Counts) -> Counts:
    """MACs that a pooling by attention spends on the patches of images with ``tokens`` tokens left; none for other classifiers."""
    return (tokens - anatomy.prefix_tokens) * (anatomy.readout_token_macs or 0)


def dense_macs(anatomy: Anatomy) -> int:
    """MACs per image of the dense model.

    Example:
        >>> dense_macs(Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False))
        1253683200
    """
    every = np.array([anatomy.tokens], dtype=np.int64)
    blocks = anatomy.depth * int(block_macs(anatomy, anatomy.heads, every, every, every)[0])
    return blocks + int(pooling_macs(anatomy, every)[0]) + fixed_macs(anatomy)


def model_macs(anatomy: Anatomy, heads: Sequence[int] | Counts, attended: Counts, queries: Counts, fed: Counts, deciding: Counts) -> Counts:
    """MACs per image of a cut model, the cost of deciding included.

    Every matrix product, weighted sum and convolution an image itself needs; not what a ragged batch pads its pairs of tokens to,
    nor what an accelerator's kernels add (masked places of a bucket, the coordinates that carry a size), and, as for the dense model,
    neither element-wise work (norms, activations, softmax, and the factors of a merge's price) nor sums of one vector (squared
    lengths, the mean of a pooling classifier).

    Args:
        anatomy: the dense model's.
        heads: heads used in each block, ``[depth]``, or ``[images, depth]`` where images use different ones.
        attended: ``[images, depth]`` tokens that keys and values are computed for.
        queries: ``[images, depth]`` tokens that attend.
        fed: ``[images, depth]`` tokens that pass the MLP.
        deciding: ``[images]`` MACs spent on pricing, matching and merging.

    Returns:
        ``[images]`` counts.
    """
    total = deciding + pooling_macs(anatomy, fed[:, -1]) + fixed_macs(anatomy)
    used = np.broadcast_to(np.asarray(heads, dtype=np.int64), attended.shape)
    for block in range(anatomy.depth):
        total = total + block_macs(anatomy, used[:, block], attended[:, block], queries[:, block], fed[:, block])
    return total


def head_macs(anatomy: Anatomy) -> int:
    """MACs that removing one head saves in the dense model."""
    every = np.array([anatomy.tokens], dtype=np.int64)
    return int((block_macs(anatomy, 1, every, every, every) - block_macs(anatomy, 0, every, every, every))[0])


def token_macs(anatomy: Anatomy, blocks: Sequence[int]) -> float:
    """MACs that letting one token go saves in the dense model, averaged over the ``blocks`` in which it may leave."""
    every = np.array([anatomy.tokens], dtype=np.int64)
    fewer = every - 1
    whole = int((block_macs(anatomy, anatomy.heads, every, every, every) - block_macs(anatomy, anatomy.heads, fewer, fewer, fewer))[0])
    feed = 2 * anatomy.width * anatomy.mlp_width + (anatomy.readout_token_macs or 0)
    return float(np.mean([feed + whole * (anatomy.depth - 1 - block) for block in blocks]))
