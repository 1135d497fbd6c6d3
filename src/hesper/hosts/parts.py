"""Arithmetic that hosts share: linear layers cut smaller, means over weighted tokens, the shape of weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("q", "k", "v")
"""As timm names its projections, before ``_proj``."""


def kept_columns(heads: int, head_dim: int, removed: Sequence[int]) -> Tensor:
    """Which of ``heads * head_dim`` numbers belong to the heads that stay.

    >>> kept_columns(3, 2, [1]).tolist()
    [0, 1, 4, 5]
    """
    gone = set(removed)
    return torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in range(heads) if h not in gone])


def sliced(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A linear layer with only these outputs (``rows``) or inputs (``columns``).

    >>> sliced(nn.Linear(4, 3), rows=torch.tensor([0, 2])).weight.shape
    torch.Size([2, 4])
    """
    weight: Tensor = linear.weight.detach()
    bias: Tensor | None = None if linear.bias is None else linear.bias.detach()
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        bias = None if bias is None else bias[rows.to(weight.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    small.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        small.bias = nn.Parameter(bias.clone(), requires_grad=linear.weight.requires_grad)
    return small


def thirds(linear: nn.Linear, bias: Tensor | None = None) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The linear layers whose outputs are the first, second and last third of another's, ``bias`` in the place of its own.

    >>> fused, rows = nn.Linear(2, 6), torch.ones(4, 2)
    >>> torch.allclose(torch.cat([part(rows) for part in thirds(fused)], -1), fused(rows))
    True
    """
    first, second, third = (sliced(linear, rows=rows) for rows in torch.arange(linear.weight.shape[0]).chunk(3))
    if bias is not None:
        for part, own in zip((first, second, third), bias.detach().chunk(3), strict=True):
            part.bias = nn.Parameter(own.clone(), requires_grad=linear.weight.requires_grad)
    return first, second, third


def passed_on(value: nn.Linear, out: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Layers of the same effect, before and after attention, of which the second has the bias of both.

    Attention averages, so what is added to all values is added to what comes out: out(sum_j a_j (v_j + b)) = out(sum_j a_j v_j) + W b.

    >>> value, out, rows = nn.Linear(2, 3), nn.Linear(3, 2), torch.rand(4, 2)
    >>> first, second = passed_on(value, out)
    >>> first.bias is None, torch.allclose(second(first(rows).mean(0)), out(value(rows).mean(0)), atol=1e-6)
    (True, True)
    """
    if value.bias is None:
        return value, out
    later, bias = sliced(out), out.weight.detach() @ value.bias.detach()
    later.bias = nn.Parameter(bias if out.bias is None else bias + out.bias.detach(), requires_grad=out.weight.requires_grad)
    return unbiased(value), later


def unbiased(linear: nn.Linear) -> nn.Linear:
    """A linear layer without the bias.

    >>> unbiased(nn.Linear(2, 3)).bias is None
    True
    """
    plain = sliced(linear)
    plain.register_parameter("bias", None)
    return plain


def twin(taken_apart: Any, block: nn.Module, attention: nn.Module, *shared: object) -> Any:
    """A copy of a block that was taken apart, with an attention of its own; other submodules, and what is ``shared``, are the same.

    >>> block = nn.ModuleDict({"attn": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
    >>> other = twin([block], block, block["attn"])[0]
    >>> other["mlp"] is block["mlp"], other["attn"] is block["attn"]
    (True, False)
    """
    same = [*(part for part in block.children() if part is not attention), *block.parameters(recurse=False), *shared]
    return copy.deepcopy(taken_apart, {id(part): part for part in same})


def mean(tokens: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of ``[images, tokens, width]`` over tokens, each counted as often as ``weight`` ``[images, tokens]`` says.

    >>> mean(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[3.0, 1.0]])).tolist()
    [[1.0]]
    """
    if weight is None:
        return tokens.mean(1)
    pooled: Tensor = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return pooled.to(tokens.dtype)  # weights may have more digits than tokens


def with_prefix(prefix: Tensor, patches: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """All tokens ``[images, prefix + patches, width]`` and their weights, prefix tokens counting once."""
    ones = None if weight is None else torch.cat([weight.new_ones(prefix.shape[:2]), weight], 1)
    return torch.cat([prefix, patches], 1), ones


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in a module: the MACs of one row through it."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
