"""Runs and ToMe on the calibration images that verified the runs: images that no choice of the search's constants looked at.

    python benchmarks/verified.py --data DATA --runs RUN RUN --book benchmarks/results/criteria.jsonl

A run's own figures stand in its plan; ToMe takes the counts that the book of all criteria places for the same budget.
"""

from __future__ import annotations

from common import MODELS, Book, Place, arguments_for_runs, say
from criteria import BATCH, family

from hesper.data import batches, split
from hesper.graft import graft
from hesper.heart.prune import FIT_SHARE, MOST_FIT_IMAGES
from hesper.measure.evaluate import dense_logits, evaluate
from hesper.runs import open_run


def main() -> None:
    options = arguments_for_runs(__doc__.splitlines()[0])
    place, book = Place(options.data), Book(options.book)
    for run in options.runs:
        plan = open_run(run).plan
        key = next(key for key, (name, _) in MODELS.items() if name == plan.model.name)
        model = place.model(key)
        images = place.images("calib", model)
        fit, rest = split(images, (FIT_SHARE, 1 - FIT_SHARE), plan.provenance.seed)
        fitted = {images.digests[index] for index in fit[:MOST_FIT_IMAGES]}
        verify = [index for index in rest if images.digests[index] not in fitted]
        rows = [row for name, row in book.rows.items() if name.startswith(f"{key} | tome |")]
        near = min(rows, key=lambda row: abs(row["target"] - plan.budget.value))
        tome = graft(model.host.module, family(model, "tome")(near["dial"]), {})
        dense = dense_logits(model.host.module, batches(images, BATCH, indices=verify))
        theirs = evaluate(tome, dense, batches(images, BATCH, indices=verify)).summary()
        ours = plan.measured
        assert ours is not None and ours.drift_kl.n == theirs["n"]
        say(
            f"{run.name}: {ours.macs.mean:.3f} {ours.drift_kl.mean:.4f} +- {ours.drift_kl.stderr:.4f} {ours.agreement.mean:.3f}; "
            f"ToMe {theirs['macs_ratio']:.3f} {theirs['drift_kl']:.4f} +- {theirs['drift_kl_stderr']:.4f} {theirs['agreement']:.3f}"
        )


if __name__ == "__main__":
    main()
