"""Carry a plan out on a model: ``graft(module, plan, tables)`` gives a new module; the original is never touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft.deciders import CurvatureMerge, KeyMerge, RandomScore, ReaderAttention, RoutedSensitivity, ScoredCut
from hesper.graft.model import GraftedViT
from hesper.hosts import Host, open_host
from hesper.plan import Anatomy, Plan, TokenCut, validate
from hesper.registry import did_you_mean

CURVATURE = ("kl", "ce", "heart")
BASELINES = ("tome", "cls", "random")


def graft(module: nn.Module, plan: Plan, tables: Mapping[str, Tensor] | None = None) -> GraftedViT:
    """A copy of ``module`` cut as ``plan`` says, in evaluation mode.

    Args:
        module: the dense model the plan was made for.
        plan: what to cut.
        tables: what pricing needs, by name: ``{block}.root`` ``[width, rank]``, ``{block}.router.direction`` ``[width]``,
            ``{block}.router.attention`` ``[heads]``, ``{block}.router.offset`` ``[]``.

    Raises:
        UsageError: the model has another anatomy than the plan's, or a table is missing.

    Example:
        >>> import timm
        >>> from hesper.plan import empty_plan
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> x = torch.randn(2, 3, 160, 160)
        >>> cut = graft(model, empty_plan("test_vit", open_host(model).anatomy))
        >>> torch.equal(cut(x), model(x))
        True
    """
    validate(plan)
    host = open_host(copy.deepcopy(module).eval().requires_grad_(False))
    if host.anatomy != plan.model.anatomy:
        raise UsageError(f"The plan was made for {plan.model.name} of another shape than the model given; make a plan for this model.")
    for cut in plan.heads:
        host.blocks[cut.block].remove_heads(cut.remove)
    deciders = {cut.block: _decider(cut, plan, tables or {}, host) for cut in plan.tokens}
    return GraftedViT(host, plan, deciders).eval()


def _decider(cut: TokenCut, plan: Plan, tables: Mapping[str, Tensor], host: Host) -> nn.Module:
    anatomy: Anatomy = plan.model.anatomy
    criterion = "tome" if plan.pricing is None else plan.pricing.criterion
    if criterion in CURVATURE:
        prefix = f"{cut.block}."
        own = {name.removeprefix(prefix): table for name, table in tables.items() if name.startswith(prefix)}
        needed = ("root", *ROUTER) if cut.combine == "merge" else ROUTER
        if missing := [name for name in needed if name not in own]:
            raise UsageError(f"The plan prices tokens of block {cut.block}, but its table '{missing[0]}' is missing; make the run again.")
        if cut.combine == "merge":
            assert plan.pricing is not None
            return CurvatureMerge(cut, plan.pricing.gamma, own)
        return ScoredCut(cut, RoutedSensitivity(own), anatomy.head_dim)
    if criterion == "tome" and cut.combine == "merge":
        return KeyMerge(cut, anatomy.head_dim)
    if criterion == "cls":
        return ScoredCut(cut, ReaderAttention(anatomy.width), anatomy.head_dim)
    if criterion == "random":
        return ScoredCut(cut, RandomScore(plan.provenance.seed * anatomy.depth + cut.block), anatomy.head_dim)
    raise UsageError(f"The criterion '{criterion}' cannot {cut.combine} tokens; {did_you_mean(criterion, (*CURVATURE, *BASELINES))}")


ROUTER = ("router.direction", "router.attention", "router.offset")
