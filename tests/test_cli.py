"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxdbsr
from fxdbsr.cli import COMMANDS, _parser, main
from fxdbsr.commands.checkpoint import read_checkpoint
from fxdbsr.commands.spread import spread_mask
from fxdbsr.models import resnet20

SMALL = ["report", "squeezenet1_1", "--shape", "1x3x64x64"]
DENSE_MACS = 40_813_184  # of ResNet-20 at 32x32


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
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv", "markdown", "dot", "html", "graph")}
    paths["graph"] = tmp_path / "graph.svg"
    options = [part for kind, path in paths.items() for part in (f"--{kind}", str(path))]
    (tmp_path / "log").write_text('{"epoch": 0, "loss": 2}\n\n{"epoch": 1, "loss": 1}\n')
    options += ["--history", str(tmp_path / "log")]
    assert main([*SMALL, "--block", "1xall", "--convert", "reference", *options]) == 0
    assert "reference" in capsys.readouterr().out
    assert json.loads(paths["json"].read_text())["rows"][0]["block_size"] == [1, 3]
    assert paths["csv"].read_text().startswith("name,kind,")
    assert "| layer" in paths["markdown"].read_text()
    assert paths["dot"].read_text().startswith("digraph")
    assert paths["html"].read_text().startswith("<!doctype html>")
    assert "<figure" in paths["html"].read_text()
    assert "<svg" in paths["graph"].read_text()


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


def test_report_of_a_converted_model_chooses_engines_at_the_size_that_it_is_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SMALL, "--block", "8x8", "--sparsity", "0.5", "--convert"]) == 0
    assert "size is not known" not in capsys.readouterr().out


@pytest.mark.parametrize("score", ["l2", "random"])
def test_report_prunes(score: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--block", "8x8", "--sparsity", "0.5", "--score", score, "--json", "-"]
    assert main(arguments) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert 0.45 < total["sparsity"] < 0.55
    assert total["macs"] < total["macs_run"] == total["macs_dense"]


def test_a_prepared_checkpoint_is_loaded_with_its_masks_from_where_a_script_put_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = fxdbsr.block_prune_(fxdbsr.prepare(resnet20(), 8), 0.5)
    state = {f"module.{key}": value for key, value in prepared.state_dict().items()}
    torch.save({"epoch": 3, "model": state}, tmp_path / "best.pt")
    arguments = ["report", "resnet20", "--checkpoint", str(tmp_path / "best.pt"), "--json"]
    assert main(arguments) == 2
    assert "--block: " in capsys.readouterr().err
    assert main([*arguments, "-", "--block", "8x8"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["inputs"] == ["1x3x32x32 float32 on cpu"]
    expected = fxdbsr.report(prepared, torch.zeros(1, 3, 32, 32)).total
    assert figures["total"]["blocks_kept"] == expected.blocks_kept < expected.blocks_total
    assert figures["total"]["macs"] == expected.macs


def test_a_checkpoint_that_states_its_blocks_and_leaves_layers_out_needs_no_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fxdbsr.BlockConfig(8, by_name={"conv1": None}, form="clamp")
    prepared = fxdbsr.block_prune_(fxdbsr.prepare(resnet20(7), config=config), 0.5)
    options = {"block": "8x8", "form": "clamp"}
    history = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    content = {"model": prepared.state_dict(), "options": options, "history": history, "epoch": 2}
    torch.save(content, tmp_path / "best.pt")
    page = tmp_path / "page.html"
    arguments = ["report", "resnet20", "--checkpoint", str(tmp_path / "best.pt"), "--html", str(page), "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows if not row["block_size"]] == ["conv1", "fc"]
    assert rows[-1]["weight_shape"] == [7, 64]
    assert page.read_text().count("<figure") == 1


def test_words_are_plain_text_and_as_wide_as_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(SMALL) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 120
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(SMALL) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".safetensors"])
def test_convert_writes_a_file_that_holds_the_converted_model(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    torch.manual_seed(0)
    prepared = fxdbsr.block_prune_(fxdbsr.prepare(resnet20(), 8), 0.5).eval()
    torch.save(prepared.state_dict(), tmp_path / "best.pt")
    output = tmp_path / f"out{suffix}"
    arguments = ["resnet20", "--checkpoint", str(tmp_path / "best.pt"), "--block", "8x8", "-o", str(output)]
    assert main(["convert", *arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["file_bytes"] == output.stat().st_size
    assert figures["max_abs_error"] < 1e-5
    assert figures["total"]["macs"] < figures["total"]["macs_dense"]
    converted, x = fxdbsr.convert(prepared, example_inputs=torch.randn(1, 3, 32, 32)), torch.randn(5, 3, 32, 32)
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(output).module()(x), converted(x))
        return
    state = read_checkpoint(output).state
    assert state.keys() == converted.state_dict().keys()
    for key, value in converted.state_dict().items():
        assert torch.equal(state[key], value)


def test_convert_writes_no_tensors_of_a_model_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(4, 8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x) if x.dim() == 4 else x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["convert", "parts:Net", "--block", "4x4", "--shape", "1x4x8x8", "-o"]
    assert main([*arguments, "a.pt"]) == 2
    assert "Net was converted in parts" in capsys.readouterr().err
    assert not Path("a.pt").exists()
    assert main([*arguments, "a.pt2"]) == 0


def test_convert_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small.pt"
    assert main(["convert", "resnet20", "--block", "8", "--sparsity", "0.5", "-o", str(output)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{output}  state dict, {output.stat().st_size:,} bytes\n")
    for word in ("MACs", "parameters", "packed convs", "largest |error|"):
        assert word in out


def test_convert_counts_layers_that_are_gone_among_the_dense_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["resnet20", "--block", "8", "--sparsity", "0.95", "-o", str(tmp_path / "small.pt"), "--json"]
    assert main(["convert", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["total"]["macs_dense"] < figures["macs_dense"] == DENSE_MACS


# ---------------------------------------------------------------- bench


def test_bench_prints_ratios_with_their_conditions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.jsonl"
    arguments = ["bench", "resnet20", "--block", "8x8", "--sparsity", "0.5,0.9", "--batch", "1,2"]
    assert main([*arguments, "--against", "eager", "--pairs", "1", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("resnet20, blocks 8x8, float32, ")
    assert "dense ms" in out
    assert "median and quartiles of 1 interleaved pair." in out
    machine, *rows = map(json.loads, path.read_text().splitlines())
    assert machine["torch"] == torch.__version__
    assert [(row["batch"], row["sparsity"]) for row in rows] == [(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)]
    for row in rows:
        assert row["median"] > 0
        assert row["macs_dense"] == row["batch"] * DENSE_MACS  # with the layers that are gone at 90 %
        assert 0 < row["macs_run"] / row["macs_dense"] < 1 - 0.8 * row["sparsity"]


@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize(("shape", "sparsity"), [((8, 8), 0.75), ((16, 4), 0.5), ((4, 16), 0.9), ((1, 3), 0.9)])
def test_bench_spreads_the_kept_blocks_evenly(shape: tuple[int, int], sparsity: float, cover: bool) -> None:
    mask = spread_mask(shape, sparsity, torch.Generator().manual_seed(0), cover)
    assert int(mask.sum()) == max(*(shape if cover else (1,)), 1, round((1 - sparsity) * mask.numel()))
    for axis in (0, 1):
        counts = mask.sum(axis)
        assert counts.max() - counts.min() <= 1
        assert counts.min() >= 1 or not cover


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "resnet5"], "torchvision has no model 'resnet5'; did you mean resnet50"),
        ([*SMALL, "--shape", "1x3x-4x4"], "--shape: expected positive ints like 1x3x224x224"),
        ([*SMALL, "--block", "axb"], "--block: expected OUTxIN like 32x32 or 1xall, got 'axb'"),
        ([*SMALL, "--shape", "1x4x64x64"], "the forward of SqueezeNet fails on 1x4x64x64 float32"),
        ([*SMALL, "--sort", "size"], "sort: expected one of name,"),
        ([*SMALL, "--json", "/no/such/folder/a.json"], "No such file or directory"),
        ([*SMALL, "--html", "/no/such/folder/a.html"], "No such file or directory"),
        ([*SMALL, "--html", "/"], "cannot write /: it is a folder"),
        ([*SMALL, "--graph", "a.bmp"], "--graph: expected a name that ends in .svg, .png or .pdf, got 'a.bmp'"),
        ([*SMALL, "--json", "--csv", "-"], "only one output can go to stdout"),
        ([*SMALL, "--history", "a.jsonl"], "--history: is drawn on the page, so it goes with --html"),
        ([*SMALL, "--sparsity", "1.5"], "--sparsity: expected a fraction from 0 to 1, got 1.5"),
        (["convert", "resnet20", "-o", "a.onnx"], "--output: expected a name that ends in .pt2, .pt, .safetensors"),
        (["convert", "resnet20", "-o", "/no/such/a.pt2"], "No such file or directory"),
        (["convert", "resnet20"], "the following arguments are required: -o/--output"),
        (["bench", "resnet20", "--sparsity", "0.5;0.9"], "--sparsity: expected fractions from 0 to below 1"),
        (["bench", "resnet20", "--batch", "0"], "--batch: expected positive ints like 1,8, got '0'"),
        (["bench", "resnet20", "--against", "onnx"], "--against: expected eager or compiled, or both, got 'onnx'"),
        (["bench", "resnet20", "--pairs", "0"], "--pairs, --threads: expected at least 1, got 0, None"),
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
    assert out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "bad.pt"),
        ([1, 2], "expected a state dict of tensors, got list"),
        ({"epoch": 1, "best": 0.5}, "expected a state dict of tensors, got a dict with 'epoch', 'best'"),
        ({"conv9.weight": torch.ones(1)}, "Unexpected key"),
        (b"", "no checkpoint, or damaged: EOFError"),
        ({"model": {"conv1.weight": torch.ones(1)}, "options": {"block": 8}}, "expected the options of a training"),
    ],
)
def test_foreign_checkpoints_are_refused_by_name(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main(["report", "resnet20", "--checkpoint", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fxdbsr report: --checkpoint: {path}")
    assert message in err


def test_a_checkpoint_that_was_cut_off_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(resnet20().state_dict(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"--checkpoint: {path}: no checkpoint, or damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("line", ["{", "[1]"])
def test_a_broken_history_is_refused_by_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_text('{"loss": 1}\n' + line + "\n")
    assert main([*SMALL, "--html", str(tmp_path / "a.html"), "--history", str(tmp_path / "log")]) == 2
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    examples = [line.strip().partition(" | ")[0] for line in text.splitlines() if line.strip().startswith("fxdbsr ")]
    assert examples
    for example in examples:
        _, name, *arguments = shlex.split(example)
        parser, _ = _parser([name])
        assert parser.parse_args([name, *arguments]).command == command
    assert "JSON" in text


def test_no_command_prints_help_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fxdbsr.__version__


def test_python_dash_m_runs_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxdbsr", "report", "nosuchmodel"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fxdbsr report: torchvision has no model 'nosuchmodel'")
