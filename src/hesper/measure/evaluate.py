"""Paired evaluation: the cut model against the dense one on the same images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from hesper.curvature import Batch
from hesper.errors import JobError, UsageError
from hesper.graft import GraftedViT
from hesper.plan import Estimate

Column = NDArray[np.float64]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """Per-image outcomes, ``[images]`` each: drift in nats, agreement, MACs, and with labels the dense and cut models' hits and losses.

    ``tokens`` ``[images, depth]`` counts those fed to each block's MLP (where unread tokens are skipped, the last is the prefix alone),
    ``heads`` ``[images, depth]`` those that each block ran; ``seconds`` is the time the cut model alone took; ``files`` names the images
    where the batches do.
    """

    drift_kl: Column
    agreement: Column
    macs: Column
    tokens: NDArray[np.int64]
    heads: NDArray[np.int64]
    macs_dense: int
    top1: Column | None
    top5: Column | None
    loss: Column | None
    dense_top1: Column | None
    dense_loss: Column | None
    seconds: float
    files: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.drift_kl)

    @property
    def kept_macs(self) -> Estimate:
        """Share of the dense model's MACs."""
        return estimate(self.macs / self.macs_dense)

    def summary(self) -> dict[str, float | int | None]:
        """Flat figures, as ``hesper eval --json`` prints them; what needs labels is None without them."""
        labelled = {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "dense_top1": self.dense_top1,
            "dense_loss": self.dense_loss,
        }
        change = None if self.top1 is None or self.dense_top1 is None else estimate(self.top1 - self.dense_top1)
        drift, agreement = estimate(self.drift_kl), estimate(self.agreement)
        return {
            "n": self.n,
            **{name: None if column is None else float(column.mean()) for name, column in labelled.items()},
            "top1_change": None if change is None else change.mean,
            "top1_change_stderr": None if change is None else change.stderr,
            "agreement": agreement.mean,
            "agreement_stderr": agreement.stderr,
            "drift_kl": drift.mean,
            "drift_kl_stderr": drift.stderr,
            "macs_mean": float(self.macs.mean()),
            "macs_min": int(self.macs.min()),
            "macs_max": int(self.macs.max()),
            "macs_dense": self.macs_dense,
            "macs_ratio": float(self.macs.mean()) / self.macs_dense,
            "seconds": self.seconds,
        }


def estimate(column: Column) -> Estimate:
    """Mean of a column with its standard error (zero for a single image)."""
    n = len(column)
    error = float(column.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return Estimate(float(column.mean()), error, n)


@dataclass(frozen=True, eq=False)
class Share:
    """What one pass over some of the images found, image by image: columns, tokens and heads as in :class:`Evaluation`.

    ``places`` are the images' positions among all images; without images there are no columns.
    """

    columns: Mapping[str, Column]
    tokens: NDArray[np.int64]
    heads: NDArray[np.int64]
    places: NDArray[np.int64]
    files: tuple[str, ...]
    macs_dense: int
    seconds: float


def dense_logits(dense: nn.Module, batches: Iterable[Batch], progress: Progress | None = None) -> list[Tensor]:
    """The dense model's logits batch by batch, for :func:`evaluate` on the same batches as often as needed."""
    out = []
    with torch.inference_mode():
        for batch in batches:
            out.append(dense(batch.images))
            if progress:
                progress(len(batch.images))
    return out


def evaluate(
    cut: GraftedViT, dense: nn.Module | Sequence[Tensor], batches: Iterable[Batch], progress: Progress | None = None
) -> Evaluation:
    """Run both models over the batches and compare them image by image.

    Drift is KL(dense || cut) of the predicted distributions at temperature 1, in nats. Instead of the dense model its logits on
    the same batches may be given.

    Raises:
        UsageError: there are no images.
        JobError: a logit is not finite.
    """
    return join([measure(cut, dense, batches, progress)])


@torch.inference_mode()
def measure(cut: GraftedViT, dense: nn.Module | Sequence[Tensor], batches: Iterable[Batch], progress: Progress | None = None) -> Share:
    """:func:`evaluate` for a share of the images; :func:`join` makes an evaluation of all shares."""
    columns: dict[str, list[Tensor]] = {}
    tokens: list[NDArray[np.int64]] = []
    heads: list[NDArray[np.int64]] = []
    files: list[str] = []
    places: list[int] = []
    seconds = 0.0
    for index, batch in enumerate(batches):
        expected = dense(batch.images) if isinstance(dense, nn.Module) else dense[index].to(batch.images.device)
        _settle(batch.images)
        started = time.perf_counter()
        outcome = cut.run(batch.images)
        _settle(outcome.logits)
        seconds += time.perf_counter() - started
        for name, column in _compare(outcome.logits, expected, batch.labels).items():
            columns.setdefault(name, []).append(column.double().cpu())
        columns.setdefault("macs", []).append(torch.from_numpy(outcome.macs).double())
        tokens.append(outcome.traffic.fed)
        heads.append(outcome.traffic.heads)
        files += getattr(batch, "files", ())
        places += getattr(batch, "places", ()) or range(len(places), len(places) + len(batch.images))
        if progress:
            progress(len(batch.images))
    whole = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    none = np.zeros((0, cut.plan.model.anatomy.depth), np.int64)
    fed, used = (np.concatenate(counts) if counts else none for counts in (tokens, heads))
    return Share(whole, fed, used, np.array(places, np.int64), tuple(files), cut.dense_macs, seconds)


def join(shares: Sequence[Share]) -> Evaluation:
    """The evaluation of all images, in their order, from shares measured apart; UsageError without images.

    The shares' processes work at the same time, so ``seconds`` is the longest share's.
    """
    full = [share for share in shares if len(share.places)]
    if not full:
        raise UsageError("There are no images to evaluate; give a folder with images.")
    order = np.argsort(np.concatenate([share.places for share in full]), kind="stable")
    whole = {name: np.concatenate([share.columns[name] for share in full])[order] for name in full[0].columns}
    files = [file for share in full for file in share.files]
    return Evaluation(
        drift_kl=whole["drift_kl"],
        agreement=whole["agreement"],
        macs=whole["macs"],
        tokens=np.concatenate([share.tokens for share in full])[order],
        heads=np.concatenate([share.heads for share in full])[order],
        macs_dense=full[0].macs_dense,
        **{name: whole.get(name) for name in ("top1", "top5", "loss", "dense_top1", "dense_loss")},
        seconds=max(share.seconds for share in full),
        files=tuple(files[index] for index in order) if files else (),
    )


def _settle(tensor: Tensor) -> None:
    """Wait until the device has caught up, so that the clock sees its work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _compare(logits: Tensor, expected: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    if not bool(torch.isfinite(logits).all() and torch.isfinite(expected).all()):
        raise JobError("A logit is not finite; check the weights for NaN and the images for impossible values.")
    drift = kl_div(logits.log_softmax(1), expected.log_softmax(1), reduction="none", log_target=True).sum(1)
    out = {"drift_kl": drift.clamp_min(0), "agreement": (logits.argmax(1) == expected.argmax(1)).float()}
    if labels is not None:
        if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise UsageError(f"A label lies outside the model's {logits.shape[1]} classes; give the class map that belongs to the model.")
        out["top1"] = (logits.argmax(1) == labels).float()
        out["top5"] = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1).float()
        out["loss"] = cross_entropy(logits, labels, reduction="none")
        out["dense_top1"] = (expected.argmax(1) == labels).float()
        out["dense_loss"] = cross_entropy(expected, labels, reduction="none")
    return out
