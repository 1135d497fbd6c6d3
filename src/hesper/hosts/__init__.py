"""Host models: the only rooms that know a model library."""

from torch import nn

from hesper.hosts.base import Host, HostBlock, Projected
from hesper.hosts.timm_vit import TimmViT

__all__ = ["Host", "HostBlock", "Projected", "TimmViT", "open_host"]


def open_host(module: nn.Module) -> Host:
    """The host view of a model; UsageError where its type is not supported."""
    return TimmViT(module)
