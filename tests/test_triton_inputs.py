"""What the Triton engine refuses and in what words, its tables, its tuning, and the operator around it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.nn import fastest
from tests.triton_cases import (
    DEVICE,
    GPU,
    Case,
    build,
    check,
    float32_precision,
    imported,
    needs_interpreter,
    sparse,
    triton,
)

pytestmark = needs_interpreter
GRID = BlockGrid.of((64, 64, 3, 3), (32, 32))


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


@pytest.mark.parametrize(
    ("grid", "dtype", "device", "reason"),
    [
        (BlockGrid.of((64, 64, 3), (32, 32)), torch.float32, "cuda", "2-d convs"),
        (BlockGrid.of((64, 64, 3, 3), (32, 32), transposed=True), torch.float32, "cuda", "transposed"),
        (GRID, torch.float64, "cuda", "not float64"),
        (GRID, torch.int8, "cuda", "not int8"),
        (BlockGrid.of((64, 64, 9, 3), (32, 32)), torch.float32, "cuda", "up to 7 taps"),
        (BlockGrid.of((64, 3, 3, 3), (32, 32)), torch.float32, "cuda", "32 input channels"),
        (BlockGrid.of((64, 16, 3, 3), (32, 32), 4), torch.float32, "cuda", "32 input channels in a group"),
        (BlockGrid.of((64, 64, 3, 3), (4, 32)), torch.float32, "cuda", "this conv has 4x32"),
        (BlockGrid.of((256, 64, 3, 3), (256, 32)), torch.float32, "cuda", "this conv has 256x32"),
        (GRID, torch.float32, "meta", "the conv is on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_sentences(
    engine: ModuleType, grid: BlockGrid, dtype: torch.dtype, device: str, reason: str
) -> None:
    sentence = engine.why_not(grid, (1, 1), (1, 1), (1, 1), dtype, torch.device(device))
    assert reason in sentence


def test_old_gpus_are_refused(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    sentence = engine.why_not(GRID, (1, 1), (1, 1), (1, 1), torch.float32, torch.device("cuda"))
    assert "this device has (7, 5)" in sentence


@pytest.mark.parametrize(
    ("form", "dtype", "reason"),
    [
        ({"precision": "3xtf32"}, torch.float16, "precision: 3xtf32 is for float32"),
        ({"precision": "3xtf32", "kernel": "bitmask"}, torch.float32, "precision: .* for the gather kernel"),
        ({"precision": "tf64"}, torch.float32, "precision: expected 3xtf32 or None"),
        ({"kernel": "dense"}, torch.float32, "kernel: expected one of"),
        ({"rows_per_union": 3}, torch.float32, "rows_per_union: expected 1, 2 or 4"),
        ({"rows_per_union": 1, "tile": 99}, torch.float32, "tile: expected one of the"),
        ({"kernel": "bitmask"}, torch.float32, "kernel: the bitmask kernel has no tile .* with ieee products"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_other_forms_are_refused(engine: ModuleType, form: dict[str, Any], dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(engine, Case(form=form), dtype)


def test_unions_taller_than_a_tile_are_refused(engine: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"rows_per_union: .* at most 128 outputs, got 2 rows of 96"):
        check(engine, Case(outputs=192, block=(96, 32), form={"rows_per_union": 2}))


@pytest.mark.parametrize(
    ("case", "reason"),
    [(Case(channels=72), "evenly"), (Case(block=(16, 16)), "no tile")],
    ids=["edge blocks", "small blocks"],
)
def test_bitmask_refuses_other_blocks(engine: ModuleType, case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=f"kernel: the bitmask kernel .* {reason}"):
        check(engine, Case(channels=case.channels, block=case.block, form={"kernel": "bitmask"}), torch.float16)


def packed(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Packed blocks of a 1x1 conv of 32 channels."""
    values, crow, col = BlockGrid.of((32, 32, 1, 1), (32, 32)).pack(torch.ones(32, 32, 1, 1, dtype=dtype))
    return values.to(DEVICE), crow.to(DEVICE), col.to(DEVICE)


def call(engine: ModuleType, x: Tensor, tables: list[Tensor]) -> Tensor:
    rest = (32, 32, (1, 1), (0, 0), (1, 1), 1, "none", 0.0)
    y: Tensor = engine.conv(x, *packed(x.dtype), None, None, tables, *rest)
    return y


def make(engine: ModuleType, **form: Any) -> list[Tensor]:
    grid = BlockGrid.of((32, 32, 1, 1), (32, 32))
    tables: list[Tensor] = engine.tables(grid, *packed(), (1, 1), (0, 0), (1, 1), **form)
    return tables


def test_tables_whose_strides_were_lost_compute_the_same(engine: ModuleType) -> None:
    grid, x = BlockGrid.of((32, 32, 1, 1), (32, 32)), torch.randn(1, 32, 5, 4)
    weight = torch.randn(32, 32, 1, 1)
    with float32_precision("ieee"):
        blocks = [table.to(DEVICE) for table in grid.pack(weight)]
        tables = engine.tables(grid, *blocks, (1, 1), (0, 0), (1, 1))
        assert not tables[3].is_contiguous()
        for held in (tables, [table.contiguous() for table in tables]):
            y = call(engine, x.to(DEVICE), held).cpu()
            torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight))


def test_tables_of_another_engine_are_refused(engine: ModuleType) -> None:
    with pytest.raises(ValueError, match="tables: expected the 5 or 6"):
        call(engine, torch.zeros(1, 32, 2, 2, device=DEVICE), [])


@pytest.mark.parametrize("precision", [None, "3xtf32"])
def test_tables_of_another_dtype_are_refused(engine: ModuleType, precision: str | None) -> None:
    tables = make(engine, precision=precision)
    with pytest.raises(ValueError, match=r"tables: expected tables made for torch\.float16, got"):
        call(engine, torch.zeros(1, 32, 2, 2, device=DEVICE, dtype=torch.float16), tables)


def test_tables_on_another_device_are_refused(engine: ModuleType) -> None:
    tables = [table.to("meta") for table in make(engine)]
    with pytest.raises(ValueError, match="tables: expected on the device of input"):
        call(engine, torch.zeros(1, 32, 2, 2, device=DEVICE), tables)


def test_tf32_tables_are_refused_once_tf32_is_switched_off(engine: ModuleType) -> None:
    with float32_precision("tf32"):
        tables = make(engine)
    with float32_precision("ieee"), pytest.raises(ValueError, match="no longer allows for convs; convert anew"):
        call(engine, torch.zeros(1, 32, 2, 2, device=DEVICE), tables)


def test_one_image_beyond_32_bit_offsets_is_refused(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fxdbsr.kernels.triton_run"), "LIMIT", 100)
    with pytest.raises(ValueError, match=r"input: expected fewer than 2\*\*31 elements"):
        check(engine, Case())


def test_flops_count_what_is_multiplied(engine: ModuleType) -> None:
    data = build(Case(outputs=128, block=(32, 64)), torch.float16)
    values, crow, col = data.grid.pack(data.weight.half(), data.keep)

    def count(**form: Any) -> int:
        tables = engine.tables(data.grid, values, crow, col, (1, 1), (1, 1), (1, 1), **form)
        number: int = engine.packed_weights(values.shape, [t.shape for t in tables])
        return number

    assert count(kernel="bitmask") == values.numel()
    assert count(rows_per_union=1) == values.numel()
    assert count(rows_per_union=4) > values.numel()
    tables = make(engine, precision="3xtf32")
    assert engine.packed_weights((1, 32, 32, 1, 1), [t.shape for t in tables]) == 32 * 32


def tuned(engine: ModuleType, timer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `tune` chooses for a small conv, and what it found."""
    tune = importlib.import_module("fxdbsr.kernels.triton_tune")
    case = Case(outputs=128, size=(4, 4))
    data = build(case, torch.float16)
    blocks = [t.to(DEVICE) for t in data.grid.pack(data.weight.half(), data.keep)]
    x = data.input.to(DEVICE, torch.float16)
    chosen, found = tune.tune(data.grid, *blocks, *case.geometry, x, repeats=1, timer=timer)
    return chosen, found


def test_tune_takes_the_fastest_candidate(engine: ModuleType) -> None:
    chosen, found = tuned(engine, lambda runs: {name: 1.0 if name == "gather, 2 rows" else 2.0 for name in runs})
    assert chosen == {"kernel": "gather", "rows_per_union": 2}
    assert {"gather", "gather, 2 rows", "gather, 4 rows", "bitmask"} < set(found)
    assert any("64x" in name for name in found)
    assert any("splits" in name for name in found)


def test_tune_keeps_the_tile_that_won(engine: ModuleType) -> None:
    def last_wins(runs: dict[str, Any]) -> dict[str, float]:
        return {name: float(len(runs) - i) for i, name in enumerate(runs)}

    chosen, _ = tuned(engine, last_wins)
    assert chosen["pixels"] == 32
    check(engine, Case(outputs=128, size=(4, 4), form=chosen), torch.float16)


def test_tune_times_no_candidate_with_wrong_numbers(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = importlib.import_module("fxdbsr.kernels.triton_gather")
    launch = gather.launch

    def spoil(call: Any, tables: Any, *rest: Any) -> None:
        launch(call, tables, *rest)
        if tables[3].shape[1] == 64:
            call.output[0, 0, 0, 0] += 10

    monkeypatch.setattr(gather, "launch", spoil)
    _, found = tuned(engine, lambda runs: dict.fromkeys(runs, 1.0))
    assert "against float64" in found["gather, 2 rows"]
    assert found["gather, 4 rows"] == 1.0


def test_one_chain_of_float32_sums_is_right_beside_a_library_that_splits_them() -> None:
    wrong = importlib.import_module("fxdbsr.kernels.triton_tune").wrong
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(2304, 1000, generator=generator) * torch.randn(2304, 1000, generator=generator)
    exact = products.double().sum(0)
    chain = torch.zeros(1000)
    for product in products:
        chain += product
    split = products.view(16, -1, 1000).sum(1).double().sum(0).float()
    assert wrong(chain, exact, split, 2304) is None
    rounded = products.bfloat16().double().sum(0).float()
    assert "allowed" in str(wrong(rounded, exact, split, 2304))


def test_tune_passes_over_a_candidate_that_cannot_run(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = importlib.import_module("fxdbsr.kernels.triton_gather")
    launch = gather.launch

    def short_of_memory(call: Any, tables: Any, *rest: Any) -> None:
        if tables[3].shape[1] == 64:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        launch(call, tables, *rest)

    monkeypatch.setattr(gather, "launch", short_of_memory)
    _, found = tuned(engine, lambda runs: dict.fromkeys(runs, 1.0))
    assert "OutOfResources" in found["gather, 2 rows"]
    assert found["gather, 4 rows"] == 1.0


def test_candidates_are_timed_on_the_device_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(of.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("fxdbsr.kernels.triton_timing.graph_milliseconds", lambda calls: {"on": current[-1]})
    assert fastest.milliseconds({}, torch.device("cuda:1")) == {"on": 1}


def test_tune_without_a_right_candidate_raises(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = importlib.import_module("fxdbsr.kernels.triton_tune")
    monkeypatch.setattr(tune, "wrong", lambda *_: "wrong")
    with pytest.raises(RuntimeError, match="no candidate of the Triton engine gives right numbers"):
        tuned(engine, lambda runs: {})


def subprocess_output(code: str, **environment: str) -> str:
    """What `code` prints in a new process; it must succeed without a warning."""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WHY_NOT = """
import torch
from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton import why_not
grid = BlockGrid.of((64, 64, 3, 3), (32, 32))
print(why_not(grid, (1, 1), (1, 1), (1, 1), torch.float32, torch.device("cpu")))
"""


def test_missing_triton_is_a_sentence() -> None:
    code = "import sys; sys.modules['triton'] = None\n" + WHY_NOT
    assert "Triton is not installed" in subprocess_output(code)


def test_cpu_without_interpreter_is_a_sentence() -> None:
    assert "needs a CUDA device" in subprocess_output(WHY_NOT, TRITON_INTERPRET="0")


OPERATOR = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import ops, triton
torch.manual_seed(0)
torch.backends.cudnn.allow_tf32 = False
grid = BlockGrid.of((64, 64, 3, 3), (32, 32))
weight = torch.randn(64, 64, 3, 3)
keep = torch.tensor([[True, False], [True, True]])
weight *= grid.expand_mask(keep)
packed = grid.pack(weight)
tables = triton.tables(grid, *packed, (1, 1), (1, 1), (1, 1))
rest = (None, None, tables, 64, 64, [1, 1], [1, 1], [1, 1], 1, "relu", 0.01, "triton")
conv = torch.ops.fxdbsr.conv
x = torch.randn(2, 64, 5, 5)
expected = torch.relu(torch.nn.functional.conv2d(x, weight, padding=1))
def close(y): torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
close(conv(x, *packed, *rest))
torch.library.opcheck(conv, (x, *packed, *rest))
class Layer(torch.nn.Module):
    def forward(self, x): return conv(x, *packed, *rest)
close(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x))
close(torch.export.export(Layer(), (x,)).module()(x))
with FlopCounterMode(display=False) as counter:
    conv(x, *packed, *rest)
assert counter.get_total_flops() == 2 * 50 * triton.packed_weights(packed[0].shape, [t.shape for t in tables])
print("passed")
"""


@pytest.mark.skipif(GPU, reason="interpreted; the operator on a GPU has its own tests")
def test_operator_compiles_exports_and_counts() -> None:
    code = "import warnings; warnings.simplefilter('ignore')\n" + OPERATOR
    assert "passed" in subprocess_output(code, TRITON_INTERPRET="1")


def test_one_row_and_four_rows_to_a_union_agree(engine: ModuleType) -> None:
    case = Case(outputs=128, density=0.3)
    data = build(case, torch.float16)
    one, four = (sparse(engine, replace(case, form={"rows_per_union": rows}), data, torch.float16) for rows in (1, 4))
    torch.testing.assert_close(one, four)
