"""The command line as a program in which so few images place the dial that small jobs fit again and refine merging, too."""

import hesper.heart.prune
from hesper.cli import main

FEW = 6


def let_small_jobs_refine() -> None:
    hesper.heart.prune.TUNE_IMAGES = hesper.heart.prune.LEAST_FIT_IMAGES = FEW


if __name__ == "__main__":
    let_small_jobs_refine()
    main()
