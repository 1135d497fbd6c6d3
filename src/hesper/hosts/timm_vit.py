"""timm's ``VisionTransformer`` family as a host: the only file that knows timm's module names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.hosts.base import HostBlock, Projected
from hesper.plan import Anatomy


class TimmBlock:
    """A timm ``Block`` taken apart; composes the block's own submodules and copies none of its arithmetic."""

    def __init__(self, block: Any) -> None:
        self.block = block

    @property
    def heads(self) -> int:
        """Number of attention heads this block has now."""
        return int(self.block.attn.num_heads)

    @property
    def scale(self) -> float:
        """Factor on the attention logits."""
        return float(self.block.attn.scale)

    def project(self, stream: Tensor) -> Projected:
        """Norm, queries, keys and values of ``[..., width]`` rows."""
        attn = self.block.attn
        normed = self.block.norm1(stream)
        qkv = attn.qkv(normed)
        qkv = qkv.view(*qkv.shape[:-1], 3, attn.num_heads, attn.head_dim)
        query, key, value = qkv.unbind(-3)
        return Projected(normed, attn.q_norm(query), attn.k_norm(key), value)

    def project_readers(self, stream: Tensor, readers: Tensor) -> Projected:
        """As :meth:`project`, with queries for the ``readers`` rows only: the query rows of the fused weight serve them alone."""
        attn = self.block.attn
        normed, inner = self.block.norm1(stream), attn.attn_dim
        bias_q, bias_kv = (None, None) if attn.qkv.bias is None else (attn.qkv.bias[:inner], attn.qkv.bias[inner:])
        query = nn.functional.linear(self.block.norm1(readers), attn.qkv.weight[:inner], bias_q)
        query = query.view(*query.shape[:-1], attn.num_heads, attn.head_dim)
        pair = nn.functional.linear(normed, attn.qkv.weight[inner:], bias_kv)
        key, value = pair.view(*pair.shape[:-1], 2, attn.num_heads, attn.head_dim).unbind(-3)
        return Projected(normed, attn.q_norm(query), attn.k_norm(key), value)

    def merge_heads(self, mixed: Tensor) -> Tensor:
        """The residual update ``[..., width]`` from attention outputs ``[..., heads * head_dim]``."""
        block, attn = self.block, self.block.attn
        out: Tensor = block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(mixed)))))
        return out

    def feed(self, stream: Tensor) -> Tensor:
        """The residual update ``[..., width]`` of the feed-forward half."""
        block = self.block
        out: Tensor = block.drop_path2(block.ls2(block.mlp(block.norm2(stream))))
        return out

    def remove_heads(self, heads: Sequence[int]) -> None:
        """Slice ``heads`` out of the QKV and projection weights; refused where a norm spans all heads."""
        attn = self.block.attn
        if not isinstance(attn.norm, nn.Identity):
            raise UsageError("Heads cannot be removed from a block whose attention output is normalised over all heads; use --heads none.")
        keep = [h for h in range(attn.num_heads) if h not in set(heads)]
        columns = torch.cat([torch.arange(h * attn.head_dim, (h + 1) * attn.head_dim) for h in keep])
        rows = torch.cat([columns + part * attn.num_heads * attn.head_dim for part in range(3)])
        attn.qkv = _sliced(attn.qkv, rows=rows)
        attn.proj = _sliced(attn.proj, columns=columns)
        attn.num_heads = len(keep)
        attn.attn_dim = len(keep) * attn.head_dim


class TimmViT:
    """A timm ``VisionTransformer`` as a :class:`~hesper.hosts.base.Host`.

    Raises:
        UsageError: the model, or one of its blocks, is of a type whose halves are not known to compose.

    Example:
        >>> import timm
        >>> host = TimmViT(timm.create_model("test_vit", num_classes=7).eval())
        >>> host.anatomy.depth, host.anatomy.tokens, host.anatomy.prefix_tokens
        (6, 101, 1)
    """

    def __init__(self, module: Any) -> None:
        if type(module) is not VisionTransformer:
            raise UsageError(
                f"A model of type {type(module).__name__} is not supported, since its parts are not known to compose; use one of "
                "timm's VisionTransformer models (ViT, DeiT without distillation, DeiT-III, DINOv2 and their like)."
            )
        _check_parts(module)
        self.module: Any = module
        self.blocks: Sequence[HostBlock] = tuple(TimmBlock(block) for block in module.blocks)
        self.anatomy = _anatomy(module)
        self.heads_removable = all(isinstance(block.attn.norm, nn.Identity) for block in module.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """The token stream ``[images, tokens, width]`` that enters the first block."""
        model = self.module
        out: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return out

    def norm(self, stream: Tensor) -> Tensor:
        """The host's final norm, on rows."""
        out: Tensor = self.module.norm(stream)
        return out

    def readout(self, prefix: Tensor, patch_mean: Tensor | None) -> Tensor:
        """Logits from normed prefix rows and, for pooling hosts, the size-weighted mean of the normed patch rows."""
        model = self.module
        tokens = prefix
        if model.global_pool == "avg":
            assert patch_mean is not None
            tokens = torch.cat([prefix, patch_mean[:, None]], 1)
        out: Tensor = model.forward_head(tokens)
        return out


def _check_parts(module: Any) -> None:
    """Refuse, by name, every part whose halves or whose multiply-accumulate counts are not known."""
    embed, head = module.patch_embed, module.head
    if module.attn_pool is not None or module.global_pool not in ("token", "avg") or module.pool_include_prefix:
        pooling = f"{module.global_pool}{' with prefix tokens' if module.pool_include_prefix and module.attn_pool is None else ''}"
        raise UsageError(f"A classifier that pools by '{pooling}' is not supported; class-token ('token') and average ('avg') pooling are.")
    if type(embed) is not PatchEmbed or embed.dynamic_img_pad:
        kind = f"{type(embed).__name__}{' with dynamic padding' if type(embed) is PatchEmbed else ''}"
        raise UsageError(f"A patch embedding of type {kind} is not supported; timm's plain PatchEmbed is.")
    channels = int(embed.proj.in_channels)
    if channels != 3:
        raise UsageError(f"A model of images with {channels} channels is not supported; images have 3 here (red, green, blue).")
    if not isinstance(head, nn.Linear):
        raise UsageError(f"A classifier of type {type(head).__name__} is not supported; give the model a Linear head (num_classes > 0).")
    for index, block in enumerate(module.blocks):
        if reason := _refusal(block):
            raise UsageError(f"Block {index} {reason}, which is not supported; plain timm Blocks with plain Attention are.")
        if _shape(block) != _shape(module.blocks[0]):
            raise UsageError(f"Block {index} has another shape than block 0, which is not supported; give the dense model.")


def _refusal(block: Any) -> str | None:
    """What keeps a block from being taken apart."""
    if type(block) is not Block:
        return f"is a {type(block).__name__}"
    attn = block.attn
    if type(attn) is not Attention:
        return f"has attention of type {type(attn).__name__}"
    if attn.gate is not None:
        return "has gated attention"
    if not isinstance(attn.qkv, nn.Linear) or not isinstance(attn.proj, nn.Linear):
        return f"has projections of types {type(attn.qkv).__name__} and {type(attn.proj).__name__}"
    if type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"has a feed-forward half of type {type(block.mlp).__name__}"
    return None


def _shape(block: Any) -> tuple[int, int, int]:
    """Heads, head width, and the MLP's weights."""
    weights = sum(part.weight.numel() for part in block.mlp.modules() if isinstance(part, nn.Linear))
    return int(block.attn.num_heads), int(block.attn.head_dim), weights


def _anatomy(module: Any) -> Anatomy:
    embed = module.patch_embed
    prefix = int(module.num_prefix_tokens)
    heads, head_dim, feed_weights = _shape(module.blocks[0])
    grid = tuple(int(n) for n in embed.grid_size)
    return Anatomy(
        depth=len(module.blocks),
        width=int(module.embed_dim),
        heads=heads,
        head_dim=head_dim,
        # The width of the plain MLP with as many weights: a gated one has three matrices.
        mlp_width=feed_weights // (2 * int(module.embed_dim)),
        tokens=prefix + grid[0] * grid[1],
        prefix_tokens=prefix,
        classes=int(module.head.out_features),
        patch_values=int(embed.proj.weight[0].numel()),
        image_size=(int(embed.img_size[0]), int(embed.img_size[1])),
        grid=(grid[0], grid[1]),
        reads_patches=module.global_pool == "avg",
    )


def _sliced(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight: Tensor = linear.weight.detach()
    bias: Tensor | None = None if linear.bias is None else linear.bias.detach()
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        bias = None if bias is None else bias[rows.to(weight.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    small.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        small.bias = nn.Parameter(bias.clone(), requires_grad=linear.weight.requires_grad)
    return small
