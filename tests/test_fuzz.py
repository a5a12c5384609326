"""500 random cases through every backend; and that the fuzzer finds, names and shrinks what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import fuzz
from bench.fuzz_cases import ConvCase, NetCase, draw
from fxdbsr.nn.packed import PackedConv

ROOT = Path(__file__).parents[1]


def test_500_cases_hold_on_every_backend() -> None:
    command = [sys.executable, "-m", "bench.fuzz", "--cases", "500", "--triton-every", "60", "--part"]
    parts = [
        subprocess.Popen([*command, part], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for part in ("1/2", "2/2")
    ]
    for part in parts:
        said = part.communicate(timeout=900)[0]
        assert part.returncode == 0, said
        assert said.endswith("250 cases, 0 failed\n"), said


def test_a_seed_is_one_case_and_seeds_cover_what_there_is() -> None:
    cases = [draw(seed) for seed in range(400)]
    assert cases == [draw(seed) for seed in range(400)]
    convs = [case for case in cases if isinstance(case, ConvCase)]
    assert len(convs) == 300
    for name, count in (("dtype", 4), ("layout", 5), ("padding_mode", 4), ("residual", 3), ("activation", 8)):
        assert len({getattr(case, name) for case in convs}) == count
    assert {len(case.kernel) for case in convs} == {1, 2, 3}
    assert {case.batch for case in convs} >= {0, 1, 5}
    assert any(case.transposed for case in convs)
    assert any(case.function for case in convs)


def wrong_where(kernel: int) -> Any:
    """A forward of `PackedConv` that is off by 0.1 % where the kernel has so many rows."""
    right = PackedConv.forward

    def forward(self: PackedConv, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = right(self, input, residual)
        return y * 1.001 if self.grid.kernel_size[0] == kernel else y

    return forward


def test_a_wrong_layer_is_found_named_and_shrunk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PackedConv, "forward", wrong_where(3))
    monkeypatch.setattr(fuzz, "at_hand", lambda: ["reference"])
    threads = torch.get_num_threads()
    try:
        found = fuzz.run(0, 24)["failed"]
    finally:
        torch.set_num_threads(threads)
    assert found
    said = capsys.readouterr().out
    for case in found:
        assert f"seed {case['seed']}: reference: error" in said
        least = eval(case["shrunk"], {"ConvCase": ConvCase, "NetCase": NetCase})
        if isinstance(least, ConvCase):
            assert (least.kernel[0], *least.kernel[1:]) == (3, *[1] * (len(least.kernel) - 1))
            assert (least.batch, least.stride, least.activation, least.norm) == (1, (1,) * len(least.kernel), "none", 0)
    kept = {case["seed"] for case in found}
    monkeypatch.undo()
    assert not [seed for seed in kept if fuzz.failures(draw(seed), ["reference"])]


def test_lines_in_the_results_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.jsonl"
    command = [sys.executable, "-m", "bench.fuzz", "--cases", "2", "--seed", "4", "--json", str(path)]
    for seconds in (None, 1e9):
        if seconds:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}) + "\n")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["seconds"] == 1e9
    assert {"first", "cases", "failed", "counts", "about"} <= json.loads(line).keys()
