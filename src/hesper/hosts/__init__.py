"""Host models: the only rooms that know a model library."""

from typing import Protocol

from torch import nn

from hesper.hosts.base import Host, HostBlock, Projected
from hesper.hosts.hf_vit import CLASSIFIERS
from hesper.hosts.refusal import refused
from hesper.hosts.timm_ends import fix_image_size
from hesper.hosts.timm_eva import TimmEva
from hesper.hosts.timm_vit import TimmViT
from hesper.registry import Registry

__all__ = ["Host", "HostBlock", "Projected", "TimmEva", "TimmViT", "fix_image_size", "open_host"]


class _Opener(Protocol):
    def __call__(self, module: nn.Module) -> Host: ...


def _known() -> Registry[_Opener]:
    hosts: Registry[_Opener] = Registry("model type")
    hosts.add("timm.VisionTransformer", "hesper.hosts.timm_vit:TimmViT")
    hosts.add("timm.VisionTransformerDistilled", "hesper.hosts.timm_vit:TimmViT")
    hosts.add("timm.Eva", "hesper.hosts.timm_eva:TimmEva")
    hosts.add("hesper.Logits", "hesper.hosts.hf_vit:HfViT")
    for name in CLASSIFIERS:
        hosts.add(f"transformers.{name}", "hesper.hosts.hf_vit:HfViT")
    return hosts


_hosts = _known()


def open_host(module: nn.Module) -> Host:
    """The host view of a model; UsageError, with the reason, where its type is not supported."""
    kind = type(module)
    key = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"  # exactly this type: a subclass may compute anything
    if key not in _hosts:
        raise refused(kind.__name__)
    return _hosts[key](module)
