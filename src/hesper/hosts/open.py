"""Open a dense model by name: architecture, weights, preprocessing, and what they hash to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms_factory import create_transform
from torch import nn

from hesper.data import Transform
from hesper.errors import UsageError
from hesper.hosts import open_hf, open_host, open_timm
from hesper.hosts.base import Host
from hesper.hosts.open_timm import build
from hesper.hosts.weights import check_finite, differences, fill, listed, read_weights, weights_sha256
from hesper.plan import Anatomy, ModelRef

__all__ = ["HF", "OpenModel", "build", "check_rebuildable", "open_model", "rebuild", "wrap"]

HF = "hf:"


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A dense model ready to run: the host, how plans refer to it, and the preprocessing its weights expect.

    ``mean`` and ``std`` are the last step of ``transform``, per channel; ``preprocessing`` is all of it in the words of timm's
    ``create_transform``. ``blueprint`` is what rebuilding needs beyond name and
    anatomy: nothing for timm's models, config and preprocessing for Hugging Face's.
    """

    host: Host
    ref: ModelRef
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    blueprint: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def open_model(name: str, *, weights: str | Path | None = None, anatomy: Anatomy | None = None) -> OpenModel:
    """Open a timm model, or with ``hf:`` before its name a Hugging Face one, in evaluation mode.

    Args:
        name: of a timm architecture, with or without the tag of its weights; or ``hf:`` and a Hugging Face name or a folder saved by
            ``save_pretrained``.
        weights: a ``.safetensors`` file, or a ``.pth`` state dict; without one the library's pretrained weights are taken (downloaded
            on first use). The number of classes follows the file.
        anatomy: build a timm architecture in this shape instead of its own (needs ``weights``).

    Raises:
        UsageError: an unknown or unsupported model, a missing file, weights that do not fit or are not finite.
        JobError: the pretrained weights cannot be had.
    """
    if name.startswith(HF):
        return _open_hf(name.removeprefix(HF), weights)
    open_timm.check_name(name)
    if weights is None:
        return wrap(name, open_timm.pretrained(name))
    state = read_weights(weights)
    classifier = state.get(open_timm.CLASSIFIER)
    module = build(name, anatomy, classes=len(classifier) if classifier is not None and classifier.ndim else None)
    fill(module, state, name, weights)
    return wrap(name, module)


def _open_hf(name: str, path: str | Path | None) -> OpenModel:
    if path is None:
        return wrap(name, *open_hf.pretrained(name))
    state = read_weights(path)
    module, prepared = open_hf.untrained(name, state)
    fill(module.model, state, name, path)
    return wrap(name, module, prepared)


def wrap(name: str, module: nn.Module, preprocessing: Mapping[str, Any] | None = None) -> OpenModel:
    """A module that exists already, as an :class:`OpenModel`; UsageError where it is unsupported or its weights are not finite.

    The module itself is used, not a copy: it is put into evaluation mode and its parameters need no gradients any more.
    ``preprocessing`` is in the words of timm's ``create_transform``; without it the model's, or its kind's, is taken.
    """
    host = open_host(module.eval().requires_grad_(False))
    host.module.eval()
    check_finite(host.module, name)
    ref = ModelRef(name, host.library, weights_sha256(host.module.state_dict()), host.anatomy)
    inner: Any = host.module
    if host.library == "hf":
        config = dict(preprocessing or open_hf.default_preprocessing(inner))
        blueprint = open_hf.blueprint(inner, config)
    else:
        config = dict(preprocessing or open_timm.preprocessing(inner, host.anatomy.image_size))
        blueprint = {}
    return OpenModel(host, ref, transform_of(config), tuple(config["mean"]), tuple(config["std"]), blueprint, config)


def transform_of(preprocessing: Mapping[str, Any]) -> Transform:
    """From images to tensors ``[channels, height, width]``, as words of timm's ``create_transform`` say."""
    made: Transform = create_transform(**preprocessing, is_training=False)
    return made


def rebuild(ref: ModelRef, blueprint: Mapping[str, str]) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """The untrained model a plan refers to, and its preprocessing where that comes with it; asks no network."""
    if ref.library == "hf":
        return open_hf.build(blueprint, ref.name)
    if ref.library == "timm":
        return build(ref.name, ref.anatomy), None
    raise UsageError(f"The model is of the library '{ref.library}', which this hesper does not know; upgrade hesper.")


def check_rebuildable(opened: OpenModel) -> None:
    """UsageError where its library, asked for the model again, would build another one."""
    with torch.device("meta"):
        own, _ = rebuild(opened.ref, opened.blueprint)
    odd = differences(own, opened.host.module)
    if odd:
        library = {"timm": "timm", "hf": "transformers"}[opened.ref.library]
        raise UsageError(
            f"{library}'s {opened.ref.name} is not built like the model given ({listed(odd)}), so a run of it could not be opened; "
            f"name the {library} model it was made from."
        )
