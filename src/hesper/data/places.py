"""Images wherever the user says they are: a folder, tar shards or a Hugging Face data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hesper.data.folder import class_folders, open_folder
from hesper.data.images import ImageSet, Transform
from hesper.data.tables import is_table, open_table
from hesper.data.tars import open_tars, shards

__all__ = ["open_images"]


def open_images(where: str | Path, *, transform: Transform, class_map: Sequence[str] | None, labelled: bool | None) -> ImageSet:
    """The images at ``where``: a folder, ``shards/{0000..0003}.tar``, a folder of tars, or ``hfds:NAME[:SPLIT]``.

    ``labelled`` None finds out whether there are labels. UsageError says what is wrong with the place.
    """
    if is_table(where):
        return open_table(where, transform=transform, class_map=class_map, labelled=labelled)
    if (files := shards(where)) is not None:
        return open_tars(files, os.fspath(where), transform=transform, class_map=class_map, labelled=labelled)
    if labelled is None:
        labelled = Path(where).is_dir() and bool(class_folders(Path(where)))
    return open_folder(where, transform=transform, class_map=class_map, labelled=labelled)
