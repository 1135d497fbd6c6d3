"""The two ends that timm's vision transformers share: what is refused there, the anatomy, and reading the classes out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.hosts.parts import linear_weights, mean, with_prefix
from hesper.plan import Anatomy

MLPS = (Mlp, GluMlp, SwiGLU)


def check_ends(module: Any) -> None:
    """Refuse, by name, an embedding, pooling or classifier whose parts or whose multiply-accumulate counts are not known."""
    embed, head = module.patch_embed, module.head
    if module.attn_pool is not None:
        _check_attention_pool(module.attn_pool)
    elif module.global_pool not in ("token", "avg"):
        raise UsageError(
            f"A classifier that pools by '{module.global_pool}' is not supported; class-token ('token'), average ('avg') and attention "
            "('map') pooling are."
        )
    if type(embed) is not PatchEmbed or embed.dynamic_img_pad:
        kind = f"{type(embed).__name__}{' with dynamic padding' if type(embed) is PatchEmbed else ''}"
        raise UsageError(f"A patch embedding of type {kind} is not supported; timm's plain PatchEmbed is.")
    channels = int(embed.proj.in_channels)
    if channels != 3:
        raise UsageError(f"A model of images with {channels} channels is not supported; images have 3 here (red, green, blue).")
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"A classifier of type {type(head).__name__} is not supported; give the model a Linear head (num_classes > 0), for example by "
            "--weights that were trained with one."
        )


def _check_attention_pool(pool: Any) -> None:
    reason = None
    if type(pool) is not AttentionPoolLatent:
        reason = f"attention pooling of type {type(pool).__name__}, whose reading of merged tokens is not known"
    elif pool.pos_embed is not None:
        reason = "attention pooling with positions of its own, which tokens that merge do not keep"
    elif "attn_mask" not in inspect.signature(pool.forward).parameters:
        reason = "attention pooling that cannot weigh tokens in this version of timm; upgrade timm"
    if reason is not None:
        raise UsageError(f"A classifier with {reason} is not supported; class-token, average and plain latent attention pooling are.")


def fix_image_size(module: Any) -> None:
    """Make a model that takes images of any size take its own alone: exported, it would resize its positions for every image.

    In place; where positions are rotations too, which are resized likewise, the model stays as it is.
    """
    if getattr(module, "dynamic_img_size", False) and getattr(module, "rope", None) is None:
        module.dynamic_img_size = False
        module.patch_embed.flatten = True


def shape(block: Any) -> tuple[int, int, int]:
    """Heads, head width, and the feed-forward half's weights."""
    return int(block.attn.num_heads), int(block.attn.head_dim), linear_weights(block.mlp)


def check_same_shape(blocks: Any) -> None:
    """UsageError where a block has another shape than the first."""
    for index, block in enumerate(blocks):
        if shape(block) != shape(blocks[0]):
            raise UsageError(f"Block {index} has another shape than block 0, which is not supported; give the dense model.")


def anatomy_of(module: Any, classifiers: int = 1) -> Anatomy:
    """The anatomy of a timm model with this many linear classifiers, each over ``width`` numbers."""
    embed, width = module.patch_embed, int(module.embed_dim)
    prefix = int(module.num_prefix_tokens)
    heads, head_dim, feed_weights = shape(module.blocks[0])
    grid = tuple(int(n) for n in embed.grid_size)
    readout, per_token = _pool_macs(module, prefix)
    return Anatomy(
        depth=len(module.blocks),
        width=width,
        heads=heads,
        head_dim=head_dim,
        # The width of the plain MLP with as many weights: a gated one has three matrices.
        mlp_width=feed_weights // (2 * width),
        tokens=prefix + grid[0] * grid[1],
        prefix_tokens=prefix,
        classes=int(module.head.out_features),
        patch_values=int(embed.proj.weight[0].numel()),
        image_size=(int(embed.img_size[0]), int(embed.img_size[1])),
        grid=(grid[0], grid[1]),
        reads_patches=module.attn_pool is not None or module.global_pool == "avg",
        readout_macs=readout + classifiers * linear_weights(module.head) if readout or classifiers > 1 else None,
        readout_token_macs=per_token or None,
    )


def pools_prefix(module: Any) -> bool:
    """Whether pooling reads the prefix tokens too; EVA's attention pooling always does."""
    return bool(getattr(module, "pool_include_prefix", module.attn_pool is not None))


def _pool_macs(module: Any, prefix: int) -> tuple[int, int]:
    """MACs of attention pooling: per image (prefix tokens included, where it reads them), and per patch."""
    pool = module.attn_pool
    if pool is None:
        return 0, 0
    per_token = linear_weights(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
    per_image = pool.latent_len * sum(linear_weights(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
    return per_image + (prefix * per_token if pools_prefix(module) else 0), per_token


def read_out(module: Any, prefix: Tensor, patches: Tensor | None, weight: Tensor | None) -> Tensor:
    """Logits from normed rows (see :meth:`hesper.hosts.base.Host.readout`), by the model's own pooling and head."""
    out: Tensor
    if patches is None:
        out = module.forward_head(prefix)
        return out
    tokens = patches
    if pools_prefix(module):
        tokens, weight = with_prefix(prefix, patches, weight)
    if module.attn_pool is None:
        # The head takes the mean of what follows the prefix (or of everything): here the weighted mean alone.
        pooled = mean(tokens, weight)[:, None]
        out = module.forward_head(pooled if pools_prefix(module) else torch.cat([prefix, pooled], 1))
        return out
    mask = None if weight is None else weight.log()[:, None, None].to(tokens.dtype)
    out = module.head(module.head_drop(module.fc_norm(module.attn_pool(tokens, attn_mask=mask))))
    return out
