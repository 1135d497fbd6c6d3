"""Attention over packed rows: one call for a rectangular batch, whatever suits the device for a ragged one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hesper.graft.compiling import eager
from hesper.graft.layout import Layout
from hesper.graft.ragged import Asked, Strategy, as_mask, choose, per_head
from hesper.hosts.base import Projected
from hesper.precision import wide


def attend(projected: Projected, log_size: Tensor | None, layout: Layout, scale: float, strategy: Strategy | None = None) -> Tensor:
    """Proportional attention of packed rows: softmax(scale q k^T + log size) v.

    A token of size s weighs as much as s equal tokens (ToMe, arXiv 2210.09461, section 3.2).

    Args:
        projected: queries, keys and values ``[rows, heads, head_dim]``.
        log_size: ``[rows]`` or, for a bias per head, ``[rows, heads]``; None where every token has size 1.
        layout: of the rows.
        scale: on the logits.
        strategy: how to run a ragged batch; None for what suits device and precision.

    Returns:
        ``[rows, heads * head_dim]``.
    """
    if layout.rectangular:
        return _rectangular(layout.by_image(projected.query), projected, log_size, layout, scale).flatten(0, 1)
    return _ragged(projected.query, layout, projected, log_size, layout, scale, strategy)


@eager
def attend_readers(projected: Projected, log_size: Tensor | None, layout: Layout, scale: float, strategy: Strategy | None = None) -> Tensor:
    """As :func:`attend` for ``prefix`` queries per image only: ``[images, prefix, heads * head_dim]``.

    ``projected.query`` is ``[images, prefix, heads, head_dim]``; keys and values are packed rows.
    """
    if layout.rectangular:
        return _rectangular(projected.query, projected, log_size, layout, scale)
    images, prefix = projected.query.shape[:2]
    asking = layout.with_counts((prefix,) * images)
    mixed = _ragged(projected.query.flatten(0, 1), asking, projected, log_size, layout, scale, strategy)
    return mixed.view(images, prefix, -1)


def _rectangular(query: Tensor, projected: Projected, log_size: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """Mixed values ``[images, queries, heads * head_dim]`` in one call; ``query`` is ``[images, queries, heads, head_dim]``."""
    key, value = (layout.by_image(t).transpose(1, 2) for t in (projected.key, projected.value))
    mask = None if log_size is None else as_mask(layout.by_image(per_head(log_size)), query)
    mixed = scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


def _ragged(
    query: Tensor,
    asking: Layout,
    projected: Projected,
    log_size: Tensor | None,
    layout: Layout,
    scale: float,
    strategy: Strategy | None,
) -> Tensor:
    """Mixed values ``[queries, heads * head_dim]`` of packed queries ``[queries, heads, head_dim]`` that lie as ``asking`` says."""
    run = strategy or choose(query.device, query.dtype, query.shape[-1], query.requires_grad and torch.is_grad_enabled())
    return run(Asked(query, projected.key, projected.value, log_size, asking, layout, scale))


def reader_attention(projected: Projected, log_size: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """Log of the reader's attention to each token, per unit of its size: ``[rows, heads]``.

    With reader query q, log a_i = scale q k_i - log sum_j s_j exp(scale q k_j). The reader is the first prefix token, or the
    mean query where a host has no prefix.

    Args:
        projected: queries and keys ``[rows, heads, head_dim]``.
        log_size: ``[rows]`` or, for a bias per head, ``[rows, heads]``; None where every token has size 1.
        layout: of the rows.
        scale: on the logits.
    """
    queries, keys = wide(projected.query), wide(projected.key)  # what is decided from them should not hang on halves
    reader = layout.prefix_rows(queries)[:, 0] if layout.prefix else torch.stack([own.mean(0) for own in layout.split(queries)])
    # Products and sums rather than a matrix product: with one query per image, arranging the keys for it costs more than it saves.
    logits = (keys * layout.spread(reader * scale)).sum(-1)
    bias = None if log_size is None else per_head(log_size).to(logits.dtype)
    mass = logits if bias is None else logits + bias
    if layout.rectangular:
        share = layout.by_image(mass).log_softmax(1).flatten(0, 1)
        return share if bias is None else share - bias
    top = torch.segment_reduce(mass, "max", lengths=layout.lengths, axis=0, unsafe=True)
    total = torch.segment_reduce((mass - layout.spread(top)).exp(), "sum", lengths=layout.lengths, axis=0, unsafe=True)
    return logits - layout.spread(total.log() + top)
