"""What only shows in a process of its own: signals, pipes, exit codes and what is imported."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import Result

from cli_helpers import NAME

HESPER = (sys.executable, "-c", "from hesper.cli import main; main()")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_anything_is_finished_leaves_nothing(tmp_path: Path, weights: Path, images: Path, number: signal.Signals) -> None:
    words = ["prune", NAME, "--weights", weights, "--calib", images, "--macs", "0.5", "--draws", "5000", "--out", tmp_path / "sub" / "run"]
    with subprocess.Popen([*HESPER, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("sub/.run.work/request.*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        assert process.poll() is None and list(tmp_path.glob("sub/.run.work/request.*.json"))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == "" and err.splitlines()[-1] == "hesper: interrupted; nothing was written." and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(pruned: tuple[Path, Result]) -> None:
    with subprocess.Popen([*HESPER, "show", str(pruned[0])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_help_and_show_do_without_torch(pruned: tuple[Path, Result]) -> None:
    for words in (["--help"], ["prune", "--help"], ["show", str(pruned[0])]):
        code = (
            "import sys\n"
            "from hesper.cli import main\n"
            "try: main()\n"
            "except SystemExit as done: assert not done.code\n"
            "assert not {'torch', 'numpy', 'timm', 'matplotlib', 'rich'} & sys.modules.keys()\n"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_console_script_ends_with_the_code_of_the_failure() -> None:
    done = subprocess.run([*HESPER, "show", "missing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hesper: there is no plan at missing")
