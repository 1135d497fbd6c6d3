"""The machine a result comes from, as far as the result may depend on it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

__all__ = ["environment"]

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_BOARD = Path("/proc/device-tree/model")


def environment() -> dict[str, str | int | None]:
    """Python, platform, processor, cores, threads, frequency governor, CUDA device and library versions; None for what is unknown."""
    import torch  # here, so that reading a run does not wait for torch

    return {
        "hesper": _version("hesper"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "board": _text(_BOARD),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "governor": _text(_GOVERNOR),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "timm": _version("timm"),
        "transformers": _version("transformers"),
        "numpy": _version("numpy"),
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip("\0\n ") or None
    except (OSError, UnicodeDecodeError):
        return None


def _cpu() -> str | None:
    # ARM kernels print no model name, so there the architecture has to do; "board" names the machine.
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None
