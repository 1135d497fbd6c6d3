"""What cutting a token or a head costs, in nats, image by image: the criteria ``kl``, ``ce`` and ``heart``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesper.curvature import (
    Batch,
    CrossEntropy,
    DenseKL,
    Hessian,
    Randomness,
    diagonal,
    fisher_diagonal,
    gradient,
    quadratic_scores,
)
from hesper.errors import UsageError
from hesper.graft import CURVATURE
from hesper.heart.gated import HEAD_GATES, HEAD_SHIFTS, TOKEN_GATES, TOKEN_SHIFTS, gated_forward
from hesper.heart.lenses import gated_lens
from hesper.hosts import Host
from hesper.kinds import check_kinds
from hesper.registry import did_you_mean


@dataclass(frozen=True)
class Criterion:
    """Which loss and which curvature price a cut.

    * ``kl``: KL(dense || cut) at temperature T, label-free. Its gradient at the dense model is zero and its Hessian the Fisher
      matrix, so the price is half the Fisher diagonal of the gates.
    * ``ce``: cross-entropy with labels; the gradient term stays: -g_i + H_ii / 2 of the gates.
    * ``heart``: half of the HEART-ViT score z^T H_z z of the activation z (arXiv 2512.20120), cross-entropy with labels.

    ``draws`` counts Fisher samples (``kl``) or random probes (``ce``, ``heart``).
    """

    name: str = "kl"
    temperature: float = 4.0
    draws: int = 3

    def __post_init__(self) -> None:
        """Refuse unknown names and impossible numbers."""
        check_kinds(self, "criterion's")
        if self.name not in CURVATURE:
            raise UsageError(f"There is no criterion '{self.name}'; {did_you_mean(self.name, CURVATURE)}")
        if not 0 < self.temperature < math.inf or self.draws < 1:
            raise UsageError("A criterion needs a finite temperature above 0 and at least one draw.")

    @property
    def needs_labels(self) -> bool:
        """Whether the calibration images must have labels."""
        return self.name != "kl"


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Prices in nats per image: ``tokens`` ``[images, depth, patches]`` and ``heads`` ``[images, depth, heads]``.

    ``tokens[n, l, i]`` is the price of deleting patch i after the attention of block l, ``heads[n, l, h]`` of removing head h of
    block l. The standard errors are over draws, NaN for a single one.
    """

    tokens: Tensor
    heads: Tensor
    tokens_stderr: Tensor
    heads_stderr: Tensor


@dataclass(frozen=True, eq=False)
class StreamCurvature:
    """Gauss-Newton curvature of the loss in the token stream after each block's attention.

    ``second_moment`` ``[depth, width, width]`` is the sum over images and patches of every token's own curvature block;
    ``strength`` ``[images, depth, patches]`` the trace of that block. ``heads`` ``[images, depth, heads]`` (where asked for) is the
    price of every head on the same draws.
    """

    second_moment: Tensor
    strength: Tensor
    heads: Tensor | None = None


def sensitivity(host: Host, batch: Batch, criterion: Criterion, generator: Randomness) -> Sensitivity:
    """Prices of deleting every patch after every block and of removing every head, for each image of ``batch``.

    Raises:
        UsageError: the criterion needs labels and the batch has none.
    """
    if criterion.name == "heart":
        return _activation_scores(host, batch, criterion, generator)
    gates = (TOKEN_GATES, HEAD_GATES)
    if criterion.name == "kl":
        lens = gated_lens(host, len(batch.images), DenseKL(criterion.temperature), *gates, like=batch.images)
        fisher = fisher_diagonal(lens, [batch], criterion.draws, generator)
        half, error = fisher.mean, fisher.stderr
        return Sensitivity(half[TOKEN_GATES] / 2, half[HEAD_GATES] / 2, error[TOKEN_GATES] / 2, error[HEAD_GATES] / 2)
    lens = gated_lens(host, len(batch.images), CrossEntropy(), *gates, like=batch.images)
    slope = gradient(lens, [batch])
    bend = diagonal(Hessian(lens, [batch], keep_graph=True), criterion.draws, generator)
    price = {name: -slope[name] + bend.mean[name] / 2 for name in gates}
    return Sensitivity(price[TOKEN_GATES], price[HEAD_GATES], bend.stderr[TOKEN_GATES] / 2, bend.stderr[HEAD_GATES] / 2)


def head_prices(host: Host, batch: Batch, criterion: Criterion, generator: Randomness) -> Tensor:
    """Prices of removing every head for each image, ``[images, depth, heads]``: half the Fisher diagonal of its gate.

    Raises:
        UsageError: the criterion is not ``kl``.
    """
    check_prices_heads(criterion)
    lens = gated_lens(host, len(batch.images), DenseKL(criterion.temperature), HEAD_GATES, like=batch.images)
    return fisher_diagonal(lens, [batch], criterion.draws, generator).mean[HEAD_GATES] / 2


def check_prices_heads(criterion: Criterion) -> None:
    """UsageError for criteria under which the price of a head on a single image may be negative: gates predict its logarithm."""
    if criterion.name != "kl":
        raise UsageError(
            f"Under the criterion '{criterion.name}' a head may cost less than nothing on an image, and heads that adapt go by the "
            "logarithm of their price; use the criterion 'kl', or --heads static."
        )


def stream_curvature(host: Host, batch: Batch, criterion: Criterion, generator: Randomness, *, with_heads: bool = False) -> StreamCurvature:
    """The stream's curvature under a criterion: Fisher samples (``kl``), label gradients (``ce``), or isotropic (``heart``).

    For ``heart`` the score z^T H z of a token is spread evenly over directions: its block is (z^T H z / |z|^2) times the identity.
    The prices of heads come out of the same backward passes; UsageError where the criterion does not price them.
    """
    if with_heads:
        check_prices_heads(criterion)
    if criterion.name == "heart":
        return _isotropic(host, batch, criterion, generator)
    loss = DenseKL(criterion.temperature) if criterion.name == "kl" else CrossEntropy()
    names = (TOKEN_SHIFTS, HEAD_GATES) if with_heads else (TOKEN_SHIFTS,)
    lens = gated_lens(host, len(batch.images), loss, *names, like=batch.images)
    point = {name: lens.at[name].requires_grad_() for name in names}
    with torch.enable_grad():
        logits = lens.logits(point, batch)
        if criterion.name == "kl":
            starts = list(loss.sample_output_gradients(logits, criterion.draws, generator))
        else:
            (start,) = torch.autograd.grad(loss.per_image(logits, batch).sum(), logits, retain_graph=True)
            starts = [start]
        total: StreamCurvature | None = None
        for index, start in enumerate(starts):
            slopes = torch.autograd.grad(logits, list(point.values()), start, retain_graph=index + 1 < len(starts))
            heads = slopes[1].square() / (2 * len(starts)) if with_heads else None
            total = _accumulate(total, slopes[0][:, :, host.anatomy.prefix_tokens :], heads, len(starts))
    assert total is not None
    return total


def _accumulate(total: StreamCurvature | None, slope: Tensor, heads: Tensor | None, draws: int) -> StreamCurvature:
    """Add one draw: outer products per block by one matrix product, squared norms per token."""
    rows = slope.transpose(0, 1).flatten(1, 2)
    moment, strength = rows.transpose(1, 2) @ rows / draws, slope.square().sum(-1) / draws
    if total is None:
        return StreamCurvature(moment, strength, heads)
    heads = None if heads is None or total.heads is None else total.heads + heads
    return StreamCurvature(total.second_moment + moment, total.strength + strength, heads)


def _activation_scores(host: Host, batch: Batch, criterion: Criterion, generator: Randomness) -> Sensitivity:
    with torch.no_grad():
        trace = gated_forward(host, batch.images)
    streams = torch.stack(trace.streams, 1).detach()
    # The prefix is never cut; leaving it out of the probe spares its cross terms.
    streams[:, :, : host.anatomy.prefix_tokens] = 0
    outputs = torch.stack(trace.head_outputs, 1).detach()
    tokens, tokens_error = (
        t[:, :, host.anatomy.prefix_tokens :] / 2 for t in _scores(host, batch, criterion, generator, TOKEN_SHIFTS, streams)
    )
    heads, heads_error = (t / 2 for t in _scores(host, batch, criterion, generator, HEAD_SHIFTS, outputs))
    return Sensitivity(tokens, heads, tokens_error, heads_error)


def _scores(host: Host, batch: Batch, criterion: Criterion, generator: Randomness, name: str, activations: Tensor) -> tuple[Tensor, Tensor]:
    """z^T H_z z of every activation of one kind, with its standard error."""
    lens = gated_lens(host, len(batch.images), CrossEntropy(), name, like=batch.images)
    scores = quadratic_scores(Hessian(lens, [batch], keep_graph=True), {name: activations}, 3, criterion.draws, generator)
    return scores.mean[name], scores.stderr[name]


def _isotropic(host: Host, batch: Batch, criterion: Criterion, generator: Randomness) -> StreamCurvature:
    prefix, width = host.anatomy.prefix_tokens, host.anatomy.width
    with torch.no_grad():
        streams = torch.stack(gated_forward(host, batch.images).streams, 1)[:, :, prefix:]
    tokens = 2 * sensitivity(host, batch, criterion, generator).tokens
    per_direction = (tokens / streams.square().sum(-1)).clamp_min(0)
    eye = torch.eye(width, dtype=streams.dtype, device=streams.device)
    return StreamCurvature(per_direction.sum((0, 2))[:, None, None] * eye, per_direction * width)
