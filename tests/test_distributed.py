"""Two processes on gloo: DDP and FSDP2 hold the same zeros on every rank at every step, and train as one does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "two_ranks.py"
WRAPPERS = ("ddp", "fsdp", "fsdp_layers")
WAYS: dict[str, dict[str, Any]] = {"target": {"target": 0.6, "of": "macs", "steps": 12}, "gamma": {"gamma": 0.12}}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two ranks saw in each case, by one run of torchrun."""
    path = tmp_path_factory.mktemp("ranks") / "seen.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process sees that trains on all images."""
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {way: script.train(lambda model: model, options, 0, 1) for way, options in WAYS.items()}
    found["penalty"] = script.train(lambda model: model, WAYS["target"], 0, 1, penalty=1e-4)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("way", ["target", "gamma", "deadly gamma", "penalty"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_both_ranks_hold_the_same_zeros_at_every_step(seen: dict[str, Any], wrapper: str, way: str) -> None:
    first, second = seen[f"{wrapper} {way}"]
    assert first["zeros"] == second["zeros"]
    assert first["weights"] == second["weights"]
    assert first["zeros"][-1].count("0") > 3


@pytest.mark.parametrize("way", [*WAYS, "penalty"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_reach_the_zeros_and_weights_of_one_process(
    seen: dict[str, Any], alone: dict[str, Any], wrapper: str, way: str
) -> None:
    found, expected = seen[f"{wrapper} {way}"][0], alone[way]
    assert found["zeros"] == expected["zeros"]
    assert found["weights"] == pytest.approx(expected["weights"], rel=1e-3)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_scales_stand_still_on_both_ranks_until_blocks_go(seen: dict[str, Any], wrapper: str) -> None:
    for rank in seen[f"{wrapper} from the middle on"]:
        steps = len(rank["moved"])
        assert rank["moved"] == [step >= steps / 2 for step in range(1, steps + 1)]


def test_the_target_is_met_on_two_ranks(seen: dict[str, Any]) -> None:
    for wrapper in WRAPPERS:
        assert [found["frozen"] for found in seen[f"{wrapper} target"]] == [True, True]
    assert seen["in advance"][0]["zeros"] == seen["fsdp target"][0]["zeros"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_gamma_that_kills_everything_leaves_a_path_on_shards(seen: dict[str, Any], wrapper: str) -> None:
    kept = [zeros.count("1") for zeros in seen[f"{wrapper} deadly gamma"][0]["zeros"]]
    assert all(2 <= count <= 4 for count in kept)


def test_ranks_that_see_images_of_other_sizes_mask_alike(seen: dict[str, Any]) -> None:
    first, second = seen["uneven"]
    assert first["zeros"] == second["zeros"]


def test_a_target_out_of_reach_is_refused_on_every_rank(seen: dict[str, Any]) -> None:
    assert all("at most 0.9" in message for message in seen["refused"])
