"""Attention over packed rows: one call for a rectangular batch, one call per image for a ragged one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hesper.graft.layout import Layout
from hesper.hosts.base import Projected

LARGEST_LOGIT = 80.0


def attend(projected: Projected, log_size: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """Proportional attention of packed rows: softmax(scale q k^T + log size) v.

    A token of size s weighs as much as s equal tokens (ToMe, arXiv 2210.09461, section 3.2).

    Args:
        projected: queries, keys and values ``[rows, heads, head_dim]``.
        log_size: ``[rows]``, or None where every token has size 1.
        layout: of the rows.
        scale: on the logits.

    Returns:
        ``[rows, heads * head_dim]``.
    """
    if layout.rectangular:
        shape = (len(layout.counts), layout.counts[0])
        query, key, value = (t.view(*shape, *t.shape[1:]).transpose(1, 2) for t in (projected.query, projected.key, projected.value))
        mask = None if log_size is None else log_size.view(shape[0], 1, 1, shape[1])
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)
    parts = []
    for first, last in zip(layout.bounds, layout.bounds[1:], strict=False):
        query, key, value = (t[first:last].transpose(0, 1)[None] for t in (projected.query, projected.key, projected.value))
        mask = None if log_size is None else log_size[None, None, None, first:last]
        parts.append(scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts).flatten(1)


def attend_readers(projected: Projected, log_size: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """As :func:`attend` for ``prefix`` queries per image only: ``[images, prefix, heads * head_dim]``.

    ``projected.query`` is ``[images, prefix, heads, head_dim]``; keys and values are packed rows.
    """
    parts = []
    for image, (first, last) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False)):
        query = projected.query[image].transpose(0, 1)[None]
        key, value = (t[first:last].transpose(0, 1)[None] for t in (projected.key, projected.value))
        mask = None if log_size is None else log_size[None, None, None, first:last]
        parts.append(scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2))
    return torch.cat(parts)


def reader_attention(projected: Projected, log_size: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """Log of the reader's attention to each token, per unit of its size: ``[rows, heads]``.

    The reader is the first prefix token, or the mean query where a host has no prefix.
    """
    query, key = projected.query, projected.key
    if layout.rectangular:
        shape = (len(layout.counts), layout.counts[0])
        queries = query.view(*shape, *query.shape[1:])
        reader = queries[:, 0] if layout.prefix else queries.mean(1)
        logits = torch.einsum("bhd,bnhd->bnh", reader, key.view(*shape, *key.shape[1:])).flatten(0, 1)
    else:
        parts = []
        for first, last in zip(layout.bounds, layout.bounds[1:], strict=False):
            reader = query[first] if layout.prefix else query[first:last].mean(0)
            parts.append((key[first:last].transpose(0, 1) @ reader[..., None])[..., 0].T)
        logits = torch.cat(parts)
    logits = logits * scale
    # Sums of exponentials stay finite below e^88; no trained model's logits come near.
    mass = (logits if log_size is None else logits + log_size[:, None]).clamp_max(LARGEST_LOGIT).exp()
    total = mass.new_zeros(len(layout.counts), mass.shape[1]).index_add(0, layout.image, mass)
    return logits - total.log()[layout.image]
