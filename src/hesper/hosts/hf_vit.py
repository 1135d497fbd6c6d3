"""Hugging Face's ViT, DeiT and DINOv2 image classifiers as hosts; knows their module names, and imports nothing of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.hosts.base import HostBlock, Projected
from hesper.hosts.parts import kept_columns, linear_weights, mean, passed_on, sliced, twin, unbiased
from hesper.plan import Anatomy

VITS = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
DINOS = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
CLASSIFIERS = (*VITS, *DINOS)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Logits(nn.Module):
    """A Hugging Face classifier as a plain module from images ``[images, 3, height, width]`` to logits ``[images, classes]``.

    ``image_size`` is what the images are resized to: DINOv2 takes other sizes than the one its positions were trained at.
    """

    def __init__(self, model: Any, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size or _pair(model.config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        out: Tensor = self.model(pixel_values=images).logits
        return out


class HfBlock:
    """A ``ViTLayer``, ``DeiTLayer`` or ``Dinov2Layer`` taken apart into its own submodules."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.attn = layer, layer.attention
        self.dino = hasattr(layer, "layer_scale1")
        self.norm1, self.norm2 = (layer.norm1, layer.norm2) if self.dino else (layer.layernorm_before, layer.layernorm_after)

    @property
    def heads(self) -> int:
        """Number of attention heads this block has now."""
        return int(self.attn.num_attention_heads)

    @property
    def scale(self) -> float:
        """Factor on the attention logits."""
        return float(self.attn.scaling)

    @property
    def attention(self) -> nn.Module:
        """The submodule that holds the weights of the heads."""
        own: nn.Module = self.attn
        return own

    def normed(self, stream: Tensor) -> Tensor:
        """The norm that ``[..., width]`` rows pass before queries, keys and values are made of them."""
        out: Tensor = self.norm1(stream)
        return out

    def project(self, stream: Tensor, place: Tensor | None = None) -> Projected:
        """Norm, queries, keys and values of ``[..., width]`` rows."""
        return self.project_readers(stream, stream)

    def project_readers(self, stream: Tensor, readers: Tensor, place: Tensor | None = None) -> Projected:
        """As :meth:`project`, with queries for the ``readers`` rows only."""
        attn, normed = self.attn, self.norm1(stream)
        reading = normed if readers is stream else self.norm1(readers)
        query, key, value = (t.unflatten(-1, (self.heads, -1)) for t in (attn.q_proj(reading), attn.k_proj(normed), attn.v_proj(normed)))
        return Projected(normed, query, key, value)

    def merge_heads(self, mixed: Tensor) -> Tensor:
        """The residual update ``[..., width]`` from attention outputs ``[..., heads * head_dim]``."""
        layer, out = self.layer, self.attn.o_proj(mixed)
        update: Tensor = layer.drop_path(layer.layer_scale1(out)) if self.dino else layer.dropout(out)
        return update

    def feed(self, stream: Tensor) -> Tensor:
        """The residual update ``[..., width]`` of the feed-forward half."""
        layer, out = self.layer, self.layer.mlp(self.norm2(stream))
        update: Tensor = layer.drop_path(layer.layer_scale2(out)) if self.dino else layer.dropout(out)
        return update

    def remove_heads(self, heads: Sequence[int]) -> None:
        """Slice ``heads`` out of the query, key, value and output projections."""
        attn = self.attn
        columns = kept_columns(self.heads, int(attn.head_dim), heads)
        for name in ATTENTION[:3]:
            setattr(attn, name, sliced(getattr(attn, name), rows=columns))
        attn.o_proj = sliced(attn.o_proj, columns=columns)
        attn.num_attention_heads = len(columns) // int(attn.head_dim)

    def separate(self, keys_read: bool) -> None:
        """Queries, keys and values have a linear layer each; give them the biases that are needed, in place."""
        attn = self.attn
        attn.v_proj, attn.o_proj = passed_on(attn.v_proj, attn.o_proj)
        if not keys_read:
            attn.k_proj = unbiased(attn.k_proj)

    def without_heads(self, heads: Sequence[int]) -> HostBlock:
        """A block like this one in which heads have left a copy of the attention weights."""
        other: HfBlock = twin(self, self.layer, self.attention)
        other.remove_heads(heads)
        return other


class HfViT:
    """A Hugging Face image classifier as a :class:`~hesper.hosts.base.Host`; ``module`` is its :class:`Logits`.

    Raises:
        UsageError: one of its parts is not as this file knows it, or it has no Linear classifier.
    """

    library = "hf"
    reads_places = False
    heads_removable = True

    def __init__(self, module: Any) -> None:
        wrapped = module if isinstance(module, Logits) else Logits(module)
        model = wrapped.model
        base = model.base_model
        layers = base.encoder.layer if hasattr(base, "encoder") else getattr(base, "layers", ())
        _check(model, layers)
        self.module: Any = wrapped
        self.base = base
        self.blocks: Sequence[HostBlock] = tuple(HfBlock(layer) for layer in layers)
        self.anatomy = _anatomy(wrapped, self.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """The token stream ``[images, tokens, width]`` that enters the first block."""
        out: Tensor = self.base.embeddings(images)
        return out

    def norm(self, stream: Tensor) -> Tensor:
        """The host's final norm, on rows."""
        out: Tensor = self.base.layernorm(stream)
        return out

    def readout(self, prefix: Tensor, patches: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """Logits from normed prefix rows and, for DINOv2, normed patch rows and what they count for."""
        model, out = self.module.model, prefix[:, 0]
        if patches is not None:
            out = torch.cat([out, mean(patches, weight)], 1)
        if type(model).__name__ == "DeiTForImageClassificationWithTeacher":
            both: Tensor = (model.cls_classifier(out) + model.distillation_classifier(prefix[:, 1])) / 2
            return both
        logits: Tensor = model.classifier(out)
        return logits


def classifiers(model: Any) -> list[Any]:
    """The last layers of a Hugging Face classifier, whose logits are averaged."""
    names = ("classifier", "cls_classifier", "distillation_classifier")
    return [getattr(model, name) for name in names if hasattr(model, name)]


def _check(model: Any, layers: Any) -> None:
    kind = type(model).__name__
    for head in classifiers(model):
        if not isinstance(head, nn.Linear):
            raise UsageError(
                f"A classifier of type {type(head).__name__} is not supported; give the model a Linear head (config.num_labels > 0)."
            )
    parts = [getattr(getattr(layer, "attention", None), name, None) for layer in layers for name in ATTENTION]
    if not parts or not all(isinstance(part, nn.Linear) for part in parts):
        raise UsageError(
            f"The attention of this {kind} is not built as transformers' own; upgrade transformers, or give the model unaltered."
        )
    channels = int(model.config.num_channels)
    if channels != 3:
        raise UsageError(f"A model of images with {channels} channels is not supported; images have 3 here (red, green, blue).")
    shapes = [(layer.attention.num_attention_heads, linear_weights(layer.attention), linear_weights(layer.mlp)) for layer in layers]
    for index, own in enumerate(shapes):
        if own != shapes[0]:
            raise UsageError(f"Block {index} has another shape than block 0, which is not supported; give the dense model.")


def _anatomy(module: Logits, blocks: Sequence[HostBlock]) -> Anatomy:
    model, layer = module.model, blocks[0].layer  # type: ignore[attr-defined]  # built by HfViT, so an HfBlock
    config, heads = model.config, classifiers(model)
    width, patch = int(config.hidden_size), _pair(config.patch_size)
    grid = (module.image_size[0] // patch[0], module.image_size[1] // patch[1])
    kind = type(model).__name__
    prefix = 1 + (1 if kind.startswith("DeiT") else int(getattr(config, "num_register_tokens", 0)))
    readout = sum(map(linear_weights, heads))
    return Anatomy(
        depth=len(blocks),
        width=width,
        heads=blocks[0].heads,
        head_dim=int(layer.attention.head_dim),
        mlp_width=linear_weights(layer.mlp) // (2 * width),  # the plain MLP with as many weights: a gated one has three matrices
        tokens=prefix + grid[0] * grid[1],
        prefix_tokens=prefix,
        classes=int(heads[0].out_features),
        patch_values=3 * patch[0] * patch[1],
        image_size=module.image_size,
        grid=grid,
        reads_patches=kind in DINOS,
        readout_macs=None if readout == width * heads[0].out_features else readout,
    )


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)
