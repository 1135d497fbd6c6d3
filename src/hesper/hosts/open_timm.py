"""timm's models by name: built, with or without pretrained weights, and the preprocessing they expect."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from hesper.errors import JobError, UsageError
from hesper.hosts import open_host
from hesper.hosts.weights import first_line
from hesper.plan import Anatomy
from hesper.registry import did_you_mean

CLASSIFIER = "head.weight"


def check_name(name: str) -> None:
    """UsageError where timm has no such model, or no weights with such a tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"There is no model '{name}' in timm; {did_you_mean(architecture, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UsageError(f"timm's {architecture} has no weights tagged '{tag}'; {did_you_mean(tag, tags)}")


def build(name: str, anatomy: Anatomy | None = None, *, classes: int | None = None) -> nn.Module:
    """The untrained architecture ``name``, in the shape of ``anatomy`` where its own differs."""
    check_name(name)
    module: nn.Module
    if anatomy is None:
        own: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        module = timm.create_model(name, pretrained=False, **own)
        return module
    for options in _shapes(anatomy):
        module = timm.create_model(name, pretrained=False, **options)
        if open_host(module).anatomy == anatomy:
            return module
    raise UsageError(f"The architecture {name} cannot be built in the shape asked for; give the name of the model it was made from.")


def _shapes(anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    """Options that may build this anatomy: its classes and size alone, then its widths, its MLP and its pooling as well."""
    own = {"num_classes": anatomy.classes, "img_size": anatomy.image_size}
    yield own
    patch = anatomy.image_size[0] // anatomy.grid[0]
    own |= {"patch_size": patch, "in_chans": anatomy.patch_values // patch**2}
    own |= {"embed_dim": anatomy.width, "depth": anatomy.depth, "num_heads": anatomy.heads}
    mlp = {"mlp_ratio": anatomy.mlp_width / anatomy.width}
    pooling = {"global_pool": "avg" if anatomy.reads_patches else "token"}
    for one, other in itertools.product((mlp, {}), (pooling, {})):
        yield {**own, **one, **other}


def pretrained(name: str) -> nn.Module:
    """timm's model with its pretrained weights; JobError where they cannot be had."""
    check_name(name)
    if not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no pretrained weights for {name}; give a file with --weights.")
    with torch.device("meta"):
        open_host(timm.create_model(name, pretrained=False))  # an unsupported model is refused before its weights are fetched
    try:
        module: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network and disk each raise their own kinds
        raise JobError(
            f"The pretrained weights of {name} could not be fetched ({first_line(error)}); give a file with --weights."
        ) from error
    return module


def preprocessing(module: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """What timm's transforms are made from, for images of ``size``."""
    resolve: Any = resolve_model_data_config  # untyped in timm
    config: dict[str, Any] = resolve(module, args={"input_size": (3, *size)})
    return config
