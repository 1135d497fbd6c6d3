"""Pictures with the fate of their patches: merged groups in their mean colour, dropped patches blank."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hesper.heart.gallery import Gallery
from hesper.plan import Anatomy
from hesper.report.figures import printable
from hesper.report.svg import cell_path, chart, element, tip

__all__ = ["Exhibit", "Stage", "exhibits", "fits", "stages_of"]

QUALITY = 82
MOST_PIXELS = 336  # a picture is shown about 150 pixels wide, on screens of two device pixels each

Pixels = NDArray[np.uint8]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """The picture after one block: patch tokens left, groups of merged patches, patches dropped, and the drawing."""

    block: int
    left: int
    groups: int
    dropped: int
    svg: str


@dataclass(frozen=True)
class Exhibit:
    """One image: its file, the share of the MACs it kept, the classes both models chose, the picture and its stages."""

    file: str
    kept_macs: float
    dense: int
    cut: int
    picture: str
    stages: tuple[Stage, ...]


def fits(gallery: Gallery, anatomy: Anatomy) -> bool:
    """Whether a gallery's tensors and notes belong together and to a model of this shape."""
    images = len(gallery.files)
    maps = (images, anatomy.depth, anatomy.grid[0] * anatomy.grid[1])
    shapes = gallery.pictures.ndim == 4 and gallery.pictures.shape[0] == images and gallery.pictures.shape[3] == 3
    notes = all(len(column) == images for column in (gallery.kept_macs, gallery.dense, gallery.cut))
    return images > 0 and shapes and notes and tuple(gallery.place.shape) == maps


def stages_of(depth: int, skip_unread: bool) -> tuple[int, ...]:
    """The blocks to show: a quarter, half and three quarters of the way, and the last that lets patches go.

    >>> stages_of(12, False), stages_of(12, True), stages_of(2, False)
    ((2, 5, 8, 11), (2, 5, 7, 10), (0, 1))
    """
    through = depth - 1 if skip_unread and depth > 1 else depth
    return tuple(sorted({max(0, int(through * quarter / 4 + 0.5) - 1) for quarter in (1, 2, 3, 4)}))


def exhibits(gallery: Gallery, anatomy: Anatomy, skip_unread: bool, prefix: str) -> tuple[Exhibit, ...]:
    """The gallery's images, from fewest to most MACs; ``prefix`` keeps their ids apart from other runs' on the same page."""
    blocks = stages_of(anatomy.depth, skip_unread)
    order = sorted(range(len(gallery.files)), key=lambda index: gallery.kept_macs[index])
    out = []
    for index in order:
        pixels: Pixels = gallery.pictures[index].numpy()
        name, file = f"{prefix}-{index}", printable(gallery.files[index])
        maps = [gallery.place[index, block].numpy().astype(np.int64) for block in blocks]
        stages = tuple(_stage(block, places, pixels, anatomy.grid, name) for block, places in zip(blocks, maps, strict=True))
        figures = (gallery.kept_macs[index], gallery.dense[index], gallery.cut[index])
        out.append(Exhibit(file, *figures, _picture(pixels, name, file), stages))
    return tuple(out)


def _picture(pixels: Pixels, name: str, file: str) -> str:
    """The picture itself, once; the stages refer to it."""
    height, width = pixels.shape[:2]
    image = element("image", id=name, href=_jpeg(pixels), width=width, height=height)
    return chart(f"{file}, as the model sees it", width, height, [image], "picture")


def _stage(block: int, places: Places, pixels: Pixels, grid: tuple[int, int], name: str) -> Stage:
    height, width = pixels.shape[:2]
    means, groups = _cell_means(pixels, grid), _groups(places)
    dropped = np.flatnonzero(places < 0).tolist()
    merged = [members for members in groups if len(members) > 1]
    cells = [_group(members, means, grid[1]) for members in merged]
    if dropped:
        cells.append(element("path", tip(f"{len(dropped)} patches dropped"), d=cell_path(dropped, grid[1]), class_="dropped"))
    border = _borders(places, grid, {int(places[members[0]]) for members in merged})
    lines = [element("path", d=border, class_="border under"), element("path", d=border, class_="border")] if border else []
    scale = f"scale({width / grid[1]:.4f} {height / grid[0]:.4f})"
    body = [element("use", href=f"#{name}"), element("g", "".join(cells + lines), transform=scale) if cells else ""]
    text = f"after block {block}: {len(groups)} patch tokens, {len(merged)} of them merged, {len(dropped)} patches dropped"
    return Stage(block, len(groups), len(merged), len(dropped), chart(text, width, height, body, "picture"))


def _groups(places: Places) -> list[list[int]]:
    """Patches by the token that stands for them, dropped ones left out."""
    found: dict[int, list[int]] = {}
    for patch, place in enumerate(places.tolist()):
        if place >= 0:
            found.setdefault(place, []).append(patch)
    return list(found.values())


def _group(members: Sequence[int], means: NDArray[np.float64], columns: int) -> str:
    colour = "#{:02x}{:02x}{:02x}".format(*(round(value) for value in means[list(members)].mean(0)))
    return element("path", tip(f"one token for {len(members)} patches"), d=cell_path(members, columns), fill=colour, class_="group")


def _cell_means(pixels: Pixels, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Mean colour of every patch, ``[patches, 3]``."""
    height, width = pixels.shape[:2]
    top = [height * row // grid[0] for row in range(grid[0])]
    left = [width * column // grid[1] for column in range(grid[1])]
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), top, 0), left, 1)
    rows, columns = np.diff([*top, height]), np.diff([*left, width])
    means: NDArray[np.float64] = (sums / (rows[:, None] * columns)[..., None]).reshape(-1, 3)
    return means


def _borders(places: Places, grid: tuple[int, int], merged: set[int]) -> str:
    """Path data of the edges between patches of different tokens, where one of the two is a merged group."""
    table = places.reshape(grid)
    inside = np.isin(table, sorted(merged))
    down = (table[:, 1:] != table[:, :-1]) & (inside[:, 1:] | inside[:, :-1])
    across = (table[1:] != table[:-1]) & (inside[1:] | inside[:-1])
    return "".join(
        [f"M{column + 1} {row}v{run}" for column in range(grid[1] - 1) for row, run in _runs(down[:, column])]
        + [f"M{column} {row + 1}h{run}" for row in range(grid[0] - 1) for column, run in _runs(across[row])]
    )


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and length of every stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def _jpeg(pixels: Pixels) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
