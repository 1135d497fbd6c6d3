"""What the report says of devices, from real benches, and what a real browser makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import Result

import chromium
from cli_helpers import hesper, sentence
from hesper.report.collect import collect
from hesper.report.device_charts import Candidate, pareto_chart, pareto_front
from hesper.report.fronts import fronts_of
from hesper.runs import RECORD

QUICK = ("--threads", 1, "--rounds", 3, "--processes", 1)


@pytest.fixture(scope="module")
def benched(pruned: tuple[Path, Result], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, of which the second was measured with its energy; the evaluation of ``pruned`` has labels."""
    root = tmp_path_factory.mktemp("benched")
    power = root / "power.csv"
    power.write_text("seconds,watts\n0,7\n600,7\n")
    first, second = (shutil.copytree(pruned[0], root / name) for name in ("first", "second"))
    for run, meter in ((first, "none"), (second, f"replay:{power}")):
        result = hesper("bench", run, "--batch-size", "1,2", "--meter", meter, "--energy-seconds", 0.3, *QUICK)
        assert result.exit_code == 0, result.stderr
    return first, second


@pytest.fixture(scope="module")
def page(benched: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about both, with the second's bench once more as if it came from elsewhere."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "orin").mkdir()
    copied = Path(shutil.copy(benched[1] / RECORD, folder / "orin" / RECORD))
    result = hesper("report", *benched, "--bench", copied, "--out", folder / "report.html")
    assert result.exit_code == 0, result.stderr
    return folder / "report.html"


def test_times_and_energy_are_the_record_s(benched: tuple[Path, Path], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for run in benched:
        cells = json.loads((run / RECORD).read_text())["entries"][-1]["results"]["cells"]
        for cell in cells:
            for model in cell["models"].values():
                for point in ("p50", "p90", "p95", "p99"):
                    assert f'<data value="{model["latency_ms"][point]}">' in text
                if run == benched[1]:
                    assert f'<data value="{model["joules_per_image"]}">' in text
    assert "replay (as recorded)" in text and "none: none was asked for" in text and ">orin<" in text


def test_every_cost_that_two_runs_know_has_a_front(benched: tuple[Path, Path]) -> None:
    costs = [cost for cost, _ in fronts_of(collect(benched))]
    assert [cost.partition(", on ")[0] for cost in costs] == [
        "kept MACs, share of dense",
        "ms an image, one image at a time",
        "ms an image, batches of 2",
    ]
    both = [cost for cost, _ in fronts_of(collect([benched[1], benched[1]]))]
    assert any(cost.startswith("joules an image, batches of 2, on ") for cost in both)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [Candidate(str(n), cost, quality, "") for n, (cost, quality) in enumerate([(1, 0.5), (2, 0.4), (2, 0.9), (3, 0.9), (4, 0.95)])]
    front = pareto_front(points)
    for own in points:
        beaten = any(o.cost <= own.cost and o.quality >= own.quality and (o.cost, o.quality) != (own.cost, own.quality) for o in points)
        assert (own in front) is not beaten
    assert pareto_chart(points, "ms", "top-1").count("another is at least as good in both") == 2


def test_a_run_without_a_bench_says_how_to_make_one(pruned: tuple[Path, Result], tmp_path: Path) -> None:
    assert hesper("report", pruned[0], "--out", tmp_path / "r.html").exit_code == 0
    assert "Not measured on a device" in (tmp_path / "r.html").read_text()
    assert "holds no bench" in sentence(hesper("report", pruned[0], "--bench", pruned[0], "--out", tmp_path / "s.html"), 2)
    assert not (tmp_path / "s.html").exists()


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_browser_loads_it_without_error_and_answers_the_pointer(page: Path, tmp_path: Path, width: int, scheme: str) -> None:
    with chromium.browser(tmp_path) as shown:
        shown.open(page, width, 900, prefers_color_scheme=scheme)
        assert shown.complaints == []
        assert shown.value("document.documentElement.scrollWidth <= window.innerWidth")
        drawn = shown.value(
            "[...document.querySelectorAll('figure svg')].map(own => own.getBoundingClientRect().width).filter(w => w > 40).length"
        )
        assert drawn == shown.value("document.querySelectorAll('figure svg').length") > 20
        assert shown.value("[...document.images].every(own => own.complete && own.naturalWidth > 0)")
        shown.value("window.dot = document.querySelector('#comparison .dot'); dot.scrollIntoView({block: 'center'})")
        rest = shown.value("getComputedStyle(dot).fillOpacity")
        x, y = shown.value("(box => [box.x + box.width / 2, box.y + box.height / 2])(dot.getBoundingClientRect())")
        shown.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        under = shown.value(f"document.elementFromPoint({x}, {y}).querySelector('title').textContent")
        assert "% of the MACs" in under
        assert rest == "0.5" and shown.value(
            "[...document.querySelectorAll('.dot:hover')].map(own => getComputedStyle(own).fillOpacity)"
        ) == ["1"]
        paper = shown.value("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(252, 251, 248)" if scheme == "light" else "rgb(22, 23, 25)")
        shown.open(page, width, 900, prefers_color_scheme=scheme, medium="print")
        assert shown.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
