"""The conditions under which second derivatives exist: plain attention, and nothing that draws or couples images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesper.errors import UsageError


@contextmanager
def twice_differentiable(model: nn.Module | None = None) -> Iterator[None]:
    """Within this context attention runs on the MATH kernel, the multi-head fast path is off and gradients are on.

    The fused kernels have no second derivative (pytorch issue 116350), the fast path has no forward derivative.
    The former settings return on leaving, also after an exception. With ``model``, `refuse_stochastic` is asked first.

    >>> with twice_differentiable():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    if model is not None:
        refuse_stochastic(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def refuse_stochastic(model: nn.Module) -> None:
    """Raise UsageError, naming the modules, when two passes of ``model`` would differ or an image would see its batch.

    Refused: dropout and drop-path with a positive probability in training mode; batch normalisation that
    uses the statistics of the batch, because it is in training mode or keeps none of its own.

    >>> refuse_stochastic(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval())
    """
    faults = [
        f"{name or 'the model'} ({type(module).__name__}: {fault})"
        for name, module in model.named_modules()
        if (fault := _fault(module)) is not None
    ]
    if faults:
        shown = ", ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise UsageError(f"curvature needs a deterministic model that treats images one by one; call model.eval() first: {shown}")


def _fault(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None:
            return "keeps no running statistics"
        return "training mode" if module.training else None
    if not module.training:
        return None
    probability = _drop_probability(module)
    return f"drops with probability {probability:g} in training mode" if probability > 0 else None


def _drop_probability(module: nn.Module) -> float:
    # timm and torchvision are recognised by their attributes: the core imports neither.
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout)
    attribute = {"StochasticDepth": "p", "PatchDropout": "prob"}.get(type(module).__name__, "drop_prob")
    probability = getattr(module, attribute, 0.0)
    return float(probability) if isinstance(probability, (int, float)) else 0.0
