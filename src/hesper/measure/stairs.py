"""A device's own latency over counts of tokens and heads, measured once: a staircase that foretells how long a plan takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hesper.errors import UsageError
from hesper.graft.pieces import Decision, Pieces
from hesper.hosts.open import OpenModel
from hesper.measure.latency import settle
from hesper.plan import ModelRef, Plan

__all__ = ["Parts", "Stairs", "TakeApart", "measure_stairs"]

Seconds = NDArray[np.float64]
ROUNDS, FEWER_ROUNDS = 25, 5
LONG = 0.1  # seconds at all tokens from which on fewer rounds will do
DECIDING = 8  # counts at which decisions are timed
USUAL = 0.7  # of the time at all tokens, that a count takes on average, too high rather than too low
HEADS = 4  # numbers of heads that are timed
LEAST_WARMUP = 1.0  # seconds
LARGEST_MULTIPLE, FEWEST_STEPS = 32, 6
ALIKE = 0.01  # share of a block's time that does not count as a step
SIGMAS = 2.0  # by which edges stand out from the counts between them


@dataclass(frozen=True)
class Stairs:
    """Seconds of a batch of ``batch_size`` images on one device, as a function of how many tokens each image has.

    At ``counts`` of tokens, ascending to all of the model's: ``blocks`` is one block, ``feeds`` its feed-forward half, ``finish`` the
    stream to logits (through the last block where that computes the prefix alone). ``deciding`` says, by rounds of matching, what a
    decision adds at ``deciding_counts``. ``attention`` is the attention half of one block with all tokens and ``heads`` heads. ``begin``
    is images to stream, ``dense`` the dense model. Between counts they are interpolated.
    """

    batch_size: int
    skip_unread: bool
    counts: tuple[int, ...]
    blocks: tuple[float, ...]
    feeds: tuple[float, ...]
    finish: tuple[float, ...]
    deciding_counts: tuple[int, ...]
    deciding: Mapping[str, tuple[float, ...]]
    heads: tuple[int, ...]
    attention: tuple[float, ...]
    begin: float
    dense: float

    def seconds(self, plan: Plan, fed: NDArray[np.int64], heads: NDArray[np.int64]) -> Seconds:
        """What a batch of such images takes, ``[images]``.

        With n_l tokens attending and m_l fed in block l, h_l heads, and D the blocks that decide,

            begin + sum_l [(block(n_l) - feed(n_l)) a(h_l) / a(H) + feed(m_l)] + sum_(l in D) deciding(n_l) + finish(n)

        Args:
            plan: that was run.
            fed: ``[images, depth]`` tokens fed to each block's MLP.
            heads: ``[images, depth]`` heads that each block ran.
        """
        attended = np.concatenate([np.full((len(fed), 1), self.counts[-1]), fed[:, :-1]], axis=1)
        last = fed.shape[1] - 1 if self.skip_unread else fed.shape[1]
        total: Seconds = np.full(len(fed), self.begin)
        used = np.interp(heads, self.heads, self.attention) / self.attention[-1]
        for block in range(last):
            own = self._at(self.blocks, attended[:, block]) - self._at(self.feeds, attended[:, block])
            total += own * used[:, block] + self._at(self.feeds, fed[:, block])
        rounds = str(plan.pricing.rounds) if plan.pricing is not None and str(plan.pricing.rounds) in self.deciding else None
        for cut in plan.tokens:
            if cut.block < last and self.deciding:
                seconds = self.deciding[rounds or next(iter(self.deciding))]
                total += np.interp(attended[:, cut.block], self.deciding_counts, seconds)
        return total + self._at(self.finish, attended[:, -1] if self.skip_unread else fed[:, -1])

    def multiple(self, usual: int) -> int:
        """Of what the counts of images that differ should be multiples: where the edges of the stairs are.

        A count on an edge takes less than the counts on both sides of it would let one expect. From one power of two to the next, the
        multiples of a larger one are taken where they lie lower by another hundredth, beyond noise: coarse steps leave images less
        choice. 1 where there are no stairs, ``usual`` where counts were measured too far apart to see them. In batches of several images
        no less than ``usual``: images of equal counts run together.

        Example:
            >>> flat = (0.0,) * 128
            >>> steps = tuple(float(-(-count // 16)) for count in range(1, 129))
            >>> Stairs(1, True, tuple(range(1, 129)), steps, flat, flat, (1, 128), {}, (1,), (1.0,), 0.0, 1.0).multiple(8)
            16
        """
        counts, seconds = np.array(self.counts), np.array(self.blocks)
        between = 1 + np.flatnonzero(np.diff(counts, 2) == 0)  # those with neighbours as far below as above
        beside = (seconds[between - 1] + seconds[between + 1]) / 2 / seconds[between] - 1
        powers = [1 << power for power in range(LARGEST_MULTIPLE.bit_length()) if 1 << power <= counts[-1] // FEWEST_STEPS]
        edges = {power: counts[between] % power == 0 for power in powers}
        sure = {power: SIGMAS * float(beside[~on].std()) / np.sqrt(max(on.sum(), 1)) for power, on in edges.items() if not on.all()}
        gains = {
            power: gain for power, least in sure.items() if edges[power].any() and (gain := float(beside[edges[power]].mean())) > least
        }
        found, reached = 1 if len(between) > counts[-1] // 3 else usual, 0.0
        for power, gain in sorted(gains.items()):
            if gain >= reached + ALIKE:
                found, reached = power, gain
        return found if self.batch_size == 1 else max(found, usual)

    def landing(self, count: int) -> int:
        """The largest count of tokens that takes no longer than ``count``: on stairs that is the edge of the step.

        Example:
            >>> flat, steps = (0.0,) * 4, (1.0, 3.0, 2.0, 4.0)
            >>> stairs = Stairs(1, True, (10, 15, 16, 20), steps, flat, flat, (10, 20), {}, (1,), (1.0,), 0.0, 1.0)
            >>> stairs.landing(15), stairs.landing(16), stairs.landing(12)
            (16, 16, 12)
        """
        now = float(np.interp(count, self.counts, self.blocks))
        return max(
            (other for other, seconds in zip(self.counts, self.blocks, strict=True) if other > count and seconds <= now), default=count
        )

    def _at(self, seconds: Sequence[float], counts: NDArray[np.int64]) -> Seconds:
        return np.interp(counts, self.counts, seconds)

    def plain(self) -> dict[str, Any]:
        """In plain values; :meth:`of` gives it back."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Stairs:
        """From what :meth:`plain` gave; KeyError, TypeError or ValueError from anything else."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = values[field.name]
            found[field.name] = tuple(value) if isinstance(value, list) else value
        found["deciding"] = {str(rounds): tuple(map(float, each)) for rounds, each in found["deciding"].items()}
        stairs = cls(**found)
        columns = (stairs.blocks, stairs.feeds, stairs.finish)
        if not stairs.counts or any(len(each) != len(stairs.counts) for each in columns) or not 0 < float(stairs.dense) < np.inf:
            raise ValueError("these are no stairs")
        return stairs


class Parts(Protocol):
    """A model's pieces as a runtime has them, on streams of its own kind; as :class:`~hesper.graft.pieces.Pieces`."""

    decision: Decision | None
    skip_unread: bool
    fewest: int  # tokens that a stream may have

    @property
    def depth(self) -> int:
        """Blocks that run on every token."""

    def stream(self, images: int, tokens: int, device: torch.device) -> Any:
        """Noise of so many tokens an image."""

    def fresh(self, stream: Any) -> Any:
        """A stream that may be written to."""

    def begin(self, images: Tensor) -> object:
        """Images to the stream that enters the first block."""

    def dense(self, images: Tensor) -> object:
        """Images to logits through the model before anything is cut."""

    def through(self, stream: Any) -> object:
        """Both halves of every such block, nothing leaving."""

    def feed(self, stream: Any) -> object:
        """The feed-forward halves of the same blocks."""

    def decide(self, stream: Any, lets_go: bool) -> object:
        """One block in the middle, with a decision that lets some patches of each image go, or without any."""

    def finish(self, stream: Any) -> object:
        """The stream to logits."""

    def with_heads(self, heads: int) -> Callable[[Any], object]:
        """As :meth:`through`, of blocks with only so many of their heads."""


TakeApart = Callable[[nn.Module, ModelRef, Decision | None], Parts]
"""Takes a dense model apart, by one way of letting tokens go or for none."""


def measure_stairs(
    model: OpenModel,
    images: Tensor,
    decisions: Sequence[Decision],
    *,
    pieces: TakeApart = Pieces,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> Stairs:
    """Time a model's pieces at as many counts of tokens as ``seconds`` allow, forwards and backwards in turns.

    Every count runs all blocks one after the other, as a forward does, so that their weights come from where they come from then.

    Args:
        model: the dense model, on the device.
        images: a batch ``[images, channels, height, width]`` there.
        decisions: that plans may make on tokens, which differ in rounds alone; none where only heads go.
        pieces: takes the model apart for what is to run it.
        seconds: that it may take, about.
        clock: seconds that only grow.
        progress: told (round, rounds).

    Raises:
        UsageError: decisions differ in more than rounds.
    """
    if len({(each.combine, each.rank, each.adaptive) for each in decisions}) > 1:
        raise UsageError("Stairs are of one way of letting tokens go; measure others on their own.")
    variants = [pieces(model.host.module, model.ref, each) for each in decisions or (None,)]
    with torch.inference_mode():
        return _Walk(variants, model, images, clock).measure(seconds, progress)


class _Walk:
    """Up and down the counts, timing what a model does at each."""

    def __init__(self, variants: Sequence[Parts], model: OpenModel, images: Tensor, clock: Callable[[], float]) -> None:
        self.variants, self.pieces, self.model, self.images, self.clock = variants, variants[0], model, images, clock
        self.full, self.prefix = model.ref.anatomy.tokens, model.ref.anatomy.prefix_tokens
        self.taken: dict[tuple[str, int], list[float]] = {}
        self.streams: dict[int, Any] = {}
        heads = model.ref.anatomy.heads
        grid = sorted({max(1, round(heads * step / HEADS)) for step in range(1, HEADS + 1)})
        self.with_heads = {count: self.pieces.with_heads(count) for count in grid if count < heads and model.host.heads_removable}

    def measure(self, seconds: float, progress: Callable[[int, int], None] | None) -> Stairs:
        """Warm up, choose the counts, walk."""
        settle(
            {"dense": lambda: self.pieces.dense(self.images), "blocks": lambda: self.pieces.through(self._stream(self.full))},
            least_seconds=LEAST_WARMUP,
            synchronise=self._wait,
        )
        counts, rounds = self._counts(seconds)
        deciding = sorted({counts[place * (len(counts) - 1) // (DECIDING - 1)] for place in range(DECIDING)})
        for number in range(rounds):
            for count in counts if number % 2 else reversed(counts):
                self._time_count(count, count in deciding)
            if progress:
                progress(number + 1, rounds)
        depth, found = self.pieces.depth, {key: float(np.median(times)) for key, times in self.taken.items()}
        blocks, feeds = (tuple(found[name, count] / depth for count in counts) for name in ("blocks", "feeds"))
        finish = tuple(found["finish", count] for count in counts)
        heads = (*self.with_heads, self.model.ref.anatomy.heads)
        passes = [found["heads", count] / depth for count in self.with_heads] + [blocks[-1]]
        attention = tuple(each - feeds[-1] for each in passes)
        added = self._added(found, deciding, dict(zip(counts, feeds, strict=True)))
        begin, dense = found["begin", self.full], found["dense", self.full]
        skips = self.pieces.skip_unread
        many = len(self.images)
        return Stairs(many, skips, counts, blocks, feeds, finish, tuple(deciding), added, heads, attention, begin, dense)

    def _counts(self, seconds: float) -> tuple[tuple[int, ...], int]:
        """All counts, or the multiples of two, four and so on, with the fewest and the most; and how many rounds to walk them."""
        for also_deciding in (True, False):  # the first time is not like the others
            started = self.clock()
            self._time_count(self.full, also_deciding)
        whole, least = self.clock() - started, max(self.pieces.fewest, self.prefix + 1)
        self.taken.clear()
        rounds, step = FEWER_ROUNDS if whole > LONG else ROUNDS, 1
        if self.pieces.decision is None:  # no token ever leaves
            return (least, self.full), rounds
        while rounds * whole * USUAL * (self.full - least) / step > seconds and step < self.full // 8:
            step *= 2
        return tuple(sorted({*range(-(-least // step) * step, self.full, step), least, self.full})), rounds

    def _time_count(self, count: int, also_deciding: bool) -> None:
        self._timed("blocks", count, self.pieces.through)
        self._timed("feeds", count, self.pieces.feed)
        self._timed("finish", count, self.pieces.finish)
        if not also_deciding:
            return
        self._timed("begin", self.full, lambda _: self.pieces.begin(self.images))
        self._timed("dense", self.full, lambda _: self.pieces.dense(self.images))
        for heads, through in self.with_heads.items() if count == self.full else ():
            self._timed("heads", heads, through, self.full)
        if not self._leaving(self.pieces, count):
            return
        jobs = {
            f"decided in {each.decision.rounds}": partial(each.decide, lets_go=True) for each in self.variants if each.decision is not None
        }
        for name, job in {**jobs, "undecided": partial(self.pieces.decide, lets_go=False)}.items():
            job(self._stream(count))  # a decision is many small steps, and their code is at hand in a whole run
            self._timed(name, count, job)

    def _leaving(self, pieces: Parts, count: int) -> int:
        return 0 if pieces.decision is None else pieces.decision.leave(count - self.prefix)

    def _timed(self, name: str, key: int, job: Callable[[Any], object], count: int | None = None) -> None:
        stream = self._stream(key if count is None else count)
        self._wait()
        started = self.clock()
        job(stream)
        self._wait()
        self.taken.setdefault((name, key), []).append(self.clock() - started)

    def _stream(self, count: int) -> Any:
        if count not in self.streams:
            self.streams[count] = self.pieces.stream(len(self.images), count, self.images.device)
        return self.pieces.fresh(self.streams[count])

    def _wait(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)

    def _added(self, found: Mapping[tuple[str, int], float], counts: list[int], feeds: Mapping[int, float]) -> dict[str, tuple[float, ...]]:
        """What a decision adds to a block: its time less that without, and less than that by what feeding fewer tokens saves."""
        added = {}
        for pieces in self.variants:
            if pieces.decision is None:
                continue
            seconds = []
            for count in counts:
                if not (gone := self._leaving(pieces, count)):
                    seconds.append(0.0)
                    continue
                saved = feeds[count] - float(np.interp(count - gone, list(feeds), list(feeds.values())))
                seconds.append(max(0.0, found[f"decided in {pieces.decision.rounds}", count] - found["undecided", count] + saved))
            added[str(pieces.decision.rounds)] = tuple(seconds)
        return added
