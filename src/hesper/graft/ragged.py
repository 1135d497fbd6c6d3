"""Attention over images of unequal token counts: three ways of running it, and which one a device and a precision get."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hesper.graft.buckets import side_by_side
from hesper.graft.layout import Layout
from hesper.precision import wide

WIDTHS = 8  # fused variable-length kernels take head widths that are multiples of this
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Asked:
    """What attention is asked for: each image's queries to its own keys.

    ``query`` ``[queries, heads, head_dim]`` lies as ``asking`` says, ``key`` and ``value`` ``[rows, heads, head_dim]`` as ``layout``.
    ``log_size`` is ``[rows]`` or, for a bias per head, ``[rows, heads]``; None where every token has size 1. ``scale`` is a factor on
    the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_size: Tensor | None
    asking: Layout
    layout: Layout
    scale: float


class Strategy(Protocol):
    """One way of running ragged attention."""

    def __call__(self, asked: Asked) -> Tensor:
        """softmax(scale q k^T + log size) v of every image, ``[queries, heads * head_dim]``."""


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, gradient: bool) -> Strategy:
    """The way that suits a device and a precision.

    | device | half precision, no gradient | otherwise |
    | --- | --- | --- |
    | processor | runs of equal counts | runs of equal counts |
    | CUDA | variable-length kernel where one runs | buckets |
    | any other | buckets | buckets |

    Example:
        >>> choose(torch.device("cpu"), torch.float32, 64, False).__name__
        'run_by_run'
    """
    if device.type == "cpu":
        return run_by_run
    if not gradient and varlen_runs(device, dtype, head_dim):
        return varlen
    return bucketed


def per_head(log_size: Tensor) -> Tensor:
    """``[rows]`` as ``[rows, 1]``; ``[rows, heads]`` stays."""
    return log_size if log_size.ndim == 2 else log_size[:, None]


def as_mask(bias: Tensor, like: Tensor) -> Tensor:
    """A bias ``[images, tokens, 1 or heads]`` as an attention mask ``[images, 1 or heads, 1, tokens]``, as precise as ``like``.

    Along the tokens it is contiguous: a processor's kernel takes longer where it is not.
    """
    return bias.to(like.dtype).transpose(1, 2).contiguous()[:, :, None]


def run_by_run(asked: Asked) -> Tensor:
    """One call per run of neighbouring images of equal counts, on views."""
    runs = [(len(list(run)), *counts) for counts, run in itertools.groupby(zip(asked.asking.counts, asked.layout.counts, strict=True))]
    # Along the tokens it is contiguous: a processor's kernel takes longer where it is not.
    bias = None if asked.log_size is None else per_head(asked.log_size).to(asked.query.dtype).T.contiguous()
    mixed, asks, has = [], 0, 0
    for images, queries, keys in runs:
        query = _apart(asked.query[asks : (asks := asks + images * queries)], images)
        rows = slice(has, has := has + images * keys)
        key, value = _apart(asked.key[rows], images), _apart(asked.value[rows], images)
        mask = None if bias is None else bias[:, rows].view(len(bias), images, 1, keys).transpose(0, 1)
        own = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=asked.scale)
        mixed.append(own.transpose(1, 2).reshape(images * queries, -1))
    return torch.cat(mixed)


def _apart(rows: Tensor, images: int) -> Tensor:
    """Packed rows ``[images * tokens, heads, head_dim]`` of images of equal counts as a view ``[images, heads, tokens, head_dim]``."""
    return rows.view(images, -1, *rows.shape[1:]).transpose(1, 2)


def bucketed(asked: Asked) -> Tensor:
    """One call per bucket of images of about equal counts; places that an image leaves empty are masked."""
    held = asked.layout.buckets
    asking = held if asked.asking is asked.layout else side_by_side(asked.asking.bounds, asked.layout.together, asked.asking.device)
    bias = None if asked.log_size is None else per_head(asked.log_size).index_select(0, held.row)
    if held.empty is not None:
        bias = torch.zeros_like(held.empty, dtype=asked.query.dtype)[:, None] if bias is None else bias
        bias = bias.masked_fill(held.empty[:, None], -math.inf)
    masks = [None] * len(held.shapes) if bias is None else [as_mask(own, asked.query) for own in held.cut(bias)]
    parts = zip(asking.spread(asked.query), held.spread(asked.key), held.spread(asked.value), masks, strict=True)
    return asking.gather(
        [
            scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=asked.scale
            ).transpose(1, 2)
            for query, key, value, mask in parts
        ]
    ).flatten(1)


def varlen(asked: Asked) -> Tensor:
    """One call of a fused variable-length kernel, the bias folded into the product (:func:`widened`)."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = widened(asked.query, asked.key, asked.value, asked.log_size, asked.scale)
    most = max(asked.asking.counts), max(asked.layout.counts)
    mixed = varlen_attn(query, key, value, asked.asking.ends, asked.layout.ends, *most, scale=asked.scale)
    assert isinstance(mixed, Tensor)
    return mixed[..., : asked.value.shape[-1]].flatten(1)


def widened(query: Tensor, key: Tensor, value: Tensor, log_size: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose plain attention is the proportional one: a bias on every key becomes two more coordinates.

    With c a power of two near 1 / scale,

        scale [q, c, c] . [k, high, low] = scale q k + log size,    high + low = log size / (scale c),

    where ``high`` is the bias rounded to the keys' precision and ``low`` what the rounding left, so that half precision keeps the bias to
    twice its own digits. Zeros fill all three up to a multiple of eight coordinates.

    Args:
        query: ``[queries, heads, head_dim]``.
        key: ``[rows, heads, head_dim]``.
        value: ``[rows, heads, head_dim]``.
        log_size: ``[rows]`` or ``[rows, heads]``; None adds no coordinates.
        scale: on the logits.

    Example:
        >>> one = torch.ones(1, 1, 6)
        >>> wide, keys, _ = widened(one, one, one, torch.tensor([2.0]), 0.5)
        >>> wide.shape, ((wide * keys).sum() * 0.5).item()
        (torch.Size([1, 1, 8]), 5.0)
    """
    added = 0 if log_size is None else 2
    fill = -(key.shape[-1] + added) % WIDTHS
    if log_size is not None:
        factor = 2.0 ** round(-math.log2(scale))
        bias = wide(per_head(log_size)) / (scale * factor)
        high = bias.to(key.dtype)
        low = (bias - high).to(key.dtype)
        pair = torch.stack([high, low], -1).expand(*key.shape[:-1], 2)
        query = torch.cat([query, query.new_full((*query.shape[:-1], 2), factor)], -1)
        key = torch.cat([key, pair], -1)
    pad = torch.nn.functional.pad
    return pad(query, (0, fill)), pad(key, (0, fill)), pad(value, (0, fill + added))


@functools.lru_cache(maxsize=64)
def varlen_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a variable-length kernel runs there, found by running it on a tiny input."""
    if device.type != "cuda" or dtype not in HALVES:
        return False
    layout = Layout((2, 1), 1, device)
    token = torch.zeros(3, 1, head_dim, device=device, dtype=dtype)
    # No such kernel in this torch, no scale on it, or none for this device or width: each says so in its own way.
    with contextlib.suppress(ImportError, TypeError, ValueError, RuntimeError), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        varlen(Asked(token, token, token, token[:, 0, 0], layout, layout, 1.0))
        return True
    return False
