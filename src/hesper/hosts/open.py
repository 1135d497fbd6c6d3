"""Open a dense model by name: architecture, weights, preprocessing, and what they hash to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from hesper.data import Transform
from hesper.errors import JobError, UsageError
from hesper.hosts.base import Host
from hesper.hosts.timm_vit import TimmViT
from hesper.plan import Anatomy, ModelRef
from hesper.registry import did_you_mean

CLASSIFIER = "head.weight"


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A dense model ready to run: the host, how plans refer to it, and the preprocessing its weights expect.

    ``mean`` and ``std`` are the last step of ``transform``, per channel.
    """

    host: Host
    ref: ModelRef
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_model(name: str, *, weights: str | Path | None = None, anatomy: Anatomy | None = None) -> OpenModel:
    """Open a timm model in evaluation mode.

    Args:
        name: of a timm architecture, with or without the tag of its weights.
        weights: a ``.safetensors`` file, or a ``.pth`` state dict; without one timm's pretrained weights are taken (downloaded on
            first use). The number of classes follows the file.
        anatomy: build the architecture in this shape instead of its own (needs ``weights``).

    Raises:
        UsageError: an unknown or unsupported model, a missing file, weights that do not fit or are not finite.
        JobError: the pretrained weights cannot be had.
    """
    _check_name(name)
    state = None if weights is None else read_weights(weights)
    if state is None:
        module = _pretrained(name)
    else:
        module = build(name, anatomy, classes=len(state[CLASSIFIER]) if CLASSIFIER in state and state[CLASSIFIER].ndim else None)
        _load(module, state, name, weights)
    return wrap(name, module)


def wrap(name: str, module: nn.Module) -> OpenModel:
    """A module that exists already, as an :class:`OpenModel`; UsageError where it is unsupported or its weights are not finite.

    The module itself is used, not a copy: it is put into evaluation mode and its parameters need no gradients any more.
    """
    host = TimmViT(module.eval().requires_grad_(False))
    bad = [key for key, value in module.state_dict().items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise UsageError(f"The weights of {name} hold NaN or infinity in {_listed(bad)}; give weights that were saved from a sound model.")
    ref = ModelRef(name, "timm", weights_sha256(module.state_dict()), host.anatomy)
    resolve: Any = resolve_model_data_config  # untyped in timm
    config: dict[str, Any] = resolve(module, args={"input_size": (3, *host.anatomy.image_size)})
    return OpenModel(host, ref, create_transform(**config, is_training=False), tuple(config["mean"]), tuple(config["std"]))


def build(name: str, anatomy: Anatomy | None = None, *, classes: int | None = None) -> nn.Module:
    """The untrained architecture ``name``, in the shape of ``anatomy`` where its own differs."""
    _check_name(name)
    own: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if anatomy is not None:
        own = {"num_classes": anatomy.classes, "img_size": anatomy.image_size}
    module: nn.Module = timm.create_model(name, pretrained=False, **own)
    if anatomy is None or TimmViT(module).anatomy == anatomy:
        return module
    patch = anatomy.image_size[0] // anatomy.grid[0]
    module = timm.create_model(
        name,
        pretrained=False,
        **own,
        patch_size=patch,
        in_chans=anatomy.patch_values // patch**2,
        embed_dim=anatomy.width,
        depth=anatomy.depth,
        num_heads=anatomy.heads,
        mlp_ratio=anatomy.mlp_width / anatomy.width,
        global_pool="avg" if anatomy.reads_patches else "token",
    )
    if TimmViT(module).anatomy != anatomy:
        raise UsageError(f"The architecture {name} cannot be built in the shape asked for; give the name of the model it was made from.")
    return module


def check_rebuildable(opened: OpenModel) -> None:
    """UsageError where timm, asked for the model by its name and shape, would build one that these weights do not fit."""
    with torch.device("meta"):
        own = build(opened.ref.name, opened.ref.anatomy).state_dict()
    state = opened.host.module.state_dict()
    odd = sorted(key for key in own.keys() | state.keys() if key not in own or key not in state or own[key].shape != state[key].shape)
    if odd:
        raise UsageError(
            f"timm's {opened.ref.name} has not the same weights as the model given ({_listed(odd)}), so a run of it could not be opened; "
            "name the timm model it was made from."
        )


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
        raise UsageError(f"{file} cannot be read as weights ({_first_line(error)}); give a .safetensors file.") from error
    except Exception as error:  # torch raises pickle's own errors for files it refuses
        raise UsageError(f"{file} holds more than tensors and was refused; save the state dict as .safetensors.") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise UsageError(f"{file} is not a state dict of tensors; save the model's state dict.")
    return found


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"There is no model '{name}' in timm; {did_you_mean(architecture, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UsageError(f"timm's {architecture} has no weights tagged '{tag}'; {did_you_mean(tag, tags)}")


def _pretrained(name: str) -> nn.Module:
    if not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no pretrained weights for {name}; give a file with --weights.")
    with torch.device("meta"):
        TimmViT(timm.create_model(name, pretrained=False))  # an unsupported model is refused before its weights are fetched
    try:
        module: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network and disk each raise their own kinds
        raise JobError(
            f"The pretrained weights of {name} could not be fetched ({_first_line(error)}); give a file with --weights."
        ) from error
    return module


def _load(module: nn.Module, state: dict[str, Tensor], name: str, path: str | Path | None) -> None:
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    faults = [f"{what} {_listed(keys)}" for what, keys in (("missing", missing), ("unknown", extra), ("misshapen", sorted(shapes))) if keys]
    if faults:
        raise UsageError(f"The weights {path} do not fit {name}: {'; '.join(faults)}. Give the weights of this architecture.")
    module.load_state_dict(state)


def _listed(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
