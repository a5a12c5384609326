"""The examples of the docs run as they stand, and what they print is what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def sparsity(printed: str) -> float:
    """The last percentage of zero MACs that was printed."""
    return float(re.findall(r"([\d.]+)% of the MACs are zero", printed)[-1])


@pytest.mark.parametrize("name", ["plain_loop.py", "accelerate_loop.py"])
def test_the_loops_reach_half_of_the_macs(name: str) -> None:
    printed = run(name, "--epochs", "2")
    assert sparsity(printed) == pytest.approx(50, abs=1)
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[0]) > 50


def test_the_lightning_module_reaches_half_of_the_macs_and_resumes(tmp_path: Path) -> None:
    printed = run("lightning_module.py", "--epochs", "2", "--folder", str(tmp_path))
    assert sparsity(printed) == pytest.approx(50, abs=1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = run("lightning_module.py", "--epochs", "2", "--folder", str(tmp_path), "--resume", str(checkpoint))
    assert re.findall("accuracy.*", again) == re.findall("accuracy.*", printed)
