"""The offline half of HEART: from calibration images to the small tables that price tokens online."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.curvature import Batch, image_generators
from hesper.errors import JobError, UsageError
from hesper.graft.attention import attend, reader_attention
from hesper.graft.deciders import State
from hesper.graft.gates import mean_row
from hesper.graft.layout import Layout
from hesper.heart.criteria import Criterion, check_prices_heads, head_prices, sensitivity, stream_curvature
from hesper.heart.gate_fit import GateFit
from hesper.heart.metric import metric_root
from hesper.heart.ridge import Ridge
from hesper.hosts import Host
from hesper.plan import Combine

RIDGE = 3.0
SMALLEST = 1e-6


@dataclass(frozen=True, eq=False)
class Tables:
    """What pricing needs online, by name (see :func:`hesper.graft.graft`), and how well routers and gates explain their targets.

    ``explained`` has the share of the log target's variance per block; ``gates_explained`` what gates will explain on other images,
    as cross-validation foretells it, in the mean over a block's heads.
    """

    tensors: dict[str, Tensor]
    explained: tuple[float, ...]
    gates_explained: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Atlas:
    """Mean prices in nats over calibration images, for head cuts and for looking at.

    ``tokens`` ``[depth, patches]``, ``heads`` and ``heads_stderr`` ``[depth, heads]`` (over images).
    """

    tokens: Tensor
    heads: Tensor
    heads_stderr: Tensor
    images: int


def fit_tables(
    host: Host,
    batches: Iterable[Batch],
    criterion: Criterion,
    combine: Combine | None,
    rank: int,
    generator: torch.Generator,
    *,
    gates: bool = False,
) -> Tables:
    """Fit metric and router of every block on the dense trajectory of calibration images; with ``gates`` those of the heads too.

    Merging needs the curvature metric (in ``rank`` dimensions) and a router for the token curvature w relative to it; dropping
    needs a router for the price of deletion. Routers are ridge regressions of the log target on the normalised token and the log
    attention the reader pays it. Without ``combine`` no token is to go, and gates alone are fitted.

    Raises:
        UsageError: no images, a rank above the width, labels missing for the criterion, or gates under one that is not ``kl``.
        JobError: the model's outputs or curvatures are not finite.
    """
    if not 1 <= rank <= host.anatomy.width:
        raise UsageError(f"The rank must lie between 1 and the model's width {host.anatomy.width}, not {rank}.")
    sums = FitSums(host, criterion, combine, generator, gates=gates)
    for batch in batches:
        sums.add(batch)
    return sums.tables(rank)


def survey(host: Host, batches: Iterable[Batch], criterion: Criterion, generator: torch.Generator) -> Atlas:
    """Mean price of every patch position and head over calibration images."""
    sums = SurveySums(host, criterion, generator)
    for batch in batches:
        sums.add(batch)
    return sums.atlas()


def dense_states(host: Host, images: Tensor) -> Iterator[State]:
    """The state each block of the dense model would decide on, block by block."""
    with torch.no_grad():
        embedded = host.embed(images)
        layout = Layout((embedded.shape[1],) * len(images), host.anatomy.prefix_tokens, images.device)
        rows, place = embedded.flatten(0, 1), layout.places
        size = torch.ones_like(rows[:, 0])
        for block in host.blocks:
            projected = block.project(rows, place)
            rows = rows + block.merge_heads(attend(projected, None, layout, block.scale))
            attention = reader_attention(projected, None, layout, block.scale)
            yield State(rows, projected.normed, projected.key, projected.value, attention, size, layout)
            rows = rows + block.feed(rows)


class SurveySums:
    """Running sums of prices over calibration images; memory does not grow with their number."""

    def __init__(self, host: Host, criterion: Criterion, generator: torch.Generator) -> None:
        anatomy = host.anatomy
        self.host, self.criterion, self.generator = host, criterion, generator
        self.images = torch.zeros((), dtype=torch.float64)
        self.tokens = torch.zeros(anatomy.depth, anatomy.tokens - anatomy.prefix_tokens, dtype=torch.float64)
        self.heads = torch.zeros(anatomy.depth, anatomy.heads, dtype=torch.float64)
        self.heads_squared = torch.zeros_like(self.heads)

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, float64 on the CPU: what another process adds to them counts."""
        return {"images": self.images, "tokens": self.tokens, "heads": self.heads, "heads_squared": self.heads_squared}

    def add(self, batch: Batch) -> None:
        """Add the prices of a batch."""
        found = sensitivity(self.host, batch, self.criterion, image_generators(batch.images, self.generator))
        heads = found.heads.double().cpu()
        self.tokens += found.tokens.double().cpu().sum(0)
        self.heads += heads.sum(0)
        self.heads_squared += heads.square().sum(0)
        self.images += len(batch.images)

    def atlas(self) -> Atlas:
        """Means over all images; UsageError without any."""
        n = int(self.images)
        if not n:
            raise UsageError("There are no calibration images to survey; give a folder with images.")
        mean = self.heads / n
        error = torch.full_like(mean, float("nan"))
        if n > 1:
            error = ((self.heads_squared - n * mean.square()).clamp_min(0) / (n - 1) / n).sqrt()
        return Atlas(self.tokens / n, mean, error, n)


class FitSums:
    """Running sums over calibration images; memory does not grow with their number."""

    def __init__(
        self, host: Host, criterion: Criterion, combine: Combine | None, generator: torch.Generator, *, gates: bool = False
    ) -> None:
        if gates:
            check_prices_heads(criterion)
        anatomy = host.anatomy
        square = (anatomy.depth, anatomy.width, anatomy.width)
        self.host, self.criterion, self.combine, self.generator = host, criterion, combine, generator
        self.images = torch.zeros((), dtype=torch.float64)
        self.moment = torch.zeros(square, dtype=torch.float64)
        self.covariance = torch.zeros(square, dtype=torch.float64)
        self.routers = [Ridge(anatomy.width + anatomy.heads) for _ in range(anatomy.depth if combine else 0)]
        self.gates = [GateFit(anatomy.width, anatomy.heads) for _ in range(anatomy.depth if gates else 0)]

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, float64 on the CPU: what another process adds to them counts."""
        routers = {f"router.{block}": router.moments for block, router in enumerate(self.routers)}
        gates = {f"gate.{block}": gate.moments for block, gate in enumerate(self.gates)}
        prices = {f"gate.{block}.price": gate.prices for block, gate in enumerate(self.gates)}
        return {"images": self.images, "moment": self.moment, "covariance": self.covariance, **routers, **gates, **prices}

    def add(self, batch: Batch) -> None:
        """Add what the criterion finds on a batch; JobError when it is not finite."""
        generators = image_generators(batch.images, self.generator)
        if self.combine == "merge":
            curvature = stream_curvature(self.host, batch, self.criterion, generators, with_heads=bool(self.gates))
            self.add_curvature(batch, curvature.second_moment, curvature.strength, curvature.heads)
        elif self.combine == "drop":
            found = sensitivity(self.host, batch, self.criterion, generators)
            self.add_curvature(batch, None, found.tokens, found.heads if self.gates else None)
        else:
            self.add_curvature(batch, None, None, head_prices(self.host, batch, self.criterion, generators))

    def add_curvature(self, batch: Batch, moment: Tensor | None, target: Tensor | None, heads: Tensor | None = None) -> None:
        """Add a batch: the metric's second moments (or None), the routers' targets ``[images, depth, patches]`` and the gates'.

        The gates' are prices ``[images, depth, heads]``; either may be None where nothing of its kind is fitted.
        """
        for found in (target, heads):
            if found is not None and not bool(torch.isfinite(found).all()):
                raise JobError("The curvature of a calibration batch is not finite; check the model's weights and the images.")
        if moment is not None:
            self.moment += moment.double().cpu()
        for block, state in enumerate(dense_states(self.host, batch.images)):
            if target is not None:
                self._add_tokens(block, state, target)
            if heads is not None:
                prefix = state.layout.prefix_rows(state.normed)
                row = prefix[:, 0] if state.layout.prefix else mean_row(state.normed, None, state.layout)
                self.gates[block].add(row.cpu(), heads[:, block].cpu())
        self.images += len(batch.images)

    def _add_tokens(self, block: int, state: State, target: Tensor) -> None:
        floor = (SMALLEST * target.clamp_min(0).mean((0, 2))).clamp_min(torch.finfo(target.dtype).tiny)
        patches = state.layout.padded(state.stream)
        centred = (patches - patches.mean(1, keepdim=True)).flatten(0, 1).double().cpu()
        self.covariance[block] += centred.T @ centred
        features = state.layout.padded(torch.cat([state.normed, state.attention], 1)).flatten(0, 1)
        self.routers[block].add(features.cpu(), target[:, block].flatten().clamp_min(floor[block]).log().cpu())

    def tables(self, rank: int) -> Tables:
        """Solve for every block; UsageError without images."""
        if not self.images:
            raise UsageError("There are no calibration images to fit on; give a folder with images.")
        anatomy = self.host.anatomy
        patches = int(self.images) * (anatomy.tokens - anatomy.prefix_tokens)
        tensors, explained = dict[str, Tensor](), list[float]()
        for block, router in enumerate(self.routers):
            sums = (self.moment[block] / patches, self.covariance[block] / patches) if self.combine == "merge" else None
            own, share = block_tables(block, router, anatomy.width, sums, rank)
            tensors |= own
            explained.append(share)
        shares = []
        for block, gate in enumerate(self.gates):
            direction, offsets, foretold = gate.solve()
            shares.append(float(foretold.mean()))
            tensors[f"{block}.gate.direction"], tensors[f"{block}.gate.offset"] = direction.float(), offsets.float()
        return Tables(tensors, tuple(explained), tuple(shares))


def block_tables(block: int, router: Ridge, width: int, sums: tuple[Tensor, Tensor] | None, rank: int) -> tuple[dict[str, Tensor], float]:
    """The tables that price a block's tokens, by name, and the share of the log target's variance that the router explains.

    ``sums`` are the metric and the covariance of tokens within an image, for merging; None for dropping.
    """
    weights, offset, share = router.solve(RIDGE)
    tensors = {}
    if sums is not None:
        metric, covariance = sums
        tensors[f"{block}.root"] = metric_root(metric, covariance, rank).float()
        # The router's target is the trace of the token's own curvature; relative to the metric's it has mean one where all sizes are one.
        offset -= float(metric.trace().clamp_min(torch.finfo(torch.float64).tiny).log())
    tensors[f"{block}.router.direction"] = weights[:width].float()
    tensors[f"{block}.router.attention"] = weights[width:].float()
    tensors[f"{block}.router.mean_attention"] = router.mean[width:].float()
    tensors[f"{block}.router.offset"] = torch.tensor(offset)
    return tensors, share
