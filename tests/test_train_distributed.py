"""`fxdbsr train` under torchrun: replicas and shards, killed and resumed, end with the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxdbsr.training import load_trained

SCRIPTS = Path(__file__).parent / "scripts"
# Norms of clipped gradients round otherwise in shards; begun later, that grows to 1e-4 (without clipping it is 0)
OPTIONS = (
    "--model", "tiny:net", "--block", "8x8", "--lr", "0.05", "--epochs", "3", "--clip", "0.5", "--begin", "0.1",
)  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the runs of `train_on_two.py`, of which `cut` was killed before."""
    root = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, "-m", "fxdbsr", "train", *OPTIONS, "--out", str(root / "cut")]
    # as `train_on_two.py` has it: sums of other numbers of threads round otherwise
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stderr": subprocess.DEVNULL, "cwd": SCRIPTS, "env": one_thread}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, **quiet)  # type: ignore[call-overload]
    process.stdout.readline()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    process.communicate(timeout=120)
    assert len(workers) == 2
    assert torch.load(root / "cut" / "last.pt", weights_only=True)["epoch"] < 3
    command = [*TORCHRUN, str(SCRIPTS / "train_on_two.py"), str(root), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=SCRIPTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def parameters(path: Path) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in load_trained(path).named_parameters()}


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("whole", "cut"), [("whole", "cut"), ("fsdp", "fsdp_cut")])
def test_a_killed_run_of_two_processes_goes_on_to_the_same_weights(
    folder: Path, whole: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SCRIPTS)
    one, other = (load_trained(folder / name / "last.pt").state_dict() for name in (whole, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert losses(folder / whole / "log.jsonl") == losses(folder / cut / "log.jsonl")


def test_shards_train_the_weights_that_replicas_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    replicas, shards = (parameters(folder / name / "last.pt") for name in ("whole", "fsdp"))
    for name, value in replicas.items():
        torch.testing.assert_close(shards[name], value, rtol=1e-4, atol=1e-5)


def test_one_process_writes_the_log(folder: Path) -> None:
    entries = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [1, 2, 3]
    assert entries[-1]["frozen"]
