"""bench/gpu.py and bench/inspect_kernels.py where there is no GPU: exit codes, resuming, what they claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` from the repository's root."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_exits_2_and_says_so(tmp_path: Path) -> None:
    done = run("bench.gpu", "--out", str(tmp_path / "gpu.jsonl"))
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_offline_claims_no_measurement_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    arguments = ("--offline", "--part", "layers", "--model", "vgg11", "--dtype", "fp16", "--out", str(out))
    first = run("bench.gpu", *arguments)
    assert first.returncode == 0, first.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 7 * 2 * 3  # distinct convs, blocks, sparsities
    assert not any(record["measured"] for record in records)
    assert {record["choice"].split(",")[0] for record in records} == {"dense", "sparse"}
    assert all(record["reason"] for record in records if record["choice"] == "dense")
    again = run("bench.gpu", *arguments)
    assert again.returncode == 0
    assert again.stdout == ""


MEASURE = """
import torch
from bench.gpu import Conv, measure, set_precision
set_precision("fp32")
layer = Conv(64, 64, (3, 3), (1, 1), (1, 1), 1, (5, 5)).layer(2, torch.float32, (32, 32), 0.5)
record = measure("correctness", layer, 1)
assert "wrong" not in record, record
print(sorted(record))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_correctness_part_checks_every_form() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["error 1 rows", "error 2 rows", "error 3xtf32", "error 4 rows", "error chosen"])


def test_inspect_prints_facts_of_every_tile() -> None:
    done = run(
        "bench.inspect_kernels",
        "--target",
        "hip:gfx942",
        "--geometry",
        "1x1",
        "--precision",
        "ieee",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["precision"] for record in records} == {"ieee"}
    assert all(record["spills"] == 0 and record["faults"] == [] for record in records)
