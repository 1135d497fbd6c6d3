"""In how many digits PyTorch computes: single precision, that with shorter products, or halves."""

from __future__ import annotations

import torch
from torch import Tensor

from hesper.errors import UsageError

__all__ = ["PRECISIONS", "dtype_of", "precision_on", "use_precision", "wide"]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = tuple(_DTYPES)


def precision_on(device: str, name: str) -> str:
    """``name``, if PyTorch has such a precision on ``device``; UsageError otherwise.

    Example:
        >>> precision_on("cpu", "bf16")
        'bf16'
    """
    if name not in _DTYPES:
        raise UsageError(f"There is no precision '{name}'; use {', '.join(PRECISIONS)}.")
    if name == "tf32" and device != "cuda":
        raise UsageError("tf32 is how NVIDIA's cards multiply; use --device cuda, or --precision fp32.")
    return name


def dtype_of(name: str) -> torch.dtype:
    """Of weights and activations in a precision.

    Example:
        >>> dtype_of("tf32"), dtype_of("bf16")
        (torch.float32, torch.bfloat16)
    """
    return _DTYPES[name]


def wide(values: Tensor) -> Tensor:
    """``values`` in single precision at least.

    Example:
        >>> wide(torch.ones(1).half()).dtype, wide(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def use_precision(device: str, name: str) -> None:
    """From now on make products on ``device`` as a precision has them, in this process; as :func:`precision_on`."""
    short = precision_on(device, name) == "tf32"
    torch.set_float32_matmul_precision("high" if short else "highest")
    torch.backends.cudnn.allow_tf32 = short  # of convolutions PyTorch would shorten products unasked
