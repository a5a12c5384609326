"""The packages import under their own names only, and without what is optional."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_a_bare_import_is_refused(name: str) -> None:
    done = python(f"import {name}")
    assert done.returncode != 0
    assert f"this folder is the package fxdbsr.{name}" in done.stderr


def test_the_packages_import_from_another_folder(tmp_path: Path) -> None:
    code = "import fxdbsr.kernels, fxdbsr.passes"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_everything_works_without_triton_and_llvmlite() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["llvmlite"] = None
import torch, fxdbsr
model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3)).eval()
prepared = fxdbsr.prepare(model)
prepared.get_submodule("0").mask[0] = False
x = torch.randn(1, 3, 8, 8)
converted = fxdbsr.convert(prepared)
torch.testing.assert_close(converted(x), prepared(x))
assert converted.get_submodule("0").engine == "dense"
try:
    fxdbsr.convert(prepared, backend="cpu")
except RuntimeError as error:
    assert "cannot run here" in str(error)
else:
    raise AssertionError
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
