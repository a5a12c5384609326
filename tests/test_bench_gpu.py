"""bench/gpu.py and its companions where there is no GPU: exit codes, resuming, what they claim, that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fxdbsr
from bench import gpu, gpu_convs, gpu_first, gpu_layers, gpu_models, gpu_plan, inspect_kernels
from bench.gpu_convs import Conv
from bench.gpu_hazards import CONVS
from bench.gpu_networks import deadline, live_mask, pruned, sparse_arms
from bench.gpu_setting import Case, Records, Setting
from fxdbsr.nn.packed import PackedConv
from tests.triton_cases import float32_precision, needs_interpreter

ROOT = Path(__file__).parents[1]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two convs stand for every network; switches that the bench sets are put back."""
    listed = {CONVS["1x1"]: 2, CONVS["3x3"]: 1}
    for module in (gpu_convs, gpu_plan, gpu_layers, gpu_models):
        monkeypatch.setattr(module, "convs", lambda model: listed)
    with float32_precision("tf32"):
        yield


@needs_no_gpu
def test_without_a_gpu_it_exits_2_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert gpu_first.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert capsys.readouterr().err.count("no GPU here") == 2


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_offline_claims_no_measurement_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.jsonl"
    arguments = ["--offline", "--part", "layers", "models", "--model", "vgg11", "--dtype", "fp16", "--out", str(out)]
    assert gpu.main(arguments) == 0
    found = records(out)
    assert len(found) == 2 * 2 * 3 + 2 * 3  # convs, blocks, sparsities; networks
    assert not any(record["measured"] for record in found)
    assert all(record["reason"] and "ceiling" in record for record in found if record["key"]["part"] == "layers")
    assert "ceiling" in capsys.readouterr().out
    assert gpu.main(arguments) == 0
    assert capsys.readouterr().out == ""


def test_every_layer_is_printed_with_ceiling_choice_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.jsonl"
    gpu_plan.main(["--model", "resnet50", "--dtype", "fp16", "--block", "128x32", "--json", str(path)])
    head, *rows = records(path)
    assert head["measured"] is False
    assert [row["count"] for row in rows] == [2, 1]
    assert all(row[f"{s} %"]["reason"] for row in rows for s in (50, 70, 90))
    assert capsys.readouterr().out.count("ceiling") == 6


REHEARSAL = """
import sys
import fxdbsr
from bench import gpu, gpu_convs, gpu_layers, gpu_models
from bench.gpu_hazards import CONVS
listed = {CONVS["1x1"]: 1}
gpu_convs.convs = gpu_layers.convs = gpu_models.convs = lambda model: listed
sys.exit(gpu.main(sys.argv[1:]))
"""


@needs_no_gpu
@needs_interpreter
def test_the_measuring_code_of_every_part_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    parts = [part for part in gpu.PARTS if part != "sanitizer"]  # which starts a process of its own
    command = [sys.executable, "-c", REHEARSAL, "--offline", "--rehearse", "--limit", "2", "--repeats", "1"]
    command += ["--out", str(out), "--part", *parts, "--sparsity", "50"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = records(out)
    assert {record["key"]["part"] for record in found} == set(parts)
    assert not any(record["measured"] or "wrong" in record or "failed" in record for record in found)


@dataclass
class Fake:
    """A part with one case, whose measurement does as it is told."""

    error: Exception | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def cases(self, options: Any) -> Iterator[Case]:
        def measure(setting: Setting) -> dict[str, Any]:
            if self.error:
                raise self.error
            return self.found

        yield Case({"part": "hazards"}, dict, measure)


def run_fake(monkeypatch: pytest.MonkeyPatch, path: Path, fake: Fake, lost: bool = False) -> int:
    """`bench.gpu` with `fake` for a part, as if there were a GPU."""

    def synchronize() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "import_module", lambda name: fake)
    return gpu.main(["--part", "hazards", "--out", str(path)])


def test_wrong_numbers_exit_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run_fake(monkeypatch, path, Fake(found={"wrong": "error 1"})) == 1
    assert records(path)[0]["measured"]


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run_fake(monkeypatch, path, Fake(RuntimeError("out of memory"))) == 0
    assert records(path)[0]["failed"] == "RuntimeError: out of memory"


def test_a_lost_gpu_exits_3_and_the_case_is_skipped_next_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run_fake(monkeypatch, path, Fake(RuntimeError("launch failed")), lost=True) == 3
    assert "illegal memory access" in records(path)[0]["interrupted"]
    assert run_fake(monkeypatch, path, Fake(RuntimeError("launch failed")), lost=True) == 0
    assert len(records(path)) == 1


def test_estimates_do_not_count_as_measured(tmp_path: Path) -> None:
    case = Case({"part": "x"}, dict, None)
    Records(tmp_path / "r.jsonl", measured=False).add(case, {})
    assert Records(tmp_path / "r.jsonl", measured=False).has(case)
    assert not Records(tmp_path / "r.jsonl", measured=True).has(case)


@pytest.mark.parametrize(("shape", "density"), [((4, 9), 0.5), ((16, 8), 0.1), ((1, 3), 0.1), ((5, 5), 1.0)])
def test_masks_leave_no_row_and_no_column_empty(shape: tuple[int, int], density: float) -> None:
    mask = live_mask(shape, density, torch.Generator().manual_seed(0))
    assert mask.any(0).all()
    assert mask.any(1).all()
    assert mask.sum() == max(round(density * mask.numel()), *shape)


def test_networks_are_planned_for_the_size_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fxdbsr.convert
    monkeypatch.setattr(fxdbsr, "convert", lambda source, backend: convert(source, backend="dense"))
    arms = sparse_arms(pruned("tiny", (32, 32), 0.5), torch.zeros(5, 3, 8, 8), "fp16")
    for arm in arms.values():
        sizes = [layer.input_size for layer in arm.modules() if isinstance(layer, PackedConv)]
        assert sizes == [(5, 8, 8), (5, 6, 6)]


def test_a_deadline_interrupts() -> None:
    with pytest.raises(TimeoutError, match="over 0 s"), deadline(0.01):
        time.sleep(10)


def test_the_first_half_hour_lists_and_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main(["--list"]) == 0
    assert "headline" in capsys.readouterr().out
    key = {"part": "models", "model": "resnet50", "dtype": "fp16", "batch": 32, "block": "128x32", "sparsity": 50}
    measured = {"key": key, "measured": True, "sparse over compiled": [1.4, 1.45, 1.5]}
    text = gpu_first.summary([measured, {"key": {"part": "x"}, "measured": True, "wrong": "error 1"}])
    assert "2 of 2 records measured, 1 wrong or failed" in text
    assert "resnet50 fp16 b32 128x32 sparse: 1.45 (of 1.5)" in text


def test_the_first_half_hour_calls_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(gpu, "main", note)
    assert gpu_first.main(["--offline", "--out", str(tmp_path / "gpu.jsonl")]) == 0
    parsed = [gpu.parse(arguments) for arguments in calls]
    assert {part for options in parsed for part in options.part} == set(gpu.PARTS)
    assert all(options.rehearse for options in parsed)


AHEAD = """
from bench.gpu_ahead import compile_job, only_compile
from bench.gpu_hazards import CONVS
only_compile(90)
print(compile_job((CONVS["1x1"], "fp16", 2, "32x32", 50)))
"""


@needs_no_gpu
def test_a_forward_reads_nothing_back_from_tensors_without_data(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", AHEAD]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.stdout == "None\n", done.stdout + done.stderr
    assert list(tmp_path.rglob("gather_kernel.cubin"))


def test_convs_have_names_that_tell_them_apart() -> None:
    names = {conv.name for conv in CONVS.values()}
    assert len(names) == len(CONVS)
    assert Conv(64, 64, (3, 3), (2, 2), (1, 1), 32, (56, 56), False, "relu").name == "64->64 3x3 at 56 /2 g32 relu"


def test_inspect_prints_facts_of_every_tile(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "hip:gfx942", "--geometry", "1x1", "--precision", "ieee", "--json"]
    assert inspect_kernels.main(arguments) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["precision"] for record in found} == {"ieee"}
    assert all(record["spills"] == 0 and record["faults"] == [] for record in found)
