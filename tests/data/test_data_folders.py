from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hesper.data import ImageSet, Skipped, batches, check_labels, open_folder, read_class_map, split
from hesper.errors import UsageError


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1).float() / 255


def picture(path: Path, shade: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (12, 10), shade).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images each, whose grey value is 10 x their place in sorted order."""
    root = tmp_path / "images"
    for number in range(6):
        picture(root / ("cat" if number < 3 else "dog") / f"{number}.png", 10 * number)
    return root


@pytest.fixture(scope="module")
def folder_of_40(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("forty")
    for number in range(40):
        picture(root / f"{number:02}.png", number)
    return opened(root, labelled=False)


def opened(root: Path, *, class_map: tuple[str, ...] | None = None, labelled: bool = True) -> ImageSet:
    return open_folder(root, transform=to_tensor, class_map=class_map, labelled=labelled)


def refusal(root: Path, **how: bool) -> str:
    with pytest.raises(UsageError) as caught:
        opened(root, **how)  # type: ignore[arg-type]
    return str(caught.value)


def test_class_folders_give_sorted_files_and_labels(folder: Path) -> None:
    images = opened(folder)
    assert images.files == ("cat/0.png", "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png", "dog/5.png")
    assert images.labels == (0, 0, 0, 1, 1, 1) and images.classes == ("cat", "dog")
    assert len(images) == 6 and images.skipped == ()


def test_a_class_map_decides_the_labels(folder: Path) -> None:
    assert opened(folder, class_map=("bird", "dog", "eel", "cat")).labels == (3, 3, 3, 1, 1, 1)


def test_without_labels_any_arrangement_will_do(folder: Path) -> None:
    picture(folder / "loose.jpg", 99)
    picture(folder / "cat" / "deep" / "er.jpeg", 98)
    images = opened(folder, labelled=False)
    assert images.labels is None and images.classes == ()
    assert len(images) == 8 and "loose.jpg" in images.files and "cat/deep/er.jpeg" in images.files


def test_a_class_folder_the_map_does_not_know_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="class folder 'cat' that the class map does not name; did you mean 'cats'"):
        opened(folder, class_map=("cats", "dog"))


def test_folders_that_cannot_serve_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refusal(tmp_path / "file")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    assert "holds no images" in refusal(tmp_path / "empty")
    picture(tmp_path / "flat" / "a.png", 1)
    assert "no class folders" in refusal(tmp_path / "flat")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert "can be read" in refusal(tmp_path / "gone", labelled=False)


def test_clutter_is_ignored_and_other_files_are_named(folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "cat/desktop.ini", "cat/._0.png"):
        (folder / name).write_bytes(b"x")
    (folder / "README.txt").write_text("hello")
    picture(folder / "loose.png", 3)
    (folder / "dog" / "broken.png").symlink_to(folder / "nowhere.png")
    images = opened(folder)
    assert images.skipped == (
        Skipped("README.txt", "not an image by its file name"),
        Skipped("dog/broken.png", "not a regular file"),
        Skipped("loose.png", "not in a class folder"),
    )
    assert len(images) == 6 and images.labels == (0, 0, 0, 1, 1, 1)


def test_links_are_followed_but_not_for_ever(folder: Path) -> None:
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "elk").symlink_to(folder / "dog")
    images = opened(folder)
    assert images.classes == ("cat", "dog", "elk")
    assert images.files[6:] == ("elk/3.png", "elk/4.png", "elk/5.png")


def test_the_hash_covers_names_and_contents_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = opened(folder).sha256
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "README.txt").write_text("hello")
    assert opened(copy).sha256 == opened(copy, labelled=False).sha256 == before
    (copy / "cat" / "0.png").rename(copy / "cat" / "00.png")
    renamed = opened(copy).sha256
    picture(copy / "cat" / "00.png", 77)
    assert len({before, renamed, opened(copy).sha256}) == 3


def test_class_map_files(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffn01440764 tench, Tinca tinca\nn01443537\ngreat white shark\n\n", encoding="utf-8")
    assert read_class_map(path) == ("n01440764", "n01443537", "great white shark")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write one class name a line"),
        ("a\n\nb\n", "line 2 of the class map .* is empty"),
        ("a\nb\na\n", "names 'a' on lines 1 and 3"),
    ],
)
def test_class_maps_that_cannot_serve_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_class_map(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_class_map(tmp_path)


def test_labels_must_fit_the_model(folder: Path) -> None:
    images = opened(folder, class_map=("cat", "eel", "dog"))
    with pytest.raises(UsageError, match="class 'dog' has label 2, but the model has only 2 classes"):
        check_labels(images, 2)
    assert check_labels(images, 3) is None  # type: ignore[func-returns-value]
    assert check_labels(opened(folder, labelled=False), 1) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_batches_hold_every_image_once_in_order(folder: Path, batch_size: int, workers: int) -> None:
    images = opened(folder)
    run = batches(images, batch_size, workers=workers)
    loaded = list(run)
    assert tuple(name for batch in loaded for name in batch.files) == images.files
    assert [len(batch.files) for batch in loaded[:-1]] == [batch_size] * (len(loaded) - 1)
    pixels = torch.cat([batch.images for batch in loaded])
    assert pixels.shape == (6, 3, 8, 8)
    assert torch.equal((pixels[:, 0, 0, 0] * 255).round(), torch.arange(6) * 10.0)
    assert torch.cat([batch.labels for batch in loaded if batch.labels is not None]).tolist() == [0, 0, 0, 1, 1, 1]
    assert run.yielded == 6 and run.skipped == ()


def test_indices_choose_and_order(folder: Path) -> None:
    (batch,) = batches(opened(folder, labelled=False), 8, indices=(4, 0, 4))
    assert batch.files == ("dog/4.png", "cat/0.png", "dog/4.png") and batch.labels is None
    assert list(batches(opened(folder), 8, indices=())) == []


def test_damaged_files_are_named_and_skipped_and_other_batches_stay_as_they_are(folder: Path) -> None:
    whole = folder / "cat" / "1a.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "cat" / "0a.jpg").write_text("this is text")
    (folder / "dog" / "9.png").write_bytes(b"")
    (folder / "dog" / "8.png").write_bytes((folder / "dog" / "5.png").read_bytes()[:40])
    run = batches(opened(folder), 4)
    loaded = list(run)
    assert [batch.files for batch in loaded] == [("cat/0.png", "cat/1.png"), ("cat/2.png", "dog/3.png", "dog/4.png", "dog/5.png")]
    assert [skip.file for skip in run.skipped] == ["cat/0a.jpg", "cat/1a.jpg", "dog/8.png", "dog/9.png"]
    assert run.skipped[0].reason == "not an image" and "truncated" in run.skipped[1].reason
    assert run.yielded == 6
    assert loaded[1].labels is not None and loaded[1].labels.tolist() == [0, 1, 1, 1]


def test_no_readable_image_at_all_is_refused(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("this is text")
    with pytest.raises(UsageError, match=r"none of the 2 files .* can be decoded \(a.jpg: not an image\)"):
        list(batches(opened(tmp_path, labelled=False), 2))


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "webp")])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    picture(tmp_path / f"a.{suffix}", 255, mode)
    (batch,) = batches(opened(tmp_path, labelled=False), 1)
    assert batch.images.shape == (1, 3, 8, 8)
    assert torch.allclose(batch.images, torch.ones(()), atol=0.02)


def test_transparent_palettes_become_rgb_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    (batch,) = batches(opened(tmp_path, labelled=False), 1)
    assert (batch.images[0, :, 0, 0] * 255).round().tolist() == [10, 20, 30]


def test_images_of_different_shapes_are_refused(folder: Path) -> None:
    Image.new("RGB", (20, 20)).save(folder / "cat" / "0.png")
    ragged = open_folder(folder, transform=lambda image: torch.zeros(3, *image.size), class_map=None, labelled=True)
    with pytest.raises(UsageError, match="different shapes"):
        list(batches(ragged, 6))


def test_a_failing_transform_is_not_taken_for_a_damaged_file(folder: Path) -> None:
    def fail(image: Image.Image) -> Tensor:
        raise ValueError("a mistake in the transform")

    with pytest.raises(ValueError, match="a mistake"):
        list(batches(open_folder(folder, transform=fail, class_map=None, labelled=True), 6))


def test_decoding_runs_ahead_by_a_bounded_number_and_stops_on_close(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / f"{number:02}.png", number)
    decoded = []

    def count(image: Image.Image) -> Tensor:
        decoded.append(threading.current_thread().name)
        return to_tensor(image)

    run = batches(open_folder(tmp_path, transform=count, class_map=None, labelled=False), 2, workers=2)
    next(run)
    deadline = time.monotonic() + 5
    while len(decoded) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(decoded) == 6  # the batch itself, and batch_size + workers ahead
    run.close()
    assert len(decoded) == 6 and list(run) == []
    assert not any(thread.name.startswith("hesper-decode") for thread in threading.enumerate())


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.integers(0, 40))
def test_shares_make_the_batches_of_one_process(folder_of_40: ImageSet, count: int, size: int, of: int, start: int) -> None:
    indices = tuple(reversed(range(count)))
    whole = [batch.files for batch in batches(folder_of_40, size, indices=indices)]
    shares = [[batch.files for batch in batches(folder_of_40, size, indices=indices, share=(which, of))] for which in range(of)]
    assert [shares[block % of][block // of] for block in range(len(whole))] == whole
    later = [batch.places for batch in batches(folder_of_40, size, indices=indices, share=(of - 1, of), start=start)]
    every = [place for batch in batches(folder_of_40, size, indices=indices, share=(of - 1, of)) for place in batch.places]
    assert [place for places in later for place in places] == [place for place in every if place >= start]


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_sizes_below_one_are_refused(folder: Path, sizes: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        batches(opened(folder), sizes[0], workers=sizes[1])


class Nowhere:
    where, classes = "nowhere", ()

    def read(self, file: str) -> bytes:
        raise OSError(f"there is no {file}")


NOWHERE = Nowhere()


def of_length(count: int) -> ImageSet:
    digests = tuple(number.to_bytes(4, "big") for number in range(count))
    return ImageSet(NOWHERE, tuple(map(str, range(count))), None, (), (), "", to_tensor, digests)


@given(st.integers(20, 300), st.integers(0, 2**32), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_splits_are_disjoint_and_repeatable(count: int, seed: int, parts: list[int]) -> None:
    fractions = [part / sum(parts) for part in parts]
    groups = split(of_length(count), fractions, seed)
    assert sorted(index for group in groups for index in group) == list(range(count))
    assert all(abs(len(group) - count * fraction) <= 1 for group, fraction in zip(groups, fractions, strict=True))
    assert groups == split(of_length(count), fractions, seed)


def test_splits_are_shuffled_by_the_seed_and_may_leave_images_over() -> None:
    first, second = (split(of_length(100), (0.3, 0.2), seed) for seed in (0, 1))
    assert [len(group) for group in first] == [30, 20]
    assert first != second and list(first[0]) != sorted(first[0])
    assert first[0][:5] == (23, 8, 11, 7, 48)  # on every machine


@pytest.mark.parametrize("fractions", [(0.7, 0.4), (0.0, 0.5), (-0.1,), (float("nan"),)])
def test_fractions_that_make_no_sense_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="must be positive and add up to at most 1"):
        split(of_length(10), fractions, 0)


def test_too_few_images_to_split_are_refused() -> None:
    with pytest.raises(UsageError, match="2 images are too few"):
        split(of_length(2), (0.9, 0.1), 0)


@pytest.mark.parametrize(("mode", "top"), [("I;16", 65535), ("I", 65535), ("F", 255)])
def test_grey_images_of_more_than_eight_bits_keep_their_contrast(tmp_path: Path, mode: str, top: int) -> None:
    ramp = np.linspace(0, top, 256).reshape(16, 16)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(ramp.astype(kind)).save(tmp_path / ("ramp.png" if mode == "I;16" else "ramp.tif"))
    images = open_folder(tmp_path, transform=lambda image: torch.from_numpy(np.array(image)).float(), class_map=None, labelled=False)
    (batch,) = batches(images, 1)
    assert batch.images.mean() == pytest.approx(127.5, abs=1.0)
    assert batch.images[..., 0].flatten().tolist() == pytest.approx(list(range(256)), abs=1.0)
