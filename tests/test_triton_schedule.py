"""In which order programs start, and when the last one is done."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from heapq import heapreplace
from random import Random
from types import ModuleType

import pytest
import torch

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_forms import Form
from fxdbsr.kernels.triton_pack import pack
from fxdbsr.kernels.triton_pack_bitmask import pack_bitmask
from fxdbsr.kernels.triton_schedule import makespan
from tests.triton_cases import Case, check, imported, needs_interpreter


def one_by_one(costs: list[float], each: int, processors: int) -> float:
    """Every program on the processor that is free first."""
    loads = [0.0] * processors
    for cost in costs:
        for _ in range(each):
            heapreplace(loads, loads[0] + cost)
    return max(loads)


@pytest.mark.parametrize("seed", range(50))
def test_the_makespan_is_that_of_programs_started_one_by_one(seed: int) -> None:
    pick = Random(seed)
    costs = [pick.randint(1, 50) * 1.0 for _ in range(pick.randint(1, 6))]
    for order in (costs, sorted(costs, reverse=True)):
        each, processors = pick.randint(1, 400), pick.randint(1, 40)
        assert makespan(order, each, processors) == one_by_one(order, each, processors)


def test_the_longest_first_end_sooner_than_the_longest_last() -> None:
    costs = [32.0, 27.0, 23.0, 5.0]
    assert makespan(costs, 98, 132) < makespan(costs[::-1], 98, 132)


@pytest.mark.parametrize("form", [Form("gather", 2, "16"), Form("bitmask", 4, "16")], ids=str)
def test_unions_come_with_the_longest_first(form: Form) -> None:
    grid = BlockGrid.of((512, 256, 3, 3), (32, 32))
    keep = torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 16)[:, None]
    make = pack if form.kernel == "gather" else pack_bitmask
    pointers = make(grid, *grid.pack(torch.ones(512, 256, 3, 3).half(), keep), form)[2]
    lengths = pointers.diff().tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


@needs_interpreter
@pytest.mark.parametrize("kernel", ["gather", "bitmask"])
@pytest.mark.parametrize("tiles", [1, 2, 3], ids=lambda tiles: f"{tiles} tiles at once")
def test_tiles_in_groups_compute_the_same(
    engine: ModuleType, kernel: str, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(channels=32, outputs=256, size=(13, 25), kernel=(1, 1), padding=(0, 0), form={"kernel": kernel})
    bytes_of_a_tile = 128 * case.channels * 2  # five of the bitmask kernel's, five to eleven of the gather kernel's
    monkeypatch.setattr(importlib.import_module("fxdbsr.kernels.triton_call"), "AT_ONCE", tiles * bytes_of_a_tile)
    check(engine, case, torch.float16)
