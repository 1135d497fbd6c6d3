"""Where tensors live: the processor, or a CUDA device with the reason when there is none."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings

import torch

from hesper.errors import UsageError

__all__ = ["DEVICES", "attention_kernels", "cuda_device", "lacks_memory", "use_device"]

DEVICES = ("cpu", "cuda")


def cuda_device() -> tuple[str | None, str]:
    """The CUDA device's name and an empty string, or None and why there is none."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return None, f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, but finds no device or no driver for it"
    return torch.cuda.get_device_name(), ""


def use_device(name: str) -> str:
    """``name``, once it is certain that it can be used; UsageError otherwise.

    Example:
        >>> use_device("cpu")
        'cpu'
    """
    if name not in DEVICES:
        raise UsageError(f"There is no device '{name}'; use {' or '.join(DEVICES)}.")
    if name == "cuda":
        found, reason = cuda_device()
        if found is None:
            raise UsageError(f"CUDA cannot be used here: {reason}; use --device cpu.")
        # Of several processes on a machine each takes the next device, and "cuda" means that one from here on.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return name


def attention_kernels(device: str) -> tuple[str, ...]:
    """The attention kernels that run on ``device``, found by running each on a tiny input."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.zeros(1, 1, 8, 16, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    found = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        # A refusal is a RuntimeError with a warning for each reason, which is what is asked for here.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
            warnings.simplefilter("ignore")
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            found.append(name.lower())
    return tuple(found)


def lacks_memory(error: Exception) -> bool:
    """Whether an error is one of the many that say that memory ran out, on the processor or a device, in torch or another runtime.

    Example:
        >>> lacks_memory(RuntimeError("CUDA out of memory")), lacks_memory(RuntimeError("CUDA error: an illegal memory access"))
        (True, False)
    """
    words = ("out of memory", "allocate memory", "not enough memory", "NvMapMemAlloc", "_ALLOC_FAILED", "Failed to allocate", "bad_alloc")
    starved = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return starved or any(word.lower() in str(error).lower() for word in words)
