"""timm's ``VisionTransformer`` family as a host, DeiT's distilled one included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.hosts.base import HostBlock, Projected
from hesper.hosts.parts import PARTS, kept_columns, passed_on, sliced, thirds, twin, unbiased
from hesper.hosts.timm_ends import MLPS, anatomy_of, check_ends, check_same_shape, read_out


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

    @property
    def attention(self) -> nn.Module:
        """The submodule that holds the weights of the heads."""
        own: nn.Module = self.block.attn
        return own

    def normed(self, stream: Tensor) -> Tensor:
        """The norm that ``[..., width]`` rows pass before queries, keys and values are made of them."""
        out: Tensor = self.block.norm1(stream)
        return out

    def project(self, stream: Tensor, place: Tensor | None = None) -> Projected:
        """Norm, queries, keys and values of ``[..., width]`` rows."""
        attn, normed = self.block.attn, self.block.norm1(stream)
        if attn.qkv is None:
            query, key, value = (self._heads(getattr(attn, f"{part}_proj")(normed)) for part in PARTS)
        else:
            qkv = attn.qkv(normed)
            query, key, value = qkv.view(*qkv.shape[:-1], 3, attn.num_heads, attn.head_dim).unbind(-3)
        return Projected(normed, attn.q_norm(query), attn.k_norm(key), value)

    def project_readers(self, stream: Tensor, readers: Tensor, place: Tensor | None = None) -> Projected:
        """As :meth:`project`, with queries for the ``readers`` rows only: the query rows of a fused weight serve them alone."""
        attn, normed, reading = self.block.attn, self.block.norm1(stream), self.block.norm1(readers)
        if attn.qkv is None:
            query, key, value = attn.q_proj(reading), attn.k_proj(normed), attn.v_proj(normed)
        else:
            inner = attn.attn_dim
            bias_q, bias_kv = (None, None) if attn.qkv.bias is None else (attn.qkv.bias[:inner], attn.qkv.bias[inner:])
            query = nn.functional.linear(reading, attn.qkv.weight[:inner], bias_q)
            key, value = nn.functional.linear(normed, attn.qkv.weight[inner:], bias_kv).chunk(2, -1)
        return Projected(normed, attn.q_norm(self._heads(query)), attn.k_norm(self._heads(key)), self._heads(value))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:-1], self.heads, self.block.attn.head_dim)

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
        columns = kept_columns(attn.num_heads, attn.head_dim, heads)
        rows = torch.cat([columns + part * attn.num_heads * attn.head_dim for part in range(3)])
        attn.qkv = sliced(attn.qkv, rows=rows)
        attn.proj = sliced(attn.proj, columns=columns)
        attn.num_heads = len(columns) // attn.head_dim
        attn.attn_dim = len(columns)

    def separate(self, keys_read: bool) -> None:
        """Give queries, keys and values a linear layer each, in place, with the biases that are needed; timm's own forward is then lost."""
        attn = self.block.attn
        if attn.qkv is not None:
            attn.q_proj, attn.k_proj, attn.v_proj = thirds(attn.qkv)
            attn.qkv = None
        if isinstance(attn.norm, nn.Identity):
            attn.v_proj, attn.proj = passed_on(attn.v_proj, attn.proj)
        if isinstance(attn.k_norm, nn.Identity) and not keys_read:
            attn.k_proj = unbiased(attn.k_proj)

    def without_heads(self, heads: Sequence[int]) -> HostBlock:
        """A block like this one in which heads have left a copy of the attention weights."""
        other: TimmBlock = twin(self, self.block, self.attention)
        other.remove_heads(heads)
        return other


class TimmViT:
    """A timm ``VisionTransformer`` (or ``VisionTransformerDistilled``) as a :class:`~hesper.hosts.base.Host`.

    Raises:
        UsageError: one of the model's parts is of a type whose halves are not known to compose.

    Example:
        >>> import timm
        >>> host = TimmViT(timm.create_model("test_vit", num_classes=7).eval())
        >>> host.anatomy.depth, host.anatomy.tokens, host.anatomy.prefix_tokens
        (6, 101, 1)
    """

    library = "timm"
    reads_places = False

    def __init__(self, module: Any) -> None:
        distilled = type(module) is VisionTransformerDistilled
        check_ends(module)
        for index, block in enumerate(module.blocks):
            if reason := _refusal(block):
                raise UsageError(f"Block {index} {reason}, which is not supported; plain timm Blocks with plain Attention are.")
        check_same_shape(module.blocks)
        self.module: Any = module
        self.blocks: Sequence[HostBlock] = tuple(TimmBlock(block) for block in module.blocks)
        self.anatomy = anatomy_of(module, classifiers=2 if distilled else 1)
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

    def readout(self, prefix: Tensor, patches: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """Logits from normed prefix rows and, for pooling hosts, normed patch rows and what they count for."""
        return read_out(self.module, prefix, patches, weight)


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
    if type(block.mlp) not in MLPS:
        return f"has a feed-forward half of type {type(block.mlp).__name__}"
    return None
