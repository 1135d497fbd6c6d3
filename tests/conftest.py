from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import settings

from cli_helpers import NAME, QUICK, hesper, write_images, write_weights

# The same examples every time, so that what passed once passes again however slow the machine is; --hypothesis-profile explore looks
# for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "calib", 8)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, weights: Path, images: Path) -> tuple[Path, Result]:
    """A finished run and what making it printed; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.8, "--out", out, "--data", images, *QUICK)
    result = hesper(*words)
    assert result.exit_code == 0, result.stderr
    return out, result


@pytest.fixture
def ask(tmp_path: Path, weights: Path, images: Path) -> Callable[..., Result]:
    """``hesper prune`` with everything right but what the test says; nothing may be left where the run would have been."""

    def prune(*words: object, model: str = NAME, weights: Path = weights, calib: Path = images, out: Path | None = None) -> Result:
        place = tmp_path / "out"
        place.mkdir()
        result = hesper("prune", model, "--weights", weights, "--calib", calib, "--out", out or place / "new" / "run", *QUICK, *words)
        assert list(place.iterdir()) == []
        return result

    return prune
