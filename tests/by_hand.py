"""Grafted tiny models, what their deciders saw, and the same image through explicit lists of clusters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesper.graft import GraftedViT, graft
from hesper.graft.deciders import State
from hesper.graft.decision import Decision
from hesper.graft.even import EvenDecision
from hesper.hosts import open_host
from vits import attention_by_hand, cuts_of, feed_by_hand, lies, logits_by_hand, pictures, plan_for, tables, vit

DOUBLE = torch.float64
DECIDERS = [("kl", "merge"), ("tome", "merge"), ("kl", "drop"), ("cls", "drop"), ("cls", "merge"), ("random", "drop"), ("random", "merge")]
ADAPTIVE = [(criterion, combine) for criterion, combine in DECIDERS if criterion != "random"]


@functools.lru_cache
def threshold(kind: str, criterion: str, combine: Any, multiple: int = 1) -> float:
    """A price at which images lose different counts: of a grid, the one that spreads the counts after two cuts most."""
    if criterion == "random":
        return 0.3
    grid = [2.0 ** (power / 2) for power in range(-13, 20, 2)]
    fed = {
        price: grafted(kind, DOUBLE, criterion, cuts_of(combine, [0, 1], threshold=price, multiple=multiple))
        .run(pictures(5, DOUBLE))
        .traffic.fed[:, 1]
        for price in grid
    }
    return max(grid, key=lambda price: len(set(fed[price])))


class Watch:
    """Records what each decider saw and decided."""

    def __init__(self, model: GraftedViT) -> None:
        self.seen: list[tuple[State, Decision]] = []
        for decider in model.deciders.values():
            decider.register_forward_hook(self._note)

    def _note(self, _: nn.Module, arguments: tuple[State], decision: Decision) -> None:
        state = arguments[0]
        self.seen.append((dataclasses.replace(state, stream=state.stream.clone(), size=state.size.clone()), decision))


def grafted(kind: str, dtype: torch.dtype = torch.float32, criterion: str = "kl", cuts: Any = (), **more: Any) -> GraftedViT:
    model = vit(kind, dtype)
    return graft(model, plan_for(model, cuts, criterion, **more), tables(model))


def by_hand(
    model: Any,
    image: Tensor,
    decide: Any,
    keeps_length: bool = False,
    order: list[int] | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """One image through explicit lists of clusters: ``decide(block, tokens)`` gives {gone place: into place or None}.

    A cluster is a token with the original patches it stands for; attention counts it once per patch. Clusters start in ``order``.
    With what was ``learned``, a head counts a cluster by its own power, and what merged is stretched and weighed as learned.
    """
    learned = learned or {}
    prefix = model.num_prefix_tokens
    stream = open_host(model).embed(image[None])[0]
    places = list(range(len(stream) - prefix)) if order is None else order
    stream = torch.cat([stream[:prefix], stream[prefix:][places]])
    clusters: list[list[int]] = [[] for _ in range(prefix)] + [[patch] for patch in places]
    for index, block in enumerate(model.blocks):
        copies = torch.tensor([max(len(c), 1) for c in clusters], dtype=stream.dtype)
        counted = copies ** learned["size_exponent"][index][:, None, None].to(copies) if learned else copies
        stream = attention_by_hand(block, stream, counted)
        fates = decide(index)
        if fates is not None:
            fates = {place + prefix: None if into is None else into + prefix for place, into in fates.items()}
            merged = []
            for place, cluster in enumerate(clusters):
                if place in fates:
                    continue
                group = [place, *(source for source, into in fates.items() if into == place)]
                weights = torch.tensor([max(len(clusters[one]), 1) for one in group], dtype=stream.dtype)
                mean = (stream[group] * weights[:, None]).sum(0) / weights.sum()
                if keeps_length and len(group) > 1:
                    ratio = (stream[group].norm(dim=1) * weights).sum() / weights.sum() / mean.norm()
                    gain = learned.get(f"{index}.restoration.gain", torch.zeros(()))
                    mean = mean * ratio.clamp_max(4) ** float(learned.get(f"{index}.restoration.stretch", 1.0)) * (1 + gain)
                merged.append((mean, [patch for one in group for patch in clusters[one]] if len(group) > 1 else cluster))
            stream, clusters = torch.stack([mean for mean, _ in merged]), [cluster for _, cluster in merged]
        stream = feed_by_hand(block, stream)
    return logits_by_hand(model, stream, torch.tensor([max(len(c), 1) for c in clusters], dtype=stream.dtype)), clusters[prefix:]


def rows_that_leave(decision: Decision | EvenDecision) -> dict[int, int | None]:
    """{row that leaves: row it merges into, None for drops}."""
    gone, into = decision.gone.tolist(), None if decision.into is None else decision.into.tolist()
    assert len(set(gone)) == len(gone)
    return dict(zip(gone, [None] * len(gone) if into is None else into, strict=True))


def fates_of(state: State, decision: Decision | EvenDecision, image: int) -> dict[int, int | None]:
    run = lies(state.layout, image)
    first, last = state.layout.bounds[run] + state.layout.prefix, state.layout.bounds[run + 1]
    leave = rows_that_leave(decision).items()
    return {row - first: None if to is None else to - first for row, to in leave if first <= row < last}
