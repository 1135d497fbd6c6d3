"""The family of plans one dial runs through, from harmless to aggressive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from hesper.cost import head_macs, token_macs
from hesper.heart.fit import Atlas, Tables
from hesper.plan import Anatomy, Combine, HeadCut, HeadGate, Plan, TokenCut

Counts = Literal["adaptive", "fixed"]
Heads = Literal["none", "static", "adaptive"]
Stages = Literal[
    "once-first",
    "once-early",
    "once",
    "third-early",
    "third-middle",
    "alternate-early",
    "alternate-middle",
    "alternate",
    "every-early",
    "every",
]
ONCE = 1 << 20  # a step out of every model
# Step from one deciding block to the next, and the shares of the depth where deciding begins and ends.
STAGES: dict[Stages, tuple[int, float, float]] = {
    "once-first": (ONCE, 0.0, 1 / 2),
    "once-early": (ONCE, 1 / 12, 1 / 2),
    "once": (ONCE, 1 / 6, 1 / 2),
    "third-early": (3, 1 / 12, 1 / 2),
    "third-middle": (3, 1 / 4, 2 / 3),
    "alternate-early": (2, 0.0, 2 / 3),
    "alternate-middle": (2, 1 / 6, 3 / 4),
    "alternate": (2, 0.0, 5 / 6),
    "every-early": (1, 0.0, 2 / 3),
    "every": (1, 0.0, 5 / 6),
}
# Sets that decide once or rarely are for devices on which a decision takes as long as a block.
RARE: tuple[Stages, ...] = ("once-first", "once-early", "once", "third-early")
# Where a decision matches in more than one round, deciding in every block gains nothing over every other one.
SPARSE: tuple[Stages, ...] = ("third-middle", "alternate-early", "alternate-middle", "alternate")
# What a decision on tokens and each of its rounds of matching take: shares of ViT-Tiny's dense time in batches of 32 on two cores.
# A wider model spends more on everything else, and a deeper one is run through more blocks. A gate is charged like a decision.
DECISION_TIME, ROUND_TIME, WIDTH, DEPTH = 0.007, 0.0035, 192, 12
LARGEST_MULTIPLE, FEWEST_STEPS = 16, 24


@dataclass(frozen=True, eq=False)
class Family:
    """Plans indexed by a dial in nats: a token leaves where its price is below the dial, a head where its price per MAC is.

    Heads that adapt sit out image by image where static ones leave for all.

    ``blank`` is the plan without cuts; ``blocks`` are those that let tokens go; ``atlas`` holds the head prices, ``tables`` what pricing
    tokens needs. With fixed counts or a symmetric schedule, ``calibrated`` turns the dial into cuts by looking at calibration images.
    Counts that adapt are multiples of ``multiple``.
    """

    name: str
    blank: Plan
    blocks: tuple[int, ...]
    combine: Combine
    heads: Heads
    atlas: Atlas
    tables: Tables
    calibrated: Callable[[Plan], tuple[TokenCut, ...]] | None = None
    multiple: int = 1

    def at(self, dial: float) -> Plan:
        """The family's member at ``dial`` nats."""
        tokens = tuple(TokenCut(block, self.combine, threshold=dial, multiple=self.multiple) for block in self.blocks)
        gates = self.head_gates(dial)
        plan = replace(self.blank, tokens=tokens, heads=self.head_cuts(dial), gates=gates, dial=dial if tokens or gates else None)
        if self.calibrated is None:
            return plan
        cuts = self.calibrated(plan)
        return replace(plan, tokens=cuts, dial=dial if gates or any(cut.threshold is not None for cut in cuts) else None)

    @property
    def decisions(self) -> int:
        """How many times an image is decided on, on tokens and on heads."""
        return len(self.blocks) + len(self.head_gates(1.0))

    @property
    def rounds(self) -> int:
        """Rounds of matching of each decision on tokens."""
        return 1 if self.blank.pricing is None or self.combine == "drop" else self.blank.pricing.rounds

    @property
    def deciding_time(self) -> float:
        """What deciding takes, as a share of the dense model's time: many small steps and memory traffic, which MACs do not show."""
        return self._deciding_time(self.decisions, self.rounds * len(self.blocks))

    @property
    def gating_time(self) -> float:
        """The part of it that decisions on heads take."""
        return self._deciding_time(self.decisions - len(self.blocks), 0)

    def _deciding_time(self, decisions: int, rounds: int) -> float:
        anatomy = self.blank.model.anatomy
        return (DECISION_TIME * decisions + ROUND_TIME * rounds) * WIDTH / anatomy.width * DEPTH / anatomy.depth

    def head_cuts(self, dial: float) -> tuple[HeadCut, ...]:
        """Heads whose price per MAC is below that of the dearest token cut: dial / MACs a token saves on average."""
        if self.heads != "static":
            return ()
        return affordable_heads(self.atlas.heads, self.blank.model.anatomy, self._price_per_mac(dial))

    def head_gates(self, dial: float) -> tuple[HeadGate, ...]:
        """A gate in every block, at the price per MAC of the dearest token cut; none where a block has but one head."""
        anatomy = self.blank.model.anatomy
        if self.heads != "adaptive" or anatomy.heads == 1:
            return ()
        limit = self._price_per_mac(dial) * head_macs(anatomy)
        return tuple(HeadGate(block, limit) for block in range(anatomy.depth))

    def _price_per_mac(self, dial: float) -> float:
        anatomy = self.blank.model.anatomy
        return dial / (token_macs(anatomy, self.blocks) if self.blocks else head_macs(anatomy))


def affordable_heads(prices: Tensor, anatomy: Anatomy, price_per_mac: float) -> tuple[HeadCut, ...]:
    """Heads priced below ``price_per_mac`` times the MACs they save; the dearest head of a block always stays.

    Example:
        >>> import torch
        >>> tiny = Anatomy(1, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
        >>> affordable_heads(torch.tensor([[1.0, 0.0, 2.0]]), tiny, 1e-9)
        (HeadCut(block=0, remove=(1,)),)
    """
    limit = price_per_mac * head_macs(anatomy)
    cuts = []
    for block, row in enumerate(prices.tolist()):
        dearest = max(range(len(row)), key=row.__getitem__)
        cheap = tuple(head for head, price in enumerate(row) if price <= limit and head != dearest)
        if cheap:
            cuts.append(HeadCut(block, cheap))
    return tuple(cuts)


def deciding_blocks(anatomy: Anatomy, stages: Stages) -> tuple[int, ...]:
    """The blocks that let tokens go: every, every other or every third one, up to five sixths of the depth, or a single one.

    Where each set begins and ends says :data:`STAGES`. What the last blocks remove saves little and drifts much, what the
    first remove saves most and drifts most; fewer decisions take less time, and each sees more candidates.

    Example:
        >>> tiny = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
        >>> deciding_blocks(tiny, "alternate-middle"), deciding_blocks(tiny, "third-middle")
        ((2, 4, 6, 8), (3, 6))
    """
    step, start, end = STAGES[stages]
    missed = anatomy.depth if anatomy.reads_patches else anatomy.depth - 1  # tokens cut later are missed by nobody
    first, last = (math.floor(anatomy.depth * share + 1e-9) for share in (start, end))
    return tuple(range(first, min(missed, max(first + 1, last)), step))


def steps_of(anatomy: Anatomy) -> int:
    """Of what the counts of tokens should be multiples: the largest power of two up to a 24th of the tokens, at most 16.

    Images of equal counts share a call of attention, but coarse steps let counts adapt less, the more so the fewer blocks decide.

    Example:
        >>> steps_of(Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False))
        8
    """
    return min(LARGEST_MULTIPLE, 1 << max(0, (anatomy.tokens // FEWEST_STEPS).bit_length() - 1))
