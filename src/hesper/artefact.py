"""A run's ``model.safetensors``: what of a cut model and its dense one lies in the file, by name, and how both are had back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft import GraftedViT, graft
from hesper.hosts.open import OpenModel, rebuild, wrap
from hesper.plan import Plan
from hesper.runs import MODEL, RunFolder

__all__ = ["load_cut", "open_dense", "save_model"]

DECIDERS = "deciders."
SIZE_EXPONENT = "size_exponent"
GATES = "gates."
NETWORK = "network."
DENSE = "dense."


def save_model(path: Path, opened: OpenModel, cut: GraftedViT) -> None:
    """Write a cut model, and what its dense one had besides, to a ``.safetensors`` file."""
    safetensors.torch.save_file(_tensors(opened, cut), path, metadata=dict(opened.blueprint) or None)


def load_cut(run: RunFolder) -> GraftedViT:
    """The pruned model of a run, in evaluation mode."""
    state, blueprint = _state(run)
    module, _ = rebuild(run.plan.model, blueprint)
    cut = graft(module, run.plan, _tables(state, run.plan), check_weights=False)  # the weights follow
    _fill(cut, {name: tensor for name, tensor in state.items() if not name.startswith(DENSE)}, run)
    return cut


def open_dense(run: RunFolder) -> OpenModel:
    """The dense model of a run: its network, with what head cuts removed put back."""
    state, blueprint = _state(run)
    dense = {name.removeprefix(NETWORK): tensor for name, tensor in state.items() if name.startswith(NETWORK)}
    dense |= {name.removeprefix(DENSE): tensor for name, tensor in state.items() if name.startswith(DENSE)}
    module, preprocessing = rebuild(run.plan.model, blueprint)
    _fill(module, dense, run)
    opened = wrap(run.plan.model.name, module, preprocessing)
    if opened.ref != run.plan.model:
        raise UsageError(f"{run.path / MODEL} does not hold the dense weights the plan was made for; make the run again.")
    return opened


def _tables(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """A run's tables as grafting wants them, for the dense model's heads: those of removed heads, never used, are zero."""
    # A decider that drops keeps its router within its score.
    tables = {name.removeprefix(DECIDERS).replace(".score.", "."): tensor for name, tensor in state.items() if name.startswith(DECIDERS)}
    tables |= {name: state[name] for name in (SIZE_EXPONENT,) if name in state}
    for name, tensor in state.items():
        if name.startswith(GATES):
            block, part = name.removeprefix(GATES).split(".")
            tables[f"{block}.router.mean_attention" if part == "stand_in" else f"{block}.gate.{part}"] = tensor
    full, heads = dict(tables), plan.model.anatomy.heads
    for cut in plan.heads:
        left = [head for head in range(heads) if head not in cut.remove]
        for name in ("router.attention", "router.mean_attention", "gate.direction", "gate.offset"):
            key = f"{cut.block}.{name}"
            if key in tables:
                full[key] = tables[key].new_zeros(*tables[key].shape[:-1], heads)
                full[key][..., left] = tables[key]
    return full


def _state(run: RunFolder) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A run's tensors, and what its file says about rebuilding the model."""
    try:
        with safe_open(run.path / MODEL, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{run.path / MODEL} cannot be read ({error}); restore it or make the run again.") from error


def _fill(module: nn.Module, state: Mapping[str, Tensor], run: RunFolder) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UsageError(f"{run.path / MODEL} does not fit the plan beside it; restore it or make the run again.") from error


def _tensors(opened: OpenModel, cut: GraftedViT) -> dict[str, Tensor]:
    """Everything a run needs to rebuild both models: the cut one's state, and the dense tensors that head cuts changed."""
    state = {name: tensor.contiguous() for name, tensor in cut.state_dict().items()}
    for name, tensor in opened.host.module.state_dict().items():
        if state[NETWORK + name].shape != tensor.shape:
            state[DENSE + name] = tensor.contiguous()
    return state
