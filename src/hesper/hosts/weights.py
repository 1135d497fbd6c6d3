"""Weights: read from files, checked against the model they are for, and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hesper.errors import UsageError

IDLE = "idle"


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else value.reshape(1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth`` state dict (read without executing what it holds)."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"There is no weights file {file}; give the path of a .safetensors or .pth file.")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UsageError(f"{file} cannot be read as weights ({first_line(error)}); give a .safetensors file.") from error
    except Exception as error:  # torch raises pickle's own errors for files it refuses
        raise UsageError(f"{file} holds more than tensors and was refused; save the state dict as .safetensors.") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise UsageError(f"{file} is not a state dict of tensors; save the model's state dict.")
    return found


def fill(module: nn.Module, state: dict[str, Tensor], name: str, path: str | Path) -> None:
    """Load ``state`` into ``module``; UsageError names what is missing, unknown or misshapen."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    faults = [f"{what} {listed(keys)}" for what, keys in (("missing", missing), ("unknown", extra), ("misshapen", sorted(shapes))) if keys]
    if faults:
        raise UsageError(f"The weights {path} do not fit {name}: {'; '.join(faults)}. Give the weights of this architecture.")
    module.load_state_dict(state)


def check_finite(module: nn.Module, name: str) -> None:
    """UsageError where a weight of the model called ``name`` is NaN or infinite."""
    bad = [key for key, value in module.state_dict().items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise UsageError(f"The weights of {name} hold NaN or infinity in {listed(bad)}; give weights that were saved from a sound model.")


def differences(module: nn.Module, other: nn.Module) -> list[str]:
    """Names of weights that only one of two models has or that have other shapes; failing those, of parts of other types.

    What does nothing in evaluation (dropout and its like) is no difference.
    """
    one, two = module.state_dict(), other.state_dict()
    odd = sorted(key for key in one.keys() | two.keys() if key not in one or key not in two or one[key].shape != two[key].shape)
    if odd:
        return odd
    here, there = ({name: _kind(part) for name, part in model.named_modules()} for model in (module, other))
    return sorted(name for name in here.keys() | there.keys() if here.get(name, IDLE) != there.get(name, IDLE))


def _kind(part: nn.Module) -> str:
    name = type(part).__name__
    return IDLE if name == "Identity" or name.endswith(("DropPath", "Dropout")) else name


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """What an error says, shortened to a line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
