"""The Triton engine against float64: compiled where there is a GPU, interpreted on the CPU elsewhere.

Triton decides when a kernel module is imported whether its kernels are compiled or interpreted. The fixture
`engine` therefore imports a second copy of the engine's modules under TRITON_INTERPRET=1 and puts the first
ones back afterwards, so that other test files in the same process see kernels that compile.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import reference
from fxdbsr.kernels.geometry import ACTIVATIONS, output_size

triton = pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    not GPU
    and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton before 3.7 fails with numpy 2.4 and later",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    """`fxdbsr.kernels.triton`, its kernels interpreted where there is no GPU."""
    if GPU:
        yield importlib.import_module("fxdbsr.kernels.triton")
        return
    ours = "fxdbsr.kernels.triton"
    kept = forget(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module(ours)
    forget(ours)
    package = importlib.import_module("fxdbsr.kernels")
    for name, module in kept.items():
        sys.modules[name] = module
        setattr(package, name.rpartition(".")[2], module)


def forget(prefix: str) -> dict[str, ModuleType]:
    """Take the modules whose names start with `prefix` out of the process, as if never imported."""
    package = importlib.import_module(prefix.rpartition(".")[0])
    taken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(prefix)}
    for name in taken:
        delattr(package, name.rpartition(".")[2])
    return taken


@dataclass(frozen=True)
class Case:
    """A conv with random blocks; every default is the plainest choice."""

    channels: int = 64
    outputs: int = 64
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (6, 5)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: tuple[int, int] = (32, 32)
    density: float = 0.5
    batch: int = 2
    bias: bool = True
    residual: bool = True
    activation: str = "relu"
    rows_per_union: int | None = None
    table: str = "gather"
    precision: str | None = None


def build(case: Case, dtype: torch.dtype) -> tuple[BlockGrid, Tensor, Tensor, Tensor, Tensor, Any, Any]:
    """grid, weight, input, keep, output size, bias or None, residual or None; float64, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    shape = (case.outputs, case.channels // case.groups, *case.kernel)
    grid = BlockGrid.of(shape, case.block, case.groups)
    keep = torch.rand(grid.shape, generator=generator) < case.density
    weight = random(*shape) * grid.expand_mask(keep)
    x = random(case.batch, case.channels, *case.size)
    spatial = output_size(case.size, case.kernel, case.stride, case.padding, case.dilation)
    bias = random(case.outputs) if case.bias else None
    residual = random(case.batch, case.outputs, *spatial) if case.residual else None
    return grid, weight, x, keep, torch.tensor(spatial), bias, residual


def check(engine: ModuleType, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The engine's error against float64 is at most twice eager's plus one ulp of the largest output."""
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    grid, weight, x, keep, _, bias, residual = build(case, dtype)
    arguments = (case.stride, case.padding, case.dilation)
    assert engine.why_not(grid, *arguments, dtype, DEVICE) is None

    def dense(to: torch.dtype) -> Tensor:
        b = None if bias is None else bias.to(DEVICE, to)
        y = F.conv2d(x.to(DEVICE, to), weight.to(DEVICE, to), b, *arguments, case.groups)
        return reference.activate(y if residual is None else y + residual.to(DEVICE, to), case.activation)

    exact, eager = dense(torch.float64), dense(dtype)
    values, crow, col = (t.to(DEVICE) for t in grid.pack(weight.to(dtype), keep))
    tables = engine.tables(grid, values, crow, col, *arguments, case.rows_per_union, case.table, case.precision)
    y = engine.conv(
        x.to(DEVICE, dtype),
        engine.layout(values),
        crow,
        col,
        None if bias is None else bias.to(DEVICE, dtype),
        None if residual is None else residual.to(DEVICE, dtype),
        tables,
        case.channels,
        case.outputs,
        *arguments,
        case.groups,
        case.activation,
        0.01,
    )
    assert y.dtype == dtype
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    largest = exact.abs().max().item()
    allowed = 2 * (eager - exact).abs().max().item() + torch.finfo(dtype).eps * largest
    error = (y - exact).abs().max().item()
    assert error <= allowed  # false for NaN


@pytest.fixture(autouse=True)
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `torch.empty` of floats holds NaN, so that unwritten elements fail."""
    empty = torch.empty

    def nans(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nans)


SHAPES = {
    "3x3": Case(),
    "1x1": Case(kernel=(1, 1), padding=(0, 0)),
    "1x1 stride 2": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2), size=(5, 7)),
    "1x1 padded": Case(kernel=(1, 1), padding=(1, 2)),
    "2x2": Case(kernel=(2, 2), padding=(0, 1)),
    "5x5 dilated": Case(kernel=(5, 5), padding=(4, 4), dilation=(2, 2), channels=32),
    "6x6": Case(kernel=(6, 6), padding=(3, 3), channels=32, outputs=32, density=1),
    "7x7 stride 2": Case(kernel=(7, 7), padding=(3, 3), stride=(2, 2), channels=32, size=(9, 8)),
    "7x7 unpadded": Case(kernel=(7, 7), padding=(0, 0), channels=32, outputs=32, size=(8, 9), density=1),
    "7x1": Case(kernel=(7, 1), padding=(3, 0)),
    "1x7": Case(kernel=(1, 7), padding=(0, 3)),
    "3x3 unpadded": Case(padding=(0, 0)),
    "uneven": Case(stride=(2, 1), padding=(0, 2), dilation=(1, 3), kernel=(2, 3), size=(7, 9)),
    "one pixel": Case(size=(1, 1), batch=1),
    "edge blocks": Case(channels=72, outputs=56),
    "edge blocks, odd sizes": Case(channels=37, outputs=45, size=(3, 3), batch=1),
    "blocks 8x8": Case(block=(8, 8), channels=40, outputs=24),
    "blocks 24x40": Case(block=(24, 40), channels=96, outputs=96),
    "blocks 64x16": Case(block=(64, 16), outputs=128),
    "blocks 128x32": Case(block=(128, 32), outputs=160),
    "blocks 16x128": Case(block=(16, 128), channels=192),
    "groups": Case(channels=96, outputs=96, groups=3, block=(16, 16)),
    "groups, edge blocks": Case(channels=80, outputs=48, groups=2, block=(16, 32)),
    "groups share a row": Case(channels=128, outputs=48, groups=4, block=(32, 16), density=0.7),
    "nothing stored": Case(density=0),
    "all stored": Case(density=1),
    "no bias, no residual": Case(bias=False, residual=False, activation="none"),
    "bias only": Case(residual=False),
    "residual only": Case(bias=False),
    "few blocks of many": Case(channels=128, outputs=128, block=(16, 16), density=0.05),
    "many pixels": Case(channels=32, outputs=32, size=(19, 23), kernel=(1, 1), padding=(0, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_matches_float64(engine: ModuleType, case: Case, dtype: torch.dtype) -> None:
    check(engine, case, dtype)


@pytest.mark.parametrize("rows_per_union", [1, 2, 4])
@pytest.mark.parametrize("block", [(8, 8), (32, 32), (48, 16)], ids=str)
def test_any_number_of_rows_to_a_union(engine: ModuleType, block: tuple[int, int], rows_per_union: int) -> None:
    if rows_per_union * block[0] > 128:
        pytest.skip("the union would be taller than 128 outputs")
    check(engine, Case(outputs=96, block=block, rows_per_union=rows_per_union))


BITMASK = {
    "3x3": Case(channels=96, outputs=160, table="bitmask"),
    "1x1": Case(kernel=(1, 1), padding=(0, 0), outputs=128, table="bitmask"),
    "7x7": Case(kernel=(7, 7), padding=(3, 3), channels=32, outputs=32, density=1, table="bitmask"),
    "blocks 32x32, stride 2": Case(outputs=128, table="bitmask", stride=(2, 1)),
    "groups": Case(groups=2, channels=128, outputs=192, table="bitmask", dilation=(1, 2)),
    "nothing stored": Case(density=0, table="bitmask"),
    "all stored, no residual": Case(density=1, residual=False, table="bitmask"),
    "no bias": Case(bias=False, table="bitmask", activation="silu"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BITMASK.values(), ids=BITMASK)
def test_bitmask_matches_float64(engine: ModuleType, case: Case, dtype: torch.dtype) -> None:
    check(engine, case, dtype)


def test_bitmask_with_tall_blocks(engine: ModuleType) -> None:
    check(engine, Case(block=(64, 32), outputs=128, table="bitmask"), torch.float16)


@pytest.mark.parametrize(
    ("case", "reason"),
    [(Case(channels=72, table="bitmask"), "evenly"), (Case(block=(16, 16), table="bitmask"), "no tile")],
    ids=["edge blocks", "small blocks"],
)
def test_bitmask_refuses_other_blocks(engine: ModuleType, case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=f"kernel: the bitmask kernel .* {reason}"):
        check(engine, case)


def test_bitmask_multiplies_no_padding(engine: ModuleType) -> None:
    grid, weight, _, keep, _, _, _ = build(Case(channels=128, outputs=128), torch.float32)
    values, crow, col = grid.pack(weight.float(), keep)
    tables = engine.tables(grid, values, crow, col, (1, 1), (1, 1), (1, 1), kernel="bitmask")
    assert engine.packed_weights(values.shape, [t.shape for t in tables]) == values.numel()


PRECISE = {
    "3x3": Case(precision="3xtf32"),
    "1x1, edge blocks": Case(kernel=(1, 1), padding=(0, 0), channels=72, outputs=56, precision="3xtf32"),
    "128 outputs": Case(channels=32, outputs=128, block=(128, 32), precision="3xtf32"),
    "nothing stored": Case(density=0, precision="3xtf32"),
}


@pytest.mark.parametrize("case", PRECISE.values(), ids=PRECISE)
def test_3xtf32_is_as_accurate_as_float32(engine: ModuleType, case: Case) -> None:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        check(engine, case)
    finally:
        conv.fp32_precision = before


def test_3xtf32_splits_without_loss(engine: ModuleType) -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    pack = importlib.import_module("fxdbsr.kernels.triton_pack")
    high = pack.round_to_tf32(x)
    low = pack.round_to_tf32(x - high)
    assert ((high.view(torch.int32) & 0x1FFF) == 0).all()
    torch.testing.assert_close(high.double() + low.double(), x.double(), rtol=2**-22, atol=0)


def test_3xtf32_counts_a_product_once(engine: ModuleType) -> None:
    grid = BlockGrid.of((32, 32, 1, 1), (32, 32))
    values, crow, col = grid.pack(torch.ones(32, 32, 1, 1))
    tables = engine.tables(grid, values, crow, col, (1, 1), (0, 0), (1, 1), precision="3xtf32")
    assert engine.packed_weights(values.shape, [t.shape for t in tables]) == 32 * 32


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Case(precision="3xtf32"), torch.float16, "is for float32"),
        (Case(precision="3xtf32", table="bitmask"), torch.float32, "for the gather kernel"),
        (Case(precision="tf64"), torch.float32, "expected 3xtf32 or None"),
        (Case(table="dense"), torch.float32, "expected gather or bitmask"),
    ],
    ids=["float16", "bitmask", "unknown precision", "unknown kernel"],
)
def test_other_precisions_and_kernels_are_refused(
    engine: ModuleType, case: Case, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check(engine, case, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(engine: ModuleType, activation: str) -> None:
    check(engine, Case(channels=32, activation=activation))


def run(engine: ModuleType, x: Tensor, weight: Tensor, activation: str = "none") -> Tensor:
    """A padded 3x3 conv or an unpadded 1x1 conv without an epilogue, blocks of 32x32."""
    grid = BlockGrid.of(tuple(weight.shape), (32, 32))
    values, crow, col = (t.to(DEVICE) for t in grid.pack(weight))
    padding = [weight.shape[2] // 2] * 2
    tables = engine.tables(grid, values, crow, col, (1, 1), padding, (1, 1))
    sizes = weight.shape[1], weight.shape[0]
    y: Tensor = engine.conv(
        x.to(DEVICE),
        values,
        crow,
        col,
        None,
        None,
        tables,
        *sizes,
        (1, 1),
        padding,
        (1, 1),
        1,
        activation,
        0.01,
    )
    return y.cpu()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through(engine: ModuleType, activation: str) -> None:
    x = torch.zeros(1, 32, 2, 2)
    x[0, 0, 0, 0] = float("nan")
    y = run(engine, x, torch.ones(32, 32, 1, 1), activation)
    assert y[0, :, 0, 0].isnan().all()
    assert y[0, :, 1, :].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("size", [1, 3])
def test_padding_of_a_step_never_reads_an_infinity(engine: ModuleType, size: int) -> None:
    x = torch.zeros(1, 40, 3, 3)
    x[0, 0] = float("inf")
    y = run(engine, x, torch.ones(32, 40, size, size))
    assert y.isposinf().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinities_stay_in_their_group(engine: ModuleType) -> None:
    case = Case(channels=80, outputs=32, groups=2, kernel=(1, 1), padding=(0, 0), density=1)
    grid, weight, x, _, _, _, _ = build(case, torch.float32)
    x[:, 40:] = float("inf")
    values, crow, col = grid.pack(weight.float())
    tables = engine.tables(grid, values, crow, col, (1, 1), (0, 0), (1, 1))
    arguments = (tables, 80, 32, (1, 1), (0, 0), (1, 1), 2, "none", 0.0)
    moved = (t.to(DEVICE) for t in (x.float(), values, crow, col))
    if GPU:
        arguments = ([t.to(DEVICE) for t in tables], *arguments[1:])
    y = engine.conv(*moved, None, None, *arguments)
    assert y[:, :16].isfinite().all()


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_split_reduction_is_right_and_repeats_exactly(
    engine: ModuleType, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = engine.choose_tile

    def split(*args: Any) -> tuple[Any, int]:
        return choose(*args)[0], splits

    monkeypatch.setattr(engine, "choose_tile", split)
    check(engine, Case(channels=128, outputs=72))
    check(engine, Case(density=0))
    x, w = torch.randn(1, 64, 4, 4), torch.randn(64, 64, 3, 3)
    assert torch.equal(run(engine, x, w), run(engine, x, w))


def test_one_table_serves_every_size(engine: ModuleType) -> None:
    torch.manual_seed(0)
    grid = BlockGrid.of((32, 64, 3, 3), (32, 32))
    weight = torch.randn(32, 64, 3, 3)
    values, crow, col = (t.to(DEVICE) for t in grid.pack(weight))
    tables = engine.tables(grid, values, crow, col, (1, 1), (1, 1), (1, 1))
    for shape in ((1, 64, 3, 4), (3, 64, 7, 2)):
        x = torch.randn(shape, device=DEVICE)
        y = engine.conv(x, values, crow, col, None, None, tables, 64, 32, (1, 1), (1, 1), (1, 1), 1, "none", 0.0)
        torch.testing.assert_close(y, F.conv2d(x, weight.to(DEVICE), padding=1), rtol=1e-4, atol=1e-3)


def test_batches_beyond_32_bit_offsets_run_in_parts(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIMIT", 64 * 6 * 5 * 2)
    check(engine, Case(batch=5))


def test_one_image_beyond_32_bit_offsets_is_refused(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIMIT", 100)
    with pytest.raises(ValueError, match=r"input: expected fewer than 2\*\*31 elements"):
        check(engine, Case())


def test_tables_of_another_engine_are_refused(engine: ModuleType) -> None:
    values = torch.zeros(0, 32, 32, 1, 1)
    empty = torch.zeros(2, dtype=torch.int32)
    x = torch.zeros(1, 32, 2, 2)
    with pytest.raises(ValueError, match="tables: expected the 4 or 5"):
        engine.conv(x, values, empty, empty, None, None, [], 32, 32, (1, 1), (0, 0), (1, 1), 1, "none", 0.0)


def test_tables_of_another_dtype_are_refused(engine: ModuleType) -> None:
    grid = BlockGrid.of((32, 32, 1, 1), (32, 32))
    values, crow, col = (t.to(DEVICE) for t in grid.pack(torch.ones(32, 32, 1, 1)))
    geometry = (1, 1), (0, 0), (1, 1)
    x = torch.zeros(1, 32, 2, 2, device=DEVICE, dtype=torch.float16)
    for precision in (None, "3xtf32"):
        tables = engine.tables(grid, values, crow, col, *geometry, precision=precision)
        with pytest.raises(ValueError, match=r"tables: expected tables made for torch\.float16, got"):
            engine.conv(x, values.half(), crow, col, None, None, tables, 32, 32, *geometry, 1, "none", 0.0)


@pytest.mark.parametrize(
    ("grid", "dtype", "device", "reason"),
    [
        (BlockGrid.of((64, 64, 3), (32, 32)), torch.float32, "cuda", "2-d convs"),
        (BlockGrid.of((64, 64, 3, 3), (32, 32), transposed=True), torch.float32, "cuda", "transposed"),
        (BlockGrid.of((64, 64, 3, 3), (32, 32)), torch.float64, "cuda", "not float64"),
        (BlockGrid.of((64, 64, 9, 3), (32, 32)), torch.float32, "cuda", "up to 7 taps"),
        (BlockGrid.of((64, 3, 3, 3), (32, 32)), torch.float32, "cuda", "32 input channels"),
        (BlockGrid.of((64, 64, 3, 3), (4, 32)), torch.float32, "cuda", "this conv has 4x32"),
        (BlockGrid.of((256, 64, 3, 3), (256, 32)), torch.float32, "cuda", "this conv has 256x32"),
        (BlockGrid.of((64, 64, 3, 3), (32, 32)), torch.float32, "meta", "the conv is on meta"),
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
    grid = BlockGrid.of((64, 64, 3, 3), (32, 32))
    sentence = engine.why_not(grid, (1, 1), (1, 1), (1, 1), torch.float32, torch.device("cuda"))
    assert "this device has (7, 5)" in sentence


def tuned(engine: ModuleType, timer: Any) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """What `tune` finds for a small conv, and the packed weights multiplied a pixel of each form."""
    tune = importlib.import_module("fxdbsr.kernels.triton_tune").tune
    grid, weight, x, keep, _, _, _ = build(Case(outputs=128), torch.float32)
    packed = [t.to(DEVICE) for t in grid.pack(weight.float(), keep)]
    geometry = (1, 1), (1, 1), (1, 1)
    tables, found = tune(grid, *packed, *geometry, x.to(DEVICE, torch.float32), repeats=1, timer=timer)
    return tables, found, packed[0]


def test_tune_takes_the_fastest_form(engine: ModuleType) -> None:
    def two_rows_win(functions: dict[str, Any]) -> dict[str, float]:
        return {name: 1.0 if name == "2 rows" else 2.0 for name in functions}

    tables, found, _ = tuned(engine, two_rows_win)
    assert found == {"1 rows": 2.0, "2 rows": 1.0, "4 rows": 2.0, "bitmask": 2.0}
    assert tables[3].shape == (2, 64)


def test_tune_times_no_form_with_wrong_numbers(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = importlib.import_module("fxdbsr.kernels.triton_gather")
    launch = gather.launch

    def spoil(call: Any, tables: Any, *rest: Any) -> None:
        launch(call, tables, *rest)
        if tables[3].shape[1] == 64:
            call.output[0, 0, 0, 0] += 1

    monkeypatch.setattr(gather, "launch", spoil)
    _, found, _ = tuned(engine, lambda functions: dict.fromkeys(functions, 1.0))
    assert "against float64" in found["2 rows"]
    assert found["4 rows"] == 1.0


def subprocess_output(code: str, **environment: str) -> str:
    """What `code` prints in a new process; it must succeed without a warning."""
    import os

    environment = {**os.environ, **environment}
    command = [sys.executable, "-W", "error", "-c", code]
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
