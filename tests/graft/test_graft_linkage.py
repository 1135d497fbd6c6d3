"""Rounds of matching and their composition, against explicit lists of clusters."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from by_hand import rows_that_leave
from hesper.graft.decision import grouped_mean
from hesper.graft.even import EvenDecision
from hesper.graft.layout import Layout
from hesper.graft.linkage import Points, link, most_removed
from hesper.plan import TokenCut

PREFIX = 1


@st.composite
def streams(draw: st.DrawFn) -> Points:
    """Packed points of a few images, the first row of each a prefix token."""
    patches = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = Layout(tuple(count + PREFIX for count in patches), PREFIX)
    place = torch.randn(layout.rows, 2, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (layout.rows,), generator=generator).double()
    return Points(place, size, torch.randn(layout.rows, generator=generator, dtype=torch.float64), layout)


class Cluster:
    """Rows that became one token, with the mean they have."""

    def __init__(self, rows: list[int], place: Tensor, size: float, log_weight: float) -> None:
        self.rows, self.place, self.size, self.log_weight = rows, place, size, log_weight

    def price(self, other: Cluster) -> float:
        mean = (self.size * self.place + other.size * other.place) / (self.size + other.size)
        return sum(one.size * float(torch.tensor(one.log_weight).exp()) * float((one.place - mean).square().sum()) for one in (self, other))


def round_by_hand(clusters: list[Cluster], threshold: float | None, remove: int | None) -> list[Cluster]:
    """One image's patches after one round."""
    offers = []
    for source in range(1, len(clusters), 2):
        costs = {to: clusters[source].price(clusters[to]) for to in range(0, len(clusters), 2)}
        to = min(costs, key=lambda place: costs[place])
        offers.append((costs[to], source, to))
    taken = [offer for offer in offers if threshold is not None and offer[0] < threshold] or sorted(offers)[: remove or 0]
    gone = {source for _, source, _ in taken}
    out = []
    for place, cluster in enumerate(clusters):
        if place in gone:
            continue
        group = [cluster, *(clusters[source] for _, source, to in taken if to == place)]
        size = sum(one.size for one in group)
        mean = sum((one.size * one.place for one in group), torch.zeros(2, dtype=torch.float64)) / size
        log_weight = sum(one.size * one.log_weight for one in group) / size
        # Everyone follows the destination's first row, which is the one that stays.
        out.append(
            Cluster([cluster.rows[0], *(row for one in group for row in one.rows if row != cluster.rows[0])], mean, size, log_weight)
        )
    return out


@given(streams(), st.integers(1, 4), st.sampled_from([("threshold", 0.3), ("threshold", 2.0), ("remove", 1), ("remove", 5)]))
def test_rounds_are_rounds_of_ward_clustering(points: Points, rounds: int, how: tuple[str, float]) -> None:
    threshold, remove = (how[1], None) if how[0] == "threshold" else (None, int(how[1]))
    decision = link(points, TokenCut(0, "merge", threshold=threshold, remove=remove), rounds)
    fate = rows_that_leave(decision)
    for image, count in enumerate(points.layout.counts):
        first = points.layout.bounds[image] + PREFIX
        clusters = [
            Cluster([row], points.place[row], float(points.size[row]), float(points.log_weight[row]))
            for row in range(first, first + count - PREFIX)
        ]
        for number in range(rounds):
            share = None if remove is None else remove // rounds + (number < remove % rounds)
            clusters = round_by_hand(clusters, threshold, share)
        expected = {row: cluster.rows[0] for cluster in clusters for row in cluster.rows[1:]}
        assert {row: to for row, to in fate.items() if first <= row < first + count - PREFIX} == expected
        assert decision.left[image] == len(clusters) + PREFIX
    assert isinstance(decision, EvenDecision) == (remove is not None and points.layout.rectangular)
    assert not set(fate.values()) & set(fate)
    assert decision.entered[0] == points.layout.counts and 1 <= len(decision.entered) <= rounds


@given(streams(), st.sampled_from([0.3, 2.0]))
def test_composed_decisions_keep_means_and_sizes(points: Points, threshold: float) -> None:
    """Means and sizes of two decisions at once are those of one after the other."""
    cut = TokenCut(0, "merge", threshold=threshold)
    first = link(points, cut, 1)
    after = points.merged(first)
    second = link(after, cut, 1)
    place, size = grouped_mean(points.place, points.size, first.then(second))
    expected, mass = grouped_mean(after.place, after.size, second)
    torch.testing.assert_close(place, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(size, mass) and size.sum() == points.size.sum()


@given(streams(), st.integers(1, 4))
def test_the_most_that_equal_shares_can_remove_goes(points: Points, rounds: int) -> None:
    fewest = min(points.layout.counts) - PREFIX
    for remove in range(most_removed(fewest, rounds) + 1):
        decision = link(points, TokenCut(0, "merge", remove=remove), rounds)
        assert [count - left for count, left in zip(points.layout.counts, decision.left, strict=True)] == [remove] * len(decision.left)
