"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxdbsr
from fxdbsr.cli import main

SMALL = ["report", "squeezenet1_1", "--shape", "1x3x64x64"]


def test_report_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--depth", "1", "--block", "16x16"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("SqueezeNet on 1x3x64x64 float32 on cpu, batch included")
    assert "\ntotal" in out
    assert err == ""


def test_report_writes_json_in_place_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["params"] == 1_235_496


def test_report_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv", "markdown", "dot", "html")}
    options = [part for kind, path in paths.items() for part in (f"--{kind}", str(path))]
    assert main([*SMALL, "--block", "1xall", "--convert", "reference", *options]) == 0
    assert "reference" in capsys.readouterr().out
    assert json.loads(paths["json"].read_text())["rows"][0]["block_size"] == [1, 3]
    assert paths["csv"].read_text().startswith("name,kind,")
    assert "| layer" in paths["markdown"].read_text()
    assert paths["dot"].read_text().startswith("digraph")
    assert paths["html"].read_text().startswith("<!doctype html>")


def test_report_takes_a_callable_and_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef conv():\n    return nn.Conv2d(3, 8, 3)\n")
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Conv2d(3, 8, 3).state_dict(), "good.pt")
    torch.save(nn.Conv2d(3, 9, 3).state_dict(), "bad.pt")
    arguments = ["report", "mine:conv", "--shape", "1x3x8x8", "--checkpoint"]
    assert main([*arguments, "good.pt"]) == 0
    assert "8x3x3x3" in capsys.readouterr().out
    assert main([*arguments, "bad.pt"]) == 2
    assert main([*arguments, "none.pt"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "size mismatch" in lines[0]
    assert "none.pt" in lines[1]


@pytest.mark.skipif(not hasattr(fxdbsr, "block_prune_"), reason="block_prune_ is not there")
@pytest.mark.parametrize("score", ["l2", "random"])
def test_report_prunes(score: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--block", "8x8", "--sparsity", "0.5", "--score", score, "--json", "-"]
    assert main(arguments) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert 0.45 < total["sparsity"] < 0.55
    assert total["macs"] < total["macs_run"] == total["macs_dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "resnet5"], "torchvision has no model 'resnet5'; did you mean resnet50"),
        ([*SMALL, "--shape", "1x3x-4x4"], "--shape: expected positive ints like 1x3x224x224"),
        ([*SMALL, "--block", "axb"], "--block: expected OUTxIN like 32x32 or 1xall, got 'axb'"),
        ([*SMALL, "--shape", "1x4x64x64"], "the forward of SqueezeNet fails on 1x4x64x64 float32"),
        ([*SMALL, "--sort", "size"], "sort: expected one of name,"),
        ([*SMALL, "--json", "/no/such/folder/a.json"], "No such file or directory"),
        (["report", "no.such:thing"], "No module named 'no'"),
        (["report", "json:thing"], "json has no 'thing'"),
        (["report", "json:JSONDecoder"], "expected a callable that returns an nn.Module, got JSONDecoder"),
        (["report"], "the following arguments are required: MODEL"),
        (["paint"], "invalid choice: 'paint'"),
    ],
)
def test_bad_input_exits_with_2_and_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.splitlines()) == 1 or "usage:" in err
    assert "Traceback" not in out + err


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert "fxdbsr report resnet50 --block 32x32 --sparsity 0.5" in capsys.readouterr().out
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_python_dash_m_runs_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxdbsr", "report", "nosuchmodel"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fxdbsr report: torchvision has no model 'nosuchmodel'")
