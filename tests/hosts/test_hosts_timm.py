from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU
from timm.layers.mlp import GlobalResponseNormMlp
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from hesper.errors import UsageError
from hesper.graft.attention import attend
from hesper.graft.layout import Layout
from hesper.hosts import Host, open_host
from hesper.hosts.open import open_model
from hesper.plan import Anatomy
from vits import KINDS, REMOVABLE, pictures, vit


def composed(host: Host, images: torch.Tensor) -> torch.Tensor:
    stream, prefix = host.embed(images), host.anatomy.prefix_tokens
    layout = Layout(tuple(stream.shape[1] for _ in images), prefix)
    for block in host.blocks:
        rows = stream.flatten(0, 1)
        mixed = attend(block.project(rows), None, layout, block.scale).view(stream.shape[0], stream.shape[1], -1)
        stream = stream + block.merge_heads(mixed)
        stream = stream + block.feed(stream)
    normed = host.norm(stream)
    return host.readout(normed[:, :prefix], normed[:, prefix:] if host.anatomy.reads_patches else None)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_halves_compose_to_the_host_bit_for_bit(kind: str) -> None:
    model, images = vit(kind), pictures(3)
    host = open_host(model)
    assert torch.equal(composed(host, images), model(images))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit4"])
@torch.no_grad()
def test_timms_own_small_models_compose(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    host, images = open_host(model), pictures(2, size=(160, 160))
    assert torch.equal(composed(host, images), model(images))
    assert host.embed(images).shape[1] == host.anatomy.tokens


@pytest.mark.parametrize("mlp", [partial(GluMlp, gate_last=False, act_layer=nn.SiLU), SwiGLU])
@torch.no_grad()
def test_gated_feed_forwards_compose_and_are_counted_by_their_weights(mlp: Any) -> None:
    model = vit(mlp_layer=mlp, act_layer=nn.SiLU)
    host, images = open_host(model), pictures(2)
    assert torch.equal(composed(host, images), model(images))
    weights = sum(p.numel() for name, p in model.blocks[0].mlp.named_parameters() if name.endswith("weight"))
    assert 2 * host.anatomy.width * host.anatomy.mlp_width == weights


def test_the_anatomy_is_the_models() -> None:
    assert open_host(vit("registers")).anatomy == Anatomy(4, 24, 3, 8, 48, 17, 5, 5, 192, (32, 24), (4, 3), False)
    assert open_host(vit("pooled", depth=2)).anatomy == Anatomy(2, 24, 3, 8, 48, 12, 0, 5, 192, (32, 24), (4, 3), True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"block_fn": ParallelScalingBlock}, "Block 0 is a ParallelScalingBlock"),
    ({"block_fn": ResPostBlock}, "Block 0 is a ResPostBlock"),
    ({"attn_layer": "diff"}, "Block 0 has attention of type DiffAttention"),
    ({"global_pool": "avgmax"}, "pools by 'avgmax'"),
    ({"global_pool": "max"}, "pools by 'max'"),
    ({"global_pool": ""}, "pools by ''"),
    ({"num_classes": 0}, "classifier of type Identity"),
    ({"dynamic_img_size": True, "dynamic_img_pad": True}, "PatchEmbed with dynamic padding"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_host(vit(**options))


OTHERS = {
    "swin_tiny_patch4_window7_224": "windows of a regular grid",
    "swinv2_cr_tiny_224": "windows of a regular grid",
    "maxvit_tiny_tf_224": "windows of a regular grid",
    "levit_128": "between stages",
    "mvitv2_tiny": "between stages",
    "hiera_tiny_224": "between stages",
    "beit_base_patch16_224": "a bias for every pair of places",
    "vit_relpos_small_patch16_224": "a bias for every pair of places",
    "xcit_nano_12_p16_224": "between channels",
    "resnet18": "no attention",
    "tnt_s_patch16_224": "not known to compose",
}


@pytest.mark.parametrize(("name", "reason"), OTHERS.items())
def test_other_models_are_refused_by_name_and_reason(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=f"type {type(model).__name__} is not supported, since .*{reason}"):
        open_host(model)


NAMED = {
    "vit_base_patch16_clip_224": (197, 1, False),
    "vit_base_patch16_siglip_224": (196, 0, True),
    "vit_small_patch14_reg4_dinov2": (1374, 5, False),
    "vit_so400m_patch14_siglip_gap_224": (256, 0, True),
    "deit_small_distilled_patch16_224": (198, 2, False),
    "deit3_small_patch16_224": (197, 1, False),
    "eva02_tiny_patch14_224": (257, 1, True),
    "eva02_base_patch16_clip_224": (197, 1, False),
    "vit_small_patch16_rope_224": (197, 1, False),
    "vit_small_patch16_dinov3": (261, 5, True),
    "vit_pe_core_tiny_patch16_384": (577, 1, True),
}


@pytest.mark.parametrize(("name", "expected"), NAMED.items())
def test_timms_names_open(name: str, expected: tuple[int, int, bool]) -> None:
    with torch.device("meta"):
        anatomy = open_host(timm.create_model(name, num_classes=10)).anatomy
    assert (anatomy.tokens, anatomy.prefix_tokens, anatomy.reads_patches) == expected


def test_a_subclass_is_refused_however_it_is_called() -> None:
    class VisionTransformer(type(vit())):  # type: ignore[misc]
        pass

    with pytest.raises(UsageError, match="not known to compose"):
        open_host(VisionTransformer(depth=1))


EVA_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_post_norm": True}, "Block 0 is a EvaBlockPostNorm"),
    ({"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "Block 0 shares keys and values between heads"),
    ({"global_pool": "max"}, "pools by 'max'"),
]


@pytest.mark.parametrize(("options", "reason"), EVA_REFUSED)
def test_what_is_not_supported_of_eva_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_host(Eva(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5, **options))


def test_attention_pooling_with_places_of_its_own_is_refused() -> None:
    model = vit(global_pool="map", class_token=False)
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(12, 24))
    with pytest.raises(UsageError, match="positions of its own"):
        open_host(model)


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        assert not pretrained, "its weights were asked for"
        return make(name, pretrained=False, **options)

    monkeypatch.setattr("timm.create_model", create)
    with pytest.raises(UsageError, match="SwinTransformer is not supported"):
        open_model("swin_tiny_patch4_window7_224")


def test_blocks_altered_by_hand_are_refused() -> None:
    gated = vit()
    gated.blocks[2].attn.gate = nn.Linear(24, 24)
    with pytest.raises(UsageError, match="Block 2 has gated attention"):
        open_host(gated)
    wrapped = vit()
    wrapped.blocks[1].attn.qkv = nn.Sequential(wrapped.blocks[1].attn.qkv)
    with pytest.raises(UsageError, match="Block 1 has projections of types Sequential and Linear"):
        open_host(wrapped)
    mixing = vit()
    mixing.blocks[1].mlp = GlobalResponseNormMlp(24, 48)
    with pytest.raises(UsageError, match="Block 1 has a feed-forward half of type GlobalResponseNormMlp"):
        open_host(mixing)
    pruned = vit()
    open_host(pruned).blocks[3].remove_heads([0])
    with pytest.raises(UsageError, match="Block 3 has another shape than block 0"):
        open_host(pruned)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_projecting_for_readers_is_projecting_with_fewer_queries(kind: str) -> None:
    block = open_host(vit(kind, torch.float64)).blocks[1]
    stream = torch.randn(2, 9, 24, dtype=torch.float64)
    every, some = block.project(stream), block.project_readers(stream, stream[:, :3])
    torch.testing.assert_close(some.query, every.query[:, :3], rtol=1e-12, atol=1e-12)
    for name in ("normed", "key", "value"):
        torch.testing.assert_close(getattr(some, name), getattr(every, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", REMOVABLE)
@torch.no_grad()
def test_removing_heads_is_silencing_them_with_smaller_weights(kind: str) -> None:
    model, images = vit(kind), pictures(2)
    silent = vit(kind)
    head = silent.blocks[1].attn.head_dim
    silent.blocks[1].attn.proj.weight[:, :head] = 0
    before = model.blocks[1].attn.qkv.weight.shape
    open_host(model).blocks[1].remove_heads([0])
    attn = model.blocks[1].attn
    assert attn.qkv.weight.shape == (before[0] - 3 * head, 24) and attn.proj.weight.shape == (24, before[0] // 3 - head)
    assert open_host(vit(kind)).blocks[1].heads == attn.num_heads + 1
    torch.testing.assert_close(model(images), silent(images), rtol=1e-5, atol=1e-5)


def test_heads_under_a_norm_over_all_heads_stay() -> None:
    with pytest.raises(UsageError, match="normalised over all heads"):
        open_host(vit("attention_norm")).blocks[0].remove_heads([0])
