"""Ward's linkage of packed tokens in rounds: cheap pairs merge, what they became is priced again, cheap pairs merge again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesper.graft.decision import Decision, grouped_mean
from hesper.graft.even import EvenDecision
from hesper.graft.layout import Layout
from hesper.graft.tokens import cheapest, in_steps, ward_prices
from hesper.plan import TokenCut


@dataclass(frozen=True, eq=False)
class Points:
    """Packed tokens as pricing sees them.

    ``place`` ``[rows, rank]`` is where they lie in coordinates in which a squared distance is a loss in nats, ``size`` ``[rows]`` how many
    patches each stands for, ``log_weight`` ``[rows]`` the logarithm of how much a displacement of it matters.
    """

    place: Tensor
    size: Tensor
    log_weight: Tensor
    layout: Layout

    def prices(self) -> tuple[Tensor, Tensor]:
        """Nats of merging each source ``[images, sources]`` into its cheapest destination, and that patch."""
        place, size, weight = (self.layout.padded(own) for own in (self.place, self.size, self.log_weight.exp()))
        return ward_prices(place, size, weight, self.layout.gaps)

    def merged(self, decision: Decision | EvenDecision) -> Points:
        """What a decision leaves: every group at its mean, its weight the geometric mean."""
        both, size = grouped_mean(torch.cat([self.place, self.log_weight[:, None]], 1), self.size, decision)
        return Points(both[:, :-1], size, both[:, -1], self.layout.with_counts(decision.left))


def link(points: Points, cut: TokenCut, rounds: int) -> Decision | EvenDecision:
    """Merge odd into even tokens where that is cheap, and again what is left, ``rounds`` times.

    Alternate tokens are sources and destinations, so that one round takes at most every other token and half of all pairs are never
    compared; what is left stands in another order of odd and even, so the next round compares others. A count is shared out
    over the rounds, a threshold and its multiple hold for each.
    """
    if cut.remove is not None and points.layout.rectangular:
        return _link_evenly(points, [share(cut.remove, number, rounds) for number in range(rounds)])
    whole: Decision | None = None
    for number in range(rounds):
        price, to = points.prices()
        layout = points.layout
        go = cheapest(price, threshold=cut.threshold, remove=None if cut.remove is None else share(cut.remove, number, rounds))
        if layout.gaps is not None:
            go &= layout.valid[:, 1::2]
        go = in_steps(go, price, layout.lengths, cut.multiple)
        decision = paired(go, to, layout, first=1, step=2)
        whole = decision if whole is None else whole.then(decision)
        if decision.nothing:
            break
        if number + 1 < rounds:
            points = points.merged(decision)
    assert whole is not None
    return whole


def _link_evenly(points: Points, shares: list[int]) -> EvenDecision:
    """The same where all images have equally many tokens and lose ``shares`` of them, round by round."""
    whole: EvenDecision | None = None
    for number, remove in enumerate(shares):
        price, to = points.prices()
        decision = evenly_paired(price, to, remove, points.layout, first=1, step=2)
        whole = decision if whole is None else whole.then(decision)
        if decision.nothing or number + 1 == len(shares):
            break
        points = points.merged(decision)
    assert whole is not None
    return whole


def evenly_paired(price: Tensor, to: Tensor | None, remove: int, layout: Layout, first: int = 0, step: int = 1) -> EvenDecision:
    """The ``remove`` cheapest candidates of each image, which are the patches ``first``, ``first + step``, ...; as :func:`paired`."""
    images, tokens, prefix = len(layout.counts), layout.counts[0], layout.prefix
    order = price.topk(min(remove, price.shape[-1]), dim=-1, largest=False, sorted=False).indices

    def rows(places: Tensor, shift: int) -> Tensor:
        return (places + torch.arange(shift, shift + layout.rows, tokens, device=places.device)[:, None]).flatten()

    into = None if to is None else rows(to.gather(1, order), prefix)
    return EvenDecision(images, tokens, rows(order * step, prefix + first), into, (layout.counts,))


def paired(go: Tensor, to: Tensor | None, layout: Layout, first: int = 0, step: int = 1) -> Decision:
    """From a mask over candidates ``[images, candidates]``, which are the patches ``first``, ``first + step``, ..., to rows.

    ``to`` ``[images, candidates]`` is the patch each would merge into, None for drops.
    """
    # An accelerator is waited for here and nowhere else in a round: what follows from the mask is worked out on the host.
    image, candidate = go.cpu().numpy().nonzero()
    start = (np.asarray(layout.bounds) + layout.prefix)[image]
    gone = start + candidate * step + first
    counts = np.bincount(image, minlength=len(go)).tolist()
    left = tuple(count - out for count, out in zip(layout.counts, counts, strict=True))
    into = None if to is None else start + to.cpu().numpy()[image, candidate]
    return Decision(layout.rows, gone, into, left, (layout.counts,), device=layout.device)


def share(remove: int, number: int, rounds: int) -> int:
    """How many of ``remove`` tokens go in round ``number``, the earlier rounds taking what does not divide.

    >>> [share(7, number, 3) for number in range(3)]
    [3, 2, 2]
    """
    return remove // rounds + (number < remove % rounds)


def most_removed(patches: int, rounds: int) -> int:
    """The most of ``patches`` tokens that can go in equal shares, of which none may exceed half of what its round finds.

    >>> most_removed(12, 1), most_removed(12, 2)
    (6, 8)
    """
    return rounds * (patches // (rounds + 1))
