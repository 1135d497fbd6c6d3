"""timm's ``Eva`` family as a host: EVA, EVA-02, and vision transformers with rotary positions.

A rotary embedding belongs to a token's place. Rows therefore come with the place they were embedded at, and each block looks up
its rotation there: a token that others merge into keeps its own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.hosts.base import HostBlock, Projected
from hesper.hosts.parts import PARTS, kept_columns, passed_on, sliced, thirds, twin
from hesper.hosts.timm_ends import MLPS, anatomy_of, check_ends, check_same_shape, read_out


class Rotation:
    """Sines and cosines of every place, prefix tokens included, as the last embedding left them.

    ``table`` is ``[places, 1, 2 * head_dim]``, or ``[depth, places, heads, 2 * head_dim]`` where every block has its own; None
    where nothing is rotated.
    """

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return Rotation()  # the next embedding fills it; a table that gradients run through cannot be copied

    def set(self, patches: Tensor | None, prefix: int) -> None:
        """Take the patches' embedding ``[patches, 2 * head_dim]`` or ``[depth, heads, patches, 2 * head_dim]``."""
        if patches is None:
            self.table = None
            return
        still = torch.zeros_like(patches[..., :1, :]).expand(*patches.shape[:-2], prefix, -1).clone()
        still[..., patches.shape[-1] // 2 :] = 1  # prefix tokens are turned by nothing: sine 0, cosine 1
        every = torch.cat([still, patches], -2)
        self.table = every[:, None] if every.ndim == 2 else every.transpose(1, 2)


class TimmEvaBlock:
    """A timm ``EvaBlock`` taken apart into its own submodules."""

    def __init__(self, block: Any, index: int, rotation: Rotation) -> None:
        self.block, self.index, self.rotation = block, index, rotation
        self.kept = list(range(block.attn.num_heads))

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
        """Norm, rotated queries and keys, and values of ``[..., width]`` rows at ``place``."""
        attn, normed = self.block.attn, self.block.norm1(stream)
        if attn.qkv is None:
            query, key, value = (self._heads(getattr(attn, f"{part}_proj")(normed)) for part in PARTS)
        else:
            query, key, value = (self._heads(part) for part in self._fused(normed, 0, 3).chunk(3, -1))
        query, key = attn.q_norm(query), attn.k_norm(key)
        return Projected(normed, self._rotated(query, place, value), self._rotated(key, place, value), value)

    def project_readers(self, stream: Tensor, readers: Tensor, place: Tensor | None = None) -> Projected:
        """As :meth:`project`, with queries for the ``readers`` rows only; prefix rows are not rotated."""
        attn, normed, reading = self.block.attn, self.block.norm1(stream), self.block.norm1(readers)
        if attn.qkv is None:
            query, key, value = attn.q_proj(reading), attn.k_proj(normed), attn.v_proj(normed)
        else:
            query = self._fused(reading, 0, 1)
            key, value = self._fused(normed, 1, 3).chunk(2, -1)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        return Projected(normed, attn.q_norm(query), self._rotated(attn.k_norm(key), place, value), value)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:-1], self.heads, -1)

    def _fused(self, normed: Tensor, first: int, end: int) -> Tensor:
        """Rows through the fused weight's parts ``first`` to ``end`` of query, key and value."""
        attn, inner, bias = self.block.attn, self.heads * self.block.attn.head_dim, self._bias()
        own = slice(first * inner, end * inner)
        if bias is not None and getattr(attn, "qkv_bias_separate", False):
            apart: Tensor = nn.functional.linear(normed, attn.qkv.weight[own]) + bias[own]
            return apart
        return nn.functional.linear(normed, attn.qkv.weight[own], None if bias is None else bias[own])

    def _bias(self) -> Tensor | None:
        """The fused weight's bias, which may be kept in three parts."""
        attn = self.block.attn
        if attn.qkv.bias is None and getattr(attn, "q_bias", None) is not None:
            return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        bias: Tensor | None = attn.qkv.bias
        return bias

    def _rotated(self, rows: Tensor, place: Tensor | None, like: Tensor) -> Tensor:
        """Queries or keys ``[..., heads, head_dim]`` turned by their places."""
        table = self.rotation.table
        if table is None:
            return rows
        if table.ndim == 4:
            table = table[self.index] if len(self.kept) == table.shape[2] else table[self.index][:, self.kept]
        out: Tensor = apply_rot_embed_cat(
            rows, table if place is None else table[place], half=getattr(self.block.attn, "rotate_half", False)
        )
        return out.type_as(like)

    def merge_heads(self, mixed: Tensor) -> Tensor:
        """The residual update ``[..., width]`` from attention outputs ``[..., heads * head_dim]``."""
        block, attn = self.block, self.block.attn
        out: Tensor = attn.proj_drop(attn.proj(attn.norm(mixed)))
        return self._scaled(out, block.gamma_1, block.drop_path1)

    def feed(self, stream: Tensor) -> Tensor:
        """The residual update ``[..., width]`` of the feed-forward half."""
        block = self.block
        return self._scaled(block.mlp(block.norm2(stream)), block.gamma_2, block.drop_path2)

    def _scaled(self, update: Tensor, gamma: Tensor | None, drop_path: Any) -> Tensor:
        out: Tensor = drop_path(update if gamma is None else gamma * update)
        return out

    def remove_heads(self, heads: Sequence[int]) -> None:
        """Slice ``heads`` out of the query, key, value and projection weights; refused where a norm spans all heads."""
        attn = self.block.attn
        if not isinstance(attn.norm, nn.Identity):
            raise UsageError("Heads cannot be removed from a block whose attention output is normalised over all heads; use --heads none.")
        columns = kept_columns(attn.num_heads, attn.head_dim, heads)
        if attn.qkv is not None:
            attn.qkv = sliced(attn.qkv, rows=torch.cat([columns + part * attn.num_heads * attn.head_dim for part in range(3)]))
        for part in PARTS:
            if getattr(attn, f"{part}_proj", None) is not None:
                setattr(attn, f"{part}_proj", sliced(getattr(attn, f"{part}_proj"), rows=columns))
            self._slice_bias(f"{part}_bias", columns)
        attn.proj = sliced(attn.proj, columns=columns)
        self.kept = [head for index, head in enumerate(self.kept) if index not in set(heads)]
        attn.num_heads = len(self.kept)
        if hasattr(attn, "attn_dim"):
            attn.num_kv_heads, attn.attn_dim, attn.kv_dim = len(self.kept), len(columns), len(columns)

    def separate(self, keys_read: bool) -> None:
        """Give queries, keys and values a linear layer each, in place, where they have none; timm's own forward is then lost.

        A bias of keys is turned with them and stays.
        """
        attn = self.block.attn
        if attn.qkv is not None:
            attn.q_proj, attn.k_proj, attn.v_proj = thirds(attn.qkv, self._bias())
            attn.qkv = None
        if isinstance(attn.norm, nn.Identity):
            attn.v_proj, attn.proj = passed_on(attn.v_proj, attn.proj)

    def without_heads(self, heads: Sequence[int]) -> HostBlock:
        """A block like this one in which heads have left a copy of the attention weights; both read the same rotations."""
        other: TimmEvaBlock = twin(self, self.block, self.attention, self.rotation)
        other.remove_heads(heads)
        return other

    def _slice_bias(self, name: str, columns: Tensor) -> None:
        attn = self.block.attn
        bias: Tensor | None = getattr(attn, name, None)
        if bias is None:
            return
        kept = bias.detach()[columns.to(bias.device)].clone()
        setattr(attn, name, nn.Parameter(kept, bias.requires_grad) if isinstance(bias, nn.Parameter) else kept)


class TimmEva:
    """A timm ``Eva`` as a :class:`~hesper.hosts.base.Host`.

    Raises:
        UsageError: one of the model's parts is of a type whose halves are not known to compose.

    Example:
        >>> import timm
        >>> host = TimmEva(timm.create_model("eva02_tiny_patch14_224", depth=2, num_classes=7).eval())
        >>> host.anatomy.depth, host.anatomy.tokens, host.reads_places
        (2, 257, True)
    """

    library = "timm"

    def __init__(self, module: Any) -> None:
        check_ends(module)
        for index, block in enumerate(module.blocks):
            if reason := _refusal(block):
                raise UsageError(f"Block {index} {reason}, which is not supported; EvaBlocks with plain or rotary attention are.")
        check_same_shape(module.blocks)
        self.module: Any = module
        self.rotation = Rotation()
        self.reads_places = module.rope is not None
        self.blocks: Sequence[HostBlock] = tuple(TimmEvaBlock(block, index, self.rotation) for index, block in enumerate(module.blocks))
        self.anatomy = anatomy_of(module)
        self.heads_removable = all(isinstance(block.attn.norm, nn.Identity) for block in module.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """The token stream ``[images, tokens, width]`` that enters the first block; the blocks learn their rotations."""
        model = self.module
        stream, rotary = model._pos_embed(model.patch_embed(images))
        self.rotation.set(rotary, self.anatomy.prefix_tokens)
        out: Tensor = model.norm_pre(stream)
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
    if type(block) is not EvaBlock:
        return f"is a {type(block).__name__}"
    attn = block.attn
    if type(attn) not in (EvaAttention, AttentionRope):
        return f"has attention of type {type(attn).__name__}"
    if attn.gate is not None:
        return "has gated attention"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "shares keys and values between heads"
    if type(block.mlp) not in MLPS:
        return f"has a feed-forward half of type {type(block.mlp).__name__}"
    return None
