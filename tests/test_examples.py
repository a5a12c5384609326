"""The examples of the docs run as they stand, and what they print is what they promise."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # those of Lightning and Accelerate are theirs
]

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as the command line would; what it prints."""

    def started(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return started


def sparsity(printed: str) -> float:
    """The last percentage of zero MACs that was printed."""
    return float(re.findall(r"([\d.]+)% of the MACs are zero", printed)[-1])


@pytest.mark.parametrize("name", ["plain_loop.py", "accelerate_loop.py"])
def test_the_loops_reach_half_of_the_macs(run: Any, name: str) -> None:
    printed = run(name, "--epochs", "4")
    assert sparsity(printed) == pytest.approx(50, abs=1)
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[0]) > 80


def test_the_lightning_module_reaches_half_of_the_macs_and_resumes(run: Any, tmp_path: Path) -> None:
    printed = run("lightning_module.py", "--epochs", "2", "--folder", str(tmp_path))
    assert sparsity(printed) == pytest.approx(50, abs=1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = run("lightning_module.py", "--epochs", "2", "--folder", str(tmp_path), "--resume", str(checkpoint))
    assert re.findall("accuracy.*", again) == re.findall("accuracy.*", printed)
