"""Metric and router fitted again, on the trajectory of the cut model itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hesper.curvature import Batch, DenseKL, image_generators
from hesper.errors import JobError
from hesper.graft import graft
from hesper.graft.deciders import State
from hesper.graft.watch import Watched
from hesper.heart.criteria import Criterion
from hesper.heart.fit import SMALLEST, Tables, block_tables
from hesper.heart.ridge import Ridge
from hesper.hosts import Host
from hesper.plan import Plan


class RefitSums:
    """Running sums of the token curvature along a cut model's own trajectory; memory does not grow with the number of images.

    What merging a token costs depends on what has merged before it and will after it. So each block's metric and router are fitted
    once more on what the block sees where all other blocks let go what the plan says: with slopes g of log p_c at the tokens
    there, c drawn from the cut model's own softmax at the criterion's temperature, and sizes s,

        M = sum g g^T / s  /  sum s,        log w = router(token)  fitted to  log(|g|^2 / s) - log tr M,

    which on the dense trajectory, where all sizes are 1, is what :class:`~hesper.heart.fit.FitSums` fits. A token of size s is the mean
    of s patches and moving it moves them all, so Ward's linkage prices it s times; g g^T / s is what makes that right. Under M stands
    the number of patches, not of tokens, so w is the mean size on average: a gamma below 1 then makes merging where much has merged
    cheaper by (mean size)^(gamma - 1). Measured, that is as good as the number of tokens or better (docs/findings.md).

    Args:
        host: the dense model.
        plan: with merges priced in the curvature metric under the criterion ``kl``.
        tables: by which the plan decides.
        criterion: with temperature and draws.
        generator: for the draws.
    """

    def __init__(self, host: Host, plan: Plan, tables: Tables, criterion: Criterion, generator: torch.Generator) -> None:
        self.anatomy, self.start, self.criterion, self.generator = host.anatomy, tables, criterion, generator
        self.cut = Watched(graft(host.module, plan, tables.tensors, check_weights=False))
        self.blocks = tuple(cut.block for cut in plan.tokens)
        gone = {cut.block: cut.remove for cut in plan.heads}
        self.heads = {block: [head for head in range(self.anatomy.heads) if head not in gone.get(block, ())] for block in self.blocks}
        width = self.anatomy.width
        self.moment = {block: torch.zeros(width, width, dtype=torch.float64) for block in self.blocks}
        self.covariance = {block: torch.zeros(width, width, dtype=torch.float64) for block in self.blocks}
        self.size = {block: torch.zeros((), dtype=torch.float64) for block in self.blocks}
        self.routers = {block: Ridge(width + self.anatomy.heads) for block in self.blocks}

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, float64 on the CPU: what another process adds to them counts."""
        out = dict[str, Tensor]()
        for block in self.blocks:
            own = {"moment": self.moment, "covariance": self.covariance, "size": self.size}
            out |= {f"{block}.{name}": sums[block] for name, sums in own.items()} | {f"{block}.router": self.routers[block].moments}
        return out

    def add(self, batch: Batch) -> None:
        """Add a batch, with a pass through the cut model for every block; what is not finite makes the sums so."""
        loss = DenseKL(self.criterion.temperature)
        for block in self.blocks:
            logits, state = self.cut.watch(batch.images, block)
            if not bool(torch.isfinite(logits).all()):  # nothing can be drawn from these
                self.size[block] += torch.nan
                continue
            generators = image_generators(batch.images, self.generator)
            starts = list(loss.sample_output_gradients(logits, self.criterion.draws, generators))
            slopes = [torch.autograd.grad(logits, state.stream, start, retain_graph=start is not starts[-1])[0] for start in starts]
            with torch.no_grad():
                self._add(block, state, slopes)

    def _add(self, block: int, state: State, slopes: list[Tensor]) -> None:
        layout, patch = state.layout, state.layout.places >= state.layout.prefix
        size = state.size[patch, None]
        self.size[block] += size.double().sum().cpu()
        strength = torch.zeros_like(size[:, 0])
        for slope in slopes:
            own = slope[patch] / size.sqrt()
            self.moment[block] += (own.T @ own).double().cpu() / len(slopes)
            strength += own.square().sum(1) / len(slopes)
        image, rows = layout.image[patch], state.stream[patch]
        total, sums = (torch.zeros(len(layout.counts), of.shape[1]).to(of).index_add_(0, image, of) for of in (size, rows * size))
        centred = ((rows - (sums / total)[image]) * size.sqrt()).double().cpu()
        self.covariance[block] += centred.T @ centred
        attention = torch.zeros(len(rows), self.anatomy.heads).to(rows)  # a removed head is seen nowhere, and gets no weight
        attention[:, self.heads[block]] = state.attention[patch].to(rows)
        floor = (SMALLEST * strength.mean()).clamp_min(torch.finfo(strength.dtype).tiny)
        features = torch.cat([state.normed[patch].to(rows), attention], 1)
        self.routers[block].add(features.cpu(), strength.clamp_min(floor).log().cpu())

    def tables(self, rank: int) -> Tables:
        """The tables they started from, with new ones for the blocks that decide; the same where no image was added.

        Raises:
            JobError: a slope was not finite, in whichever process, so that all of them give up alike.
        """
        if not all(bool(torch.isfinite(sums).all()) for sums in self.tensors().values()):
            raise JobError("The curvature along the cut model is not finite; check the model's weights and the images.")
        tensors, explained = dict(self.start.tensors), list(self.start.explained)
        for block in self.blocks:
            if not self.size[block]:
                continue
            sums = self.moment[block] / self.size[block], self.covariance[block] / self.size[block]
            made, explained[block] = block_tables(block, self.routers[block], self.anatomy.width, sums, rank)
            tensors |= made
        return replace(self.start, tensors=tensors, explained=tuple(explained))
