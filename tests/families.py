"""Tiny models of every host family, and their blocks' halves run by the libraries' own attention modules on repeated tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SHAPE: dict[str, Any] = {"img_size": (32, 24), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
ROTARY: dict[str, Any] = {"use_rot_pos_emb": True, "init_values": 0.3, "global_pool": "token"}

TIMM: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "distilled": (VisionTransformerDistilled, {}),
    "average_with_prefix": (VisionTransformer, {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2}),
    "attention_pool": (VisionTransformer, {"global_pool": "map", "class_token": False}),
    "attention_pool_beside_class": (VisionTransformer, {"global_pool": "map", "class_token": True}),
    "eva": (Eva, {}),
    "eva02": (
        Eva,
        {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "ref_feat_shape": (4, 4), "mlp_ratio": 8 / 3},
    ),
    "eva02_clip": (Eva, {**ROTARY, "qkv_fused": False, "scale_attn_inner": True, "swiglu_mlp": True, "use_fc_norm": False}),
    "rotary": (Eva, {**ROTARY, "attn_type": "rope", "use_abs_pos_emb": False, "use_fc_norm": False}),
    "rotary_mixed": (Eva, {**ROTARY, "attn_type": "rope", "use_abs_pos_emb": False, "rope_type": "mixed"}),
    "dinov3": (
        Eva,
        {
            **ROTARY,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "num_reg_tokens": 4,
            "use_abs_pos_emb": False,
            "qkv_bias": False,
            "dynamic_img_size": True,
            "global_pool": "avg",
            "no_embed_class": True,
        },
    ),
    "rotary_attention_pool": (
        Eva,
        {**ROTARY, "attn_type": "rope", "global_pool": "map", "attn_pool_num_heads": 2, "use_pre_transformer_norm": True},
    ),
}
HF_SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 8,
    "num_labels": 5,
}
SQUARE = {"image_size": 32, "intermediate_size": 48}
DINO = {"image_size": 32, "mlp_ratio": 2}
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf_vit": ("ViTConfig", "ViTForImageClassification", SQUARE),
    "hf_deit": ("DeiTConfig", "DeiTForImageClassification", SQUARE),
    "hf_deit_teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", SQUARE),
    "hf_dinov2": ("Dinov2Config", "Dinov2ForImageClassification", DINO),
    "hf_dinov2_gated": ("Dinov2Config", "Dinov2ForImageClassification", {**DINO, "use_swiglu_ffn": True}),
    "hf_dinov2_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {**DINO, "num_register_tokens": 3}),
}
FAMILIES = [*TIMM, *HF]


def family(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """A tiny model with weights large enough for attention to be far from uniform; ``more`` for timm's models."""
    torch.manual_seed(0)
    if kind in HF:
        config, model, options = HF[kind]
        module: Any = getattr(transformers, model)(getattr(transformers, config)(**HF_SHAPE, **options))
    else:
        make, options = TIMM[kind]
        module = make(**{**SHAPE, "mlp_ratio": 2, **options, **more})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval().to(dtype)  # type: ignore[no-any-return]


def shots(kind: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of rising contrast in the size the family takes."""
    size = (32, 32) if kind in HF else (32, 24)
    noise = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return noise * torch.linspace(0.2, 2.5, count, dtype=dtype)[:, None, None, None]


def logits_of(model: Any, images: Tensor) -> Tensor:
    """The model's own logits."""
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def features_of(model: Any, images: Tensor) -> Tensor:
    """The model's own normed tokens."""
    if isinstance(model, transformers.PreTrainedModel):
        return model.base_model(images).last_hidden_state
    return model.forward_features(images)


@dataclass(frozen=True)
class ByHand:
    """One model's parts, each run by the library's own modules."""

    model: Any

    @property
    def hf(self) -> bool:
        """Whether it is a Hugging Face model."""
        return isinstance(self.model, transformers.PreTrainedModel)

    @property
    def blocks(self) -> list[Any]:
        """The library's blocks."""
        if not self.hf:
            return list(self.model.blocks)
        base = self.model.base_model
        return list(base.encoder.layer if hasattr(base, "encoder") else base.layers)

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens ``[1, tokens, width]`` of one image, and the patches' rotary embedding."""
        model = self.model
        if self.hf:
            return model.base_model.embeddings(image[None]), None
        found = model._pos_embed(model.patch_embed(image[None]))
        tokens, rotary = found if isinstance(found, tuple) else (found, None)
        return model.norm_pre(tokens), rotary

    def attended(self, index: int, tokens: Tensor, rotary: Tensor | None) -> Tensor:
        """``[1, tokens, width]`` after the attention half of block ``index``."""
        block = self.blocks[index]
        if self.hf:
            dino = hasattr(block, "layer_scale1")
            update = block.attention((block.norm1 if dino else block.layernorm_before)(tokens))[0]
            return tokens + (block.layer_scale1(update) if dino else update)
        if isinstance(self.model, Eva):
            own = rotary[index] if rotary is not None and rotary.ndim == 4 else rotary
            update = block.attn(block.norm1(tokens), rope=own)
            return tokens + (update if block.gamma_1 is None else block.gamma_1 * update)
        return tokens + block.ls1(block.attn(block.norm1(tokens)))

    def fed(self, index: int, tokens: Tensor) -> Tensor:
        """``[1, tokens, width]`` after the feed-forward half of block ``index``."""
        block = self.blocks[index]
        if self.hf:
            dino = hasattr(block, "layer_scale1")
            update = block.mlp((block.norm2 if dino else block.layernorm_after)(tokens))
            return tokens + (block.layer_scale2(update) if dino else update)
        if isinstance(self.model, Eva):
            update = block.mlp(block.norm2(tokens))
            return tokens + (update if block.gamma_2 is None else block.gamma_2 * update)
        return tokens + block.ls2(block.mlp(block.norm2(tokens)))

    def read(self, tokens: Tensor) -> Tensor:
        """Logits ``[classes]`` of ``[1, tokens, width]`` as they leave the last block."""
        model = self.model
        if not self.hf:
            return model.forward_head(model.norm(tokens))[0]
        normed, kind = model.base_model.layernorm(tokens), type(model).__name__
        if kind == "DeiTForImageClassificationWithTeacher":
            return ((model.cls_classifier(normed[:, 0]) + model.distillation_classifier(normed[:, 1])) / 2)[0]
        if kind.startswith("Dinov2"):
            first = 1 + getattr(model.config, "num_register_tokens", 0)
            return model.classifier(torch.cat([normed[:, 0], normed[:, first:].mean(1)], 1))[0]
        return model.classifier(normed[:, 0])[0]
