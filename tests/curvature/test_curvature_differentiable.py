"""Forced plain attention is restored; what draws at random or couples images is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from hesper.curvature import CrossEntropy, DenseKL, Hessian, ImageBatch, dot, gradient, refuse_stochastic, twice_differentiable, weight_lens
from hesper.errors import UsageError
from tiny_models import tiny_batches


def settings_now() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    flags = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled())
    return (*flags, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled())


@pytest.mark.parametrize("fast_path", [True, False])
def test_attention_settings_return_also_after_an_exception(fast_path: bool) -> None:
    usual = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before = settings_now()
        with pytest.raises(RuntimeError, match="inside"), torch.no_grad(), twice_differentiable():
            assert settings_now() == (False, False, True, False, False, True)
            with twice_differentiable():
                assert settings_now() == (False, False, True, False, False, True)
            assert settings_now() == (False, False, True, False, False, True)
            raise RuntimeError("inside")
        assert settings_now() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(usual)


def test_operators_restore_the_settings_when_the_model_fails() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no forward")

    before = settings_now()
    lens = weight_lens(Broken().eval(), CrossEntropy())
    with pytest.raises(RuntimeError, match="no forward"):
        Hessian(lens, tiny_batches(1)) @ lens.at
    assert settings_now() == before


def test_attention_has_a_second_derivative_inside() -> None:
    q = torch.randn(1, 1, 3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with twice_differentiable():
        (first,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), q)
    assert bool(torch.isfinite(second).all()) and float(second.abs().max()) > 0


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse"])
def test_torch_multi_head_attention_is_served_in_both_modes(mode: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", batch_first=True)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)).double().eval()
    lens, batches = weight_lens(model, CrossEntropy(), ["0.self_attn.in_proj_weight"]), tiny_batches(2)
    name, step = "0.self_attn.in_proj_weight", 1e-5
    direction = {name: torch.ones_like(lens.at[name]) / lens.at[name].numel() ** 0.5}
    product = Hessian(lens, batches, mode) @ direction
    ahead, behind = (gradient(lens, batches, {name: lens.at[name] + s * step * direction[name]}) for s in (1, -1))
    assert float((product[name] - (ahead[name] - behind[name]) / (2 * step)).norm()) <= 1e-7 * float(product[name].norm())


def test_a_timm_vision_transformer_is_served() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=32, num_classes=5).double().eval()
    batches = [ImageBatch(torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))]
    lens = weight_lens(model, DenseKL(), ["blocks.0.attn.qkv.weight"])
    forward, reverse = (Hessian(lens, batches, mode) @ lens.at for mode in ("forward-over-reverse", "reverse-over-reverse"))
    assert float(dot(reverse, lens.at)) > 0
    assert torch.allclose(forward["blocks.0.attn.qkv.weight"], reverse["blocks.0.attn.qkv.weight"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        (nn.Dropout(0.1), "Dropout: drops with probability 0.1"),
        (nn.Dropout2d(0.5), "Dropout2d: drops with probability 0.5"),
        (DropPath(0.2), "DropPath: drops with probability 0.2"),
        (PatchDropout(0.3), "PatchDropout: drops with probability 0.3"),
        (nn.MultiheadAttention(4, 2, dropout=0.4), "MultiheadAttention: drops with probability 0.4"),
        (nn.BatchNorm2d(3), "BatchNorm2d: training mode"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_training_mode_is_refused_naming_the_module(module: nn.Module, fault: str) -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(module))
    with pytest.raises(UsageError, match=rf"model\.eval\(\).*1\.0 \({fault}"):
        refuse_stochastic(model)
    with pytest.raises(UsageError, match="deterministic"), twice_differentiable(model):
        raise AssertionError("must not be reached")
    refuse_stochastic(model.eval())
    assert not module.training


def test_harmless_modules_pass_in_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.0), DropPath(0.0), nn.LayerNorm(3), nn.Linear(3, 3)).train()
    refuse_stochastic(model)
    assert model.training


def test_batch_norm_without_statistics_is_refused_even_in_eval_mode() -> None:
    with pytest.raises(UsageError, match="keeps no running statistics"):
        refuse_stochastic(nn.BatchNorm1d(3, track_running_stats=False).eval())


def test_many_faults_are_counted() -> None:
    with pytest.raises(UsageError, match="and 3 more"):
        refuse_stochastic(nn.Sequential(*(nn.Dropout(0.1) for _ in range(8))))


def test_a_weight_lens_refuses_a_model_that_went_back_to_training() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.5)).double().eval()
    lens, batches = weight_lens(model, CrossEntropy()), tiny_batches(2)
    assert gradient(lens, batches).keys() == lens.at.keys()
    model.train()
    with pytest.raises(UsageError, match=r"2 \(Dropout"):
        gradient(lens, batches)
