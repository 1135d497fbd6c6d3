"""The four places where HEART takes derivatives, as lenses: token gates, head gates, token and head activations."""

from __future__ import annotations

from torch import Tensor

from hesper.curvature import Batch, Lens, Point, refuse_stochastic
from hesper.curvature.losses import Loss
from hesper.heart.gated import gated_forward, ones
from hesper.hosts import Host


def gated_lens(host: Host, images: int, loss: Loss, *names: str, like: Tensor) -> Lens:
    """The loss of ``images`` images as a function of the named gates or shifts, at the point where nothing is cut.

    Every image has its own gates, so losses are summed and a Hessian is block-diagonal over images.

    Args:
        host: the dense model; dropout or batch norm in training mode is refused.
        images: how many images the batches hold in all.
        loss: of the logits.
        names: of ``token_gates``, ``head_gates``, ``token_shifts``, ``head_shifts``.
        like: gives dtype and device.

    Example:
        >>> import timm, torch
        >>> from hesper.curvature import DenseKL, ImageBatch, gradient
        >>> from hesper.hosts import open_host
        >>> model = timm.create_model("test_vit", num_classes=5).eval().requires_grad_(False)
        >>> x = torch.randn(2, 3, 160, 160)
        >>> lens = gated_lens(open_host(model), 2, DenseKL(), "head_gates", like=x)
        >>> float(gradient(lens, [ImageBatch(x)])["head_gates"].abs().max())
        0.0
    """
    refuse_stochastic(host.module)

    def logits(point: Point, batch: Batch) -> Tensor:
        return gated_forward(host, batch.images, point).logits

    return Lens(ones(host, images, *names, like=like), logits, loss, "sum")
