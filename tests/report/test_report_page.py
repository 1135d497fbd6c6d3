"""The report of a real (tiny) run: complete, true to the record, self-contained, and safe against hostile names."""

import dataclasses
import itertools
import re
import shlex
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hesper as package
from cli_helpers import NAME, write_images, write_weights
from hesper.cli import main
from hesper.errors import UsageError
from hesper.heart.gallery import GALLERY, Gallery, load_gallery, save_gallery
from hesper.plan import Budget
from hesper.report import write_report
from hesper.report.charts import colour_bar
from hesper.report.collect import collect, command
from hesper.report.patches import exhibits, stages_of
from hesper.report.svg import Colours, cell_path
from hesper.runs import open_run

SECTIONS = ("kept", "cut where", "patches survive", "Drift against MACs", "Image by image", "pricing works", "Evidence")
VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    images = write_images(root / "images", 12)
    for number, picture in enumerate(sorted(images.rglob("*.png"))):
        picture.rename(picture.with_name(f"<script>alert({number})<_script>&amp;.png"))
    settings = package.Settings(
        Budget("macs", 0.8, 0.9), package.Criterion(draws=1), rank=4, heads="none", blocks="alternate-early", batch_size=8
    )
    package.prune(NAME, weights=write_weights(root / "w.safetensors"), calib=images, data=images, out=root / "run", settings=settings)
    return root / "run"


@pytest.fixture(scope="session")
def page(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report([run], out)
    return out.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects visible text and references, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.references, self.scripts = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def test_every_section_is_there_and_every_tag_is_closed(page):
    text = " ".join(read(page).words)
    assert all(section in text for section in SECTIONS)


def test_nothing_is_fetched_and_nothing_is_run(page):
    reader = read(page)
    assert all(reference.startswith(("#", "data:")) for reference in reader.references)
    assert reader.scripts == 0
    assert not re.search(r"@import|url\((?!#|data:)", page)


def test_headline_figures_are_the_record_s(run, page):
    text = " ".join(" ".join(read(page).words).split())
    main = open_run(run).entries[-1].results["evaluation"]
    assert f"{100 * main['macs_ratio']:.1f}" in text
    assert f"{100 * main['agreement']:.1f}" in text
    assert open_run(run).plan.measured.statement.split(" (")[0] in text


def test_steps_of_counts_are_named(run, page):
    multiple = package.load(run).plan.tokens[0].multiple
    assert multiple > 1 and f"Each image has a multiple of {multiple} tokens" in " ".join(page.split())


def test_a_run_made_in_python_says_the_command_that_asks_for_it(run):
    (facts,) = collect([run])
    words = shlex.split(command(facts))
    asked = main.commands["prune"].make_context("prune", words[2:]).params
    own = package.Settings(Budget("macs", 0.9, 0.9), rank=4, heads="none", blocks="alternate-early")
    plain = ("rank", "rounds", "multiple", "blocks", "heads", "counts", "combine", "refit", "refine", "seed")
    assert {name: asked[name] for name in plain} == {name: getattr(own, name) for name in plain}
    assert (asked["macs"], asked["confidence"], asked["draws"]) == (0.8, 0.9, 1)


def test_every_drawing_is_well_formed(page):
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) > 10
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("&nbsp;", " "))


def test_hostile_names_are_text(page):
    found = read(page)
    assert found.scripts == 0 and "<script>" not in page
    assert re.search(r"<script>alert\(\d+\)<_script>&amp;\.png", " ".join(found.words))


def test_without_pictures_the_page_says_so(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / GALLERY).unlink()
    write_report([copy], tmp_path / "r.html")
    assert "No pictures" in (tmp_path / "r.html").read_text()


def test_a_damaged_gallery_is_named_and_does_not_stop_the_page(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / GALLERY).write_bytes(b"nothing")
    write_report([copy], tmp_path / "r.html")
    assert "gallery.safetensors is damaged" in (tmp_path / "r.html").read_text()


def test_several_runs_are_compared(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    write_report([run, other], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    read(text)
    assert "other" in text
    assert len(re.findall(r'id="([^"]+)"', text)) == len(set(re.findall(r'id="([^"]+)"', text)))


def test_a_changed_run_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "plan.toml").write_text((copy / "plan.toml").read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(UsageError, match=r"plan\.toml"):
        write_report([copy], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_gallery_round_trips(run, tmp_path):
    gallery = load_gallery(run)
    save_gallery(tmp_path, gallery)
    again = load_gallery(tmp_path)
    for field in dataclasses.fields(Gallery):
        one, two = getattr(gallery, field.name), getattr(again, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_stages_count_tokens_as_the_maps_do(run):
    found, gallery = open_run(run), load_gallery(run)
    anatomy = found.plan.model.anatomy
    order = sorted(range(len(gallery.files)), key=lambda index: gallery.kept_macs[index])
    for exhibit, index in zip(exhibits(gallery, anatomy, found.plan.skip_unread, "x"), order, strict=True):
        assert exhibit.file.endswith(gallery.files[index].split("/")[-1][-8:])
        for stage in exhibit.stages:
            places = gallery.place[index, stage.block]
            assert stage.left == len(set(places[places >= 0].tolist()))
            assert stage.dropped == int((places < 0).sum())


def test_a_path_around_cells_covers_exactly_them():
    path = cell_path([0, 1, 5], 4)
    cells = set()
    for x, y, run_length in re.findall(r"M(\d+) (\d+)h(\d+)", path):
        cells |= {int(y) * 4 + int(x) + step for step in range(int(run_length))}
    assert cells == {0, 1, 5}


def test_stages_are_within_the_model():
    assert all(0 <= block < depth for depth in range(1, 25) for skip in (False, True) for block in stages_of(depth, skip))


@given(st.floats(-9.0, 1.0), st.floats(0.3, 4.0))
def test_the_labels_of_a_colour_scale_stand_clear_of_each_other(exponent, decades):
    drawn = ElementTree.fromstring(colour_bar(Colours(10**exponent, 10 ** (exponent + decades)), "nats"))
    ticks = [(float(text.get("x")), len(text.text) * 6.5) for text in drawn.iter() if text.tag.endswith("text") and text.get("y") == "29"]
    assert ticks
    assert all(right - left >= (wide + wider) / 2 + 8 for (left, wide), (right, wider) in itertools.pairwise(sorted(ticks)))
