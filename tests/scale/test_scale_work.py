"""What is kept of a job, and that a pass which goes on adds up to the same sums, bit for bit."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cli_helpers import NAME, QUICK, hesper, write_images
from hesper.curvature import Batch, image_generators
from hesper.data import ImageSet, LoadedBatch, open_folder
from hesper.errors import Interrupted, JobError, UsageError
from hesper.graft import graft
from hesper.heart.criteria import Criterion, sensitivity
from hesper.heart.fit import Tables
from hesper.heart.passes import Passes, StoredLogits
from hesper.parallel import Alone
from hesper.plan import empty_plan
from hesper.work import Kept, KeptNowhere, Work, work_beside
from vits import cuts_of, plan_for, tables, tiny_batch, tiny_host, vit

REQUEST = {"seed": 0, "images": "abc"}


class Total:
    """The sum of all pixels, which rounds differently in another order; gives up after ``most`` batches."""

    def __init__(self, most: int = 99) -> None:
        self.most, self.batches = most, 0
        self.total = torch.zeros(3, dtype=torch.float64)
        self.images = torch.zeros((), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total, "images": self.images}

    def add(self, batch: Batch) -> None:
        if self.batches == self.most:
            raise KeyboardInterrupt
        self.batches += 1
        self.total += (batch.images.double() ** 0.37).sum((0, 2, 3))
        self.images += len(batch.images)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = write_images(tmp_path_factory.mktemp("work") / "images", 5)
    (folder / "bee" / "02.png").write_bytes(b"no picture")

    def transform(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image) / np.float32(255)).permute(2, 0, 1)

    return open_folder(folder, transform=transform, class_map=None, labelled=True)


def passes(images: ImageSet, work: Work) -> Passes:
    return Passes(images, 2, Alone(), work, lambda stage, done, total: None)


def test_a_pass_that_goes_on_gives_the_same_bits(tmp_path: Path, images: ImageSet) -> None:
    whole = Total()
    passes(images, KeptNowhere()).accumulate("pass", "Pass", range(15), whole)
    seen = 0
    for most in (3, 0, 2, 99):
        part = Total(most)
        stopped = pytest.raises(Interrupted, match=r"goes on with what \.run\.work keeps")
        with stopped if most < 99 else contextlib.nullcontext(), work_beside(tmp_path / "run", REQUEST) as work:
            run = passes(images, work)
            run.accumulate("pass", "Pass", range(15), part)
            assert list(run.skipped) == ["bee/02.png"]
        seen += part.batches
    assert part.images == whole.images == 14 and torch.equal(part.total, whole.total)
    # What was done before each stop is not all done again: the first batch of every pass is kept at once.
    assert seen <= 3 + 0 + 2 + (8 - 2) and list(tmp_path.iterdir()) == []


def test_stored_logits_are_those_of_the_model_and_are_not_made_twice(tmp_path: Path, images: ImageSet) -> None:
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))
    with pytest.raises(Interrupted), work_beside(tmp_path / "run", REQUEST) as work:
        made = passes(images, work).dense("dense", "Dense", model, range(15))
        raise KeyboardInterrupt
    with work_beside(tmp_path / "run", REQUEST) as work:
        run = passes(images, work)
        again = run.dense("dense", "Dense", torch.nn.Identity(), range(15))
        assert list(run.skipped) == ["bee/02.png"]
        batches = list(run.batches("Look", range(15)))
        assert len(made) == len(again) == len(batches) == 8
        for index, batch in enumerate(batches):
            assert torch.equal(again[index], made[index]) and torch.equal(again[index], model(batch.images).detach())


@pytest.mark.parametrize("damage", ["short", "changed", "gone"])
def test_stored_logits_that_are_damaged_are_made_again(tmp_path: Path, images: ImageSet, damage: str) -> None:
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))
    with pytest.raises(Interrupted), work_beside(tmp_path / "run", REQUEST) as work:
        passes(images, work).dense("dense", "Dense", model, range(15))
        raise KeyboardInterrupt
    rows = tmp_path / ".run.work" / "dense.0of1.rows"
    whole = rows.read_bytes()
    if damage == "gone":
        rows.unlink()
    else:
        rows.write_bytes(whole[:10] if damage == "short" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with work_beside(tmp_path / "run", REQUEST) as work:
        again = passes(images, work).dense("dense", "Dense", model, range(15))
        batches = list(passes(images, work).batches("Look", range(15)))
        assert all(torch.equal(again[index], model(batch.images).detach()) for index, batch in enumerate(batches)) and len(again) == 8


def test_what_is_kept_of_one_plan_is_not_taken_for_another(tmp_path: Path) -> None:
    model = vit("plain")

    def transform(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image.resize(model.patch_embed.img_size[::-1])) / np.float32(255)).permute(2, 0, 1)

    images = open_folder(write_images(tmp_path / "images", 3), transform=transform, class_map=None, labelled=False)
    plan = plan_for(model, cuts_of("merge", [0, 1], threshold=1e9))
    assert plan.pricing is not None
    with work_beside(tmp_path / "run", REQUEST) as work:
        run = passes(images, work)
        dense = run.dense("dense", "Dense", model, range(9))
        for rounds in (2, 1, 2):
            cut = graft(model, replace(plan, pricing=replace(plan.pricing, rounds=rounds)), tables(model))
            found = run.evaluate("tune", "Measure", cut, dense, range(9))
            fresh = passes(images, KeptNowhere()).evaluate("tune", "Measure", cut, dense, range(9))
            assert np.array_equal(found.macs, fresh.macs) and np.array_equal(found.drift_kl, fresh.drift_kl)


class FirstOfTwo(Alone):
    """A team whose other process never disagrees."""

    size = 2


def keep(out: Path, request: Mapping[str, Any], error: BaseException, notes: list[str] | None = None) -> None:
    with work_beside(out, request, note=None if notes is None else notes.append) as work:
        assert work.load("thing") is None
        work.save("thing", Kept({"x": np.arange(3), "scalar": np.float64(2)}, {"next": 7}))
        raise error


def test_work_is_kept_when_stopped_and_used_for_the_same_request_only(tmp_path: Path) -> None:
    out, notes = tmp_path / "sub" / "run", list[str]()
    with pytest.raises(Interrupted):
        keep(out, REQUEST, KeyboardInterrupt())
    with work_beside(out, REQUEST, note=notes.append) as work:
        kept = work.load("thing")
        assert (
            kept is not None and kept.arrays["x"].tolist() == [0, 1, 2] and kept.arrays["scalar"].shape == () and kept.notes == {"next": 7}
        )
    assert notes == ["Goes on with the work of an earlier process, kept in .run.work."]
    assert list((tmp_path / "sub").iterdir()) == []
    with pytest.raises(Interrupted):
        keep(out, REQUEST, Interrupted("a process died"))
    with pytest.raises(JobError, match="no plan"):
        keep(out, {**REQUEST, "seed": 1}, JobError("no plan"), notes)
    assert notes[1:] == ["What .run.work keeps is of another request (seed) and is not used."]
    assert list((tmp_path / "sub").iterdir()) == []


def test_work_of_another_number_of_processes_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        keep(tmp_path / "run", REQUEST, KeyboardInterrupt())
    notes: list[str] = []
    with work_beside(tmp_path / "run", REQUEST, team=FirstOfTwo(), note=notes.append) as work:
        assert work.load("thing") is None
    assert notes == ["What .run.work keeps is of another request (number of processes) and is not used."]


def test_no_pass_holds_more_than_a_few_batches(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, made = 0, 0

    def count(images: Tensor, *rest: Any) -> LoadedBatch:
        nonlocal most, made
        alive[:] = [each for each in alive if each() is not None]
        alive.append(weakref.ref(images))
        most, made = max(most, len(alive)), made + 1
        return LoadedBatch(images, *rest)

    monkeypatch.setattr("hesper.data.loading.LoadedBatch", count)
    calib = write_images(tmp_path / "calib", 12)
    words = ("--weights", weights, "--calib", calib, "--macs", 0.8, "--data", calib, *QUICK, "--batch-size", 2, "--heads", "static")
    result = hesper("prune", NAME, *words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert made > 100 and most <= 3


def test_a_damaged_file_is_done_again_and_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        keep(tmp_path / "run", REQUEST, KeyboardInterrupt())
    (tmp_path / ".run.work" / "thing.0of1.safetensors").write_bytes(b"half")
    (tmp_path / ".run.0123abcd.partial").mkdir()
    with work_beside(tmp_path / "run", REQUEST) as work:
        assert work.load("thing") is None
        assert [path.name for path in tmp_path.iterdir()] == [".run.work"]


def test_results_that_exist_or_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UsageError, match="exists already|cannot be made"), work_beside(out, REQUEST):
            pass
    other = work_beside(tmp_path / "new", REQUEST)
    with work_beside(tmp_path / "new", REQUEST), pytest.raises(UsageError, match="another process is making"), other:
        pass


@pytest.mark.parametrize("name", ["kl", "ce", "heart"])
def test_what_an_image_draws_depends_on_the_image_alone(name: str) -> None:
    host, batch, seed = tiny_host(), tiny_batch(4), torch.Generator().manual_seed(3)

    def prices(rows: list[int]) -> Tensor:
        part = type(batch)(batch.images[rows], None if batch.labels is None else batch.labels[rows])
        return sensitivity(host, part, Criterion(name, 4.0, 2), image_generators(part.images, seed)).tokens

    together = prices([0, 1, 2, 3])
    torch.testing.assert_close(prices([3, 1]), together[[3, 1]], rtol=1e-9, atol=1e-12)
    seed.manual_seed(4)
    assert not torch.allclose(prices([3, 1]), together[[3, 1]])


class Two(Alone):
    """This process and another, of which it is known what it says."""

    size = 2

    def __init__(self, other: object) -> None:
        self.other = other

    def every(self, value: Any) -> list[Any]:
        """This process's value and the other's."""
        return [value, self.other]


def test_what_one_process_cannot_measure_none_of_them_goes_on_with(images: ImageSet) -> None:
    host = tiny_host("plain")
    plan = empty_plan("test_vit", host.anatomy)
    blank = graft(host.module, plan)
    said = JobError("A logit is not finite in the other process.")
    seen = StoredLogits(np.zeros((0, host.anatomy.classes), np.float32), [])
    run = Passes(images, 2, Two(said), KeptNowhere(), lambda stage, done, total: None)
    with pytest.raises(JobError, match="in the other process"):
        run.evaluate("tune", "Measure", blank, seen, ())


REFINED = (0, 1, 2, 3, 4, 5, 6, 8, 9)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """The images of every step of refining, by all processes."""
    found: dict[int, list[str]] = {}

    class Recorded:
        def __init__(self, module: Any, plan: Any, tables: Any, steps: int, seed: int, team: Any) -> None:
            self.done, self.wanted = torch.zeros(()), steps

        def add(self, batch: LoadedBatch | None) -> None:
            found.setdefault(int(self.done), []).extend(() if batch is None else batch.files)
            self.done += 1

        def tensors(self) -> dict[str, Tensor]:
            return {"done": self.done}

        def go_on(self, kept: dict[str, Tensor]) -> None:
            self.done.copy_(kept["done"])

        def tables(self) -> int:
            assert self.done == self.wanted
            return 0

    monkeypatch.setattr("hesper.heart.passes.Refinement", Recorded)
    return found


def refined(images: ImageSet, crew: Alone) -> None:
    plan = empty_plan("test_vit", tiny_host("plain").anatomy)
    passes = Passes(images, 5, crew, KeptNowhere(), lambda stage, done, total: None)
    passes.refined(torch.nn.Identity(), plan, Tables({}, ()), REFINED, epochs=3, seed=7)


def in_order(images: ImageSet) -> list[str]:
    """The images that refining sees, epoch after epoch."""
    generator = torch.Generator().manual_seed(7)
    return [images.files[REFINED[place]] for _ in range(3) for place in torch.randperm(len(REFINED), generator=generator).tolist()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_a_step_of_refining_takes_the_same_images_in_any_number_of_processes(
    images: ImageSet, size: int, steps: dict[int, list[str]]
) -> None:
    for rank in range(size):
        crew = Alone()
        crew.rank, crew.size = rank, size
        refined(images, crew)
    order = in_order(images)
    assert {step: sorted(found) for step, found in steps.items()} == {step: sorted(order[5 * step : 5 * step + 5]) for step in range(5)}


def test_refining_goes_on_where_the_furthest_process_has_got_to(images: ImageSet, steps: dict[int, list[str]]) -> None:
    refined(images, Two(Kept({"done": np.array(3, np.float32)}, {"next": 3})))
    order = in_order(images)
    assert steps == {step: order[5 * step : 5 * step + 5 : 2] for step in (3, 4)}
