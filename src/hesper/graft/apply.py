"""Carry a plan out on a model: ``graft(module, plan, tables)`` gives a new module; the original is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft.deciders import CurvatureMerge, KeyMerge, RandomScore, ReaderAttention, RoutedSensitivity, ScoredCut
from hesper.graft.gates import Gate
from hesper.graft.linkage import most_removed
from hesper.graft.model import GraftedViT
from hesper.hosts import Host, open_host
from hesper.hosts.weights import weights_sha256
from hesper.plan import HeadGate, Plan, TokenCut, validate
from hesper.registry import Registry

CURVATURE = ("kl", "ce", "heart")


def graft(module: nn.Module, plan: Plan, tables: Mapping[str, Tensor] | None = None, *, check_weights: bool = True) -> GraftedViT:
    """A copy of ``module`` cut as ``plan`` says, in evaluation mode.

    Args:
        module: the dense model the plan was made for.
        plan: what to cut.
        tables: what pricing needs, by name: ``{block}.root`` ``[width, rank]``, ``{block}.router.direction`` ``[width]``,
            ``{block}.router.attention`` ``[heads]`` (the dense model's heads; those of removed heads are left out),
            ``{block}.router.offset`` ``[]``; for gates ``{block}.gate.direction`` ``[width, heads]``, ``{block}.gate.offset`` ``[heads]``
            and, where the block has a router too, ``{block}.router.mean_attention`` ``[heads]``. Where they were learned also
            ``{block}.restoration.stretch`` ``[]``, ``{block}.restoration.gain`` ``[width]`` and ``size_exponent`` ``[depth, heads]``.
        check_weights: whether a model in single precision must hold the very weights that the plan names, since prices fitted to other
            ones mean nothing; in other precisions that cannot be told.

    Raises:
        UsageError: the model has another anatomy or other weights than the plan's, a table is missing or of another shape, or the plan
            asks for what the model cannot do.

    Example:
        >>> import timm, torch
        >>> from hesper.plan import empty_plan
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> x = torch.randn(2, 3, 160, 160)
        >>> cut = graft(model, empty_plan("test_vit", open_host(model).anatomy))
        >>> torch.equal(cut(x), model(x))
        True
    """
    validate(plan)
    host = open_host(copy.deepcopy(module).eval().requires_grad_(False))
    _check_plan(plan, host)
    if check_weights:
        _check_weights(plan, host)
    for cut in plan.heads:
        host.blocks[cut.block].remove_heads(cut.remove)
    like = next(host.module.parameters())
    deciders = {cut.block: _decider(cut, plan, tables or {}).to(like.device, like.dtype) for cut in plan.tokens}
    gates = {gate.block: _gate(gate, plan, tables or {}).to(like.device, like.dtype) for gate in plan.gates}
    exponent = _learned(tables or {}, "size_exponent", (plan.model.anatomy.depth, plan.model.anatomy.heads))
    return GraftedViT(host, plan, deciders, gates, None if exponent is None else exponent.to(like.dtype)).to(like.device).eval()


def _check_plan(plan: Plan, host: Host) -> None:
    anatomy = plan.model.anatomy
    if host.anatomy != anatomy:
        raise UsageError(f"The plan was made for {plan.model.name} of another shape than the model given; make a plan for this model.")
    if plan.skip_unread and (anatomy.reads_patches or not anatomy.prefix_tokens):
        raise UsageError("The classifier pools over patch tokens, so the last block's are read; make a plan without skip_unread.")
    if plan.gates and not host.heads_removable:
        raise UsageError("Heads cannot sit out in a model whose attention output is normalised over all heads; use --heads none.")
    left = anatomy.tokens - anatomy.prefix_tokens
    for cut in plan.tokens:
        if cut.remove is None or (plan.skip_unread and cut.block == anatomy.depth - 1):
            continue
        alternate = cut.combine == "merge" and _criterion(plan) in (*CURVATURE, "tome")
        rounds = plan.pricing.rounds if plan.pricing is not None and _criterion(plan) in CURVATURE else 1
        most = most_removed(left, rounds) if alternate else left - 1
        if cut.remove > most:
            kind = "merging alternate tokens" if alternate else "a cut"
            raise UsageError(f"The cut of block {cut.block} removes {cut.remove} of {left} patches, but {kind} removes at most {most}.")
        left -= cut.remove


def _check_weights(plan: Plan, host: Host) -> None:
    state, named = host.module.state_dict(), plan.model.weights_sha256
    single = all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())
    if named and single and weights_sha256(state) != named:
        raise UsageError(
            f"The plan was made for other weights of {plan.model.name} than the model given holds; make a plan for this model "
            "(check_weights=False cuts it nevertheless, and nothing that was measured holds then)."
        )


def _criterion(plan: Plan) -> str:
    return "tome" if plan.pricing is None else plan.pricing.criterion


def _decider(cut: TokenCut, plan: Plan, tables: Mapping[str, Tensor]) -> nn.Module:
    return _builders[_criterion(plan)](cut, plan, tables)


def _by_curvature(cut: TokenCut, plan: Plan, tables: Mapping[str, Tensor]) -> nn.Module:
    own = _tables(cut, plan, tables)
    if cut.combine == "merge" and plan.pricing is not None:
        return CurvatureMerge(cut, plan.pricing.gamma, plan.pricing.rounds, own)
    return ScoredCut(cut, RoutedSensitivity(own), plan.model.anatomy.head_dim)


def _by_key(cut: TokenCut, plan: Plan, _: Mapping[str, Tensor]) -> nn.Module:
    if cut.combine != "merge":
        raise UsageError(f"The criterion 'tome' merges and cannot {cut.combine} tokens; use combine = 'merge' or another criterion.")
    return KeyMerge(cut, plan.model.anatomy.head_dim)


def _by_attention(cut: TokenCut, plan: Plan, _: Mapping[str, Tensor]) -> nn.Module:
    return ScoredCut(cut, ReaderAttention(), plan.model.anatomy.head_dim)


def _at_random(cut: TokenCut, plan: Plan, _: Mapping[str, Tensor]) -> nn.Module:
    anatomy = plan.model.anatomy
    return ScoredCut(cut, RandomScore(plan.provenance.seed * anatomy.depth + cut.block, anatomy.tokens), anatomy.head_dim)


def _known() -> Registry[Callable[[TokenCut, Plan, Mapping[str, Tensor]], nn.Module]]:
    builders: Registry[Callable[[TokenCut, Plan, Mapping[str, Tensor]], nn.Module]] = Registry("criterion")
    for name in CURVATURE:
        builders.add(name, _by_curvature)
    builders.add("tome", _by_key)
    builders.add("cls", _by_attention)
    builders.add("random", _at_random)
    return builders


_builders = _known()


def _tables(cut: TokenCut, plan: Plan, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tables of a block, by their names in it, for the heads it has left."""
    anatomy = plan.model.anatomy
    shapes = {"router.direction": (anatomy.width,), "router.attention": (anatomy.heads,), "router.offset": ()}
    if cut.combine == "merge" and plan.pricing is not None:
        shapes = {"root": (anatomy.width, plan.pricing.rank), **shapes}
    own = _named(cut.block, "tokens", shapes, tables)
    for name, shape in {"restoration.stretch": (), "restoration.gain": (anatomy.width,)}.items():
        if (learned := _learned(tables, f"{cut.block}.{name}", shape)) is not None:
            own[name] = learned
    left = _heads_left(cut.block, plan)
    removed = [head for head in range(anatomy.heads) if head not in left]
    mean = tables.get(f"{cut.block}.router.mean_attention")
    if removed and mean is not None:
        # A removed head's attention is no longer seen; its mean takes its place, or every price of the block would shift.
        own["router.offset"] = own["router.offset"] + own["router.attention"][removed] @ mean[removed]
    own["router.attention"] = own["router.attention"][left]
    return own


def _learned(tables: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor | None:
    """A table that a plan can do without."""
    return _shaped(tables, key, shape) if key in tables else None


def _shaped(tables: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tables[key].shape) != shape:
        raise UsageError(f"The table '{key}' has shape {tuple(tables[key].shape)}, but the plan needs {shape}; make the run again.")
    return tables[key]


def _gate(gate: HeadGate, plan: Plan, tables: Mapping[str, Tensor]) -> Gate:
    """The gate of a block, for the heads it has left."""
    anatomy, left = plan.model.anatomy, _heads_left(gate.block, plan)
    shapes: dict[str, tuple[int, ...]] = {"gate.direction": (anatomy.width, anatomy.heads), "gate.offset": (anatomy.heads,)}
    if _criterion(plan) in CURVATURE and any(cut.block == gate.block for cut in plan.tokens):
        shapes["router.mean_attention"] = (anatomy.heads,)
    own = _named(gate.block, "heads", shapes, tables)
    short = {"gate.direction": "direction", "gate.offset": "offset", "router.mean_attention": "stand_in"}
    return Gate(gate, {short[name]: table[..., left] for name, table in own.items()})


def _named(block: int, what: str, shapes: Mapping[str, tuple[int, ...]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tables of a block by their names in it; UsageError where one is missing or of another shape."""
    own = {}
    for name, shape in shapes.items():
        key = f"{block}.{name}"
        if key not in tables:
            raise UsageError(f"The plan prices {what} of block {block}, but its table '{key}' is missing; make the run again.")
        own[name] = _shaped(tables, key, shape)
    return own


def _heads_left(block: int, plan: Plan) -> list[int]:
    gone = {head for cut in plan.heads if cut.block == block for head in cut.remove}
    return [head for head in range(plan.model.anatomy.heads) if head not in gone]
