"""Tiny timm vision transformers of every supported kind, plans and tables for them, and a forward pass written from its definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hesper.curvature import ImageBatch
from hesper.graft.layout import Layout
from hesper.heart.fit import dense_states
from hesper.hosts import Host, open_host
from hesper.plan import Combine, HeadCut, HeadGate, Plan, Pricing, TokenCut, empty_plan

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"init_values": 0.3},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 4, "init_values": 0.2},
    "attention_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "pooled_with_class": {"global_pool": "avg", "fc_norm": False},
    "pooled_registers": {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "fc_norm": True, "no_embed_class": True},
    "fc_norm": {"fc_norm": True},
    "deit3": {"no_embed_class": True, "init_values": 1e-1},
    "dinov2": {"init_values": 0.5, "reg_tokens": 1, "no_embed_class": True, "dynamic_img_size": True},
    "clip": {"pre_norm": True, "qkv_bias": False},
    "wide_heads": {"num_heads": 2},
    "no_final_norm": {"final_norm": False},
}
REMOVABLE = [kind for kind in KINDS if kind != "attention_norm"]
READERS = [kind for kind, options in KINDS.items() if options.get("global_pool") != "avg"]
RANK = 5


def lies(layout: Layout, image: int) -> int:
    """Where an image of the batch lies among the runs of rows."""
    return layout.listed(range(len(layout.counts)))[image]


def vit(kind: str = "plain", dtype: torch.dtype = torch.float32, **options: Any) -> VisionTransformer:
    """A tiny model with weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": (32, 24), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**shape, "mlp_ratio": 2, **KINDS[kind], **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().to(dtype)


def pictures(count: int, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (32, 24)) -> Tensor:
    """Images of rising contrast, so that adaptive cuts differ between them."""
    noise = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return noise * torch.linspace(0.2, 2.5, count, dtype=dtype)[:, None, None, None]


def tables(model: VisionTransformer, seed: int = 2) -> dict[str, Tensor]:
    """Random pricing tables for every block."""
    anatomy, generator = open_host(model).anatomy, torch.Generator().manual_seed(seed)
    out = {}
    for block in range(anatomy.depth):
        out[f"{block}.root"] = torch.randn(anatomy.width, RANK, generator=generator)
        out[f"{block}.router.direction"] = torch.randn(anatomy.width, generator=generator) * 0.2
        out[f"{block}.router.attention"] = torch.randn(anatomy.heads, generator=generator) * 0.3
        out[f"{block}.router.offset"] = torch.randn((), generator=generator) - 1
    return out


def learned_tables(model: VisionTransformer) -> dict[str, Tensor]:
    """Random values of what refining merging learns, far from where it starts."""
    anatomy, generator = open_host(model).anatomy, torch.Generator().manual_seed(7)
    out = {"size_exponent": 0.4 + torch.rand(anatomy.depth, anatomy.heads, generator=generator)}
    for block in range(anatomy.depth):
        out[f"{block}.restoration.stretch"] = torch.rand((), generator=generator) * 2
        out[f"{block}.restoration.gain"] = torch.randn(anatomy.width, generator=generator) * 0.3
    return out


def plan_for(
    model: VisionTransformer,
    cuts: Sequence[TokenCut] = (),
    criterion: str = "kl",
    heads: Sequence[HeadCut] = (),
    skip_unread: bool = False,
    gates: Sequence[HeadGate] = (),
) -> Plan:
    """A plan for a tiny model."""
    blank = empty_plan("tiny", open_host(model).anatomy)
    pricing = Pricing(criterion, 4.0, 3, RANK, 0.5, 2)
    cut = {"tokens": tuple(cuts), "heads": tuple(heads), "gates": tuple(gates)}
    return dataclasses.replace(blank, pricing=pricing, skip_unread=skip_unread, **cut)


def cuts_of(combine: Combine, blocks: Sequence[int], **how: Any) -> list[TokenCut]:
    """The same cut after several blocks."""
    return [TokenCut(block, combine, **how) for block in blocks]


def attention_by_hand(block: Any, stream: Tensor, copies: Tensor) -> Tensor:
    """The stream after one block's attention for one image ``[tokens, width]``, key j counted ``copies[j]`` times.

    ``copies`` is ``[tokens]``, or ``[heads, 1, tokens]`` where heads count differently.
    """
    attn = block.attn
    qkv = attn.qkv(block.norm1(stream)).view(len(stream), 3, attn.num_heads, attn.head_dim)
    query, key, value = attn.q_norm(qkv[:, 0]), attn.k_norm(qkv[:, 1]), qkv[:, 2]
    weight = torch.einsum("qhd,khd->hqk", query, key).mul(attn.head_dim**-0.5).exp() * copies
    mixed = torch.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdim=True), value).flatten(1)
    return stream + block.ls1(attn.proj(attn.norm(mixed)))


def feed_by_hand(block: Any, stream: Tensor) -> Tensor:
    """The stream after one block's feed-forward half."""
    return stream + block.ls2(block.mlp(block.norm2(stream)))


def logits_by_hand(model: VisionTransformer, stream: Tensor, copies: Tensor) -> Tensor:
    """Logits ``[classes]`` of one image's last stream ``[tokens, width]``; a mean counts token j ``copies[j]`` times."""
    normed, prefix = model.norm(stream), model.num_prefix_tokens
    if model.global_pool == "avg":
        weight = copies[prefix:, None] / copies[prefix:].sum()
        return model.head(model.fc_norm((normed[prefix:] * weight).sum(0)))
    return model.head(model.fc_norm(normed[0]))


def gate_tables(model: Any, seed: int = 3) -> dict[str, Tensor]:
    """Random gates that price every head around one on images like the tests', and attention to stand in for heads that sit out."""
    host, generator = open_host(model), torch.Generator().manual_seed(seed)
    anatomy, like = host.anatomy, next(host.module.parameters())
    images = pictures(6, like.dtype, anatomy.image_size)
    out = {}
    for block, state in enumerate(dense_states(host, images)):
        direction = torch.randn(anatomy.width, anatomy.heads, generator=generator)
        row = state.layout.prefix_rows(state.normed)[:, 0] if anatomy.prefix_tokens else state.layout.by_image(state.normed).mean(1)
        out[f"{block}.gate.direction"] = direction
        # The first block's class token is the same in every image, so without a little more its price would be one to the last digit.
        aside = torch.tensor([0.1 if head % 2 else -0.1 for head in range(anatomy.heads)])
        out[f"{block}.gate.offset"] = aside - (row.float() @ direction).mean(0)
        out[f"{block}.router.mean_attention"] = torch.randn(anatomy.heads, generator=generator) - 3
    return out


SMALLEST = {"img_size": (16, 16), "embed_dim": 6, "depth": 2, "num_heads": 2}


def tiny_host(kind: str = "plain") -> Host:
    """A float64 host small enough for dense Hessians: four patches, two blocks of two heads, width 6."""
    return open_host(vit(kind, torch.float64, **SMALLEST).requires_grad_(False))


def tiny_batch(images: int) -> ImageBatch:
    """Labelled float64 images for `tiny_host`."""
    return ImageBatch(pictures(images, torch.float64, (16, 16)), torch.arange(images) % 5)
