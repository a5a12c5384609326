"""The Triton engine against float64: compiled where there is a GPU, interpreted on the CPU elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.geometry import ACTIVATIONS
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
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


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
    "padding wider than the image": Case(padding=(5, 4), size=(2, 1)),
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
    "empty rows": Case(channels=128, outputs=128, block=(16, 16), density=0.05),
    "many pixels": Case(channels=32, outputs=32, size=(19, 23), kernel=(1, 1), padding=(0, 0)),
    "no images": Case(batch=0, residual=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_matches_float64(engine: ModuleType, case: Case, dtype: torch.dtype) -> None:
    if not case.batch:
        assert sparse(engine, case, build(case, dtype), dtype).shape == (0, case.outputs, *case.spatial)
        return
    check(engine, case, dtype)


def random_case(seed: int) -> Case:
    """Any block of 8 to 128 a side, kernel of 1 to 7 taps, stride, dilation, padding, groups, epilogue."""
    pick = Random(seed)
    groups = pick.choice([1, 1, 1, 2, 3])
    kernel = pick.randint(1, 7), pick.randint(1, 7)
    dilation = (pick.randint(1, 3), pick.randint(1, 3)) if max(kernel) < 4 else (1, 1)
    padding = pick.randint(0, kernel[0]), pick.randint(0, kernel[1])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = (
        max(reach[0] - 2 * padding[0], 1) + pick.randint(0, 4),
        max(reach[1] - 2 * padding[1], 1) + pick.randint(0, 4),
    )
    block = pick.choice([8, 16, 24, 32, 48, 64, 100, 128]), pick.choice([8, 16, 24, 32, 40, 64, 128])
    return Case(
        channels=groups * pick.randint(32, 80),
        outputs=groups * pick.randint(8, 140 // groups),
        kernel=kernel,
        size=size,
        stride=(pick.randint(1, 3), pick.randint(1, 3)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        block=block,
        density=pick.choice([0.1, 0.5, 0.9]),
        bias=pick.random() < 0.5,
        residual=pick.random() < 0.5,
        activation=pick.choice(ACTIVATIONS),
        form={"rows_per_union": 1} if block[0] > 64 else {},
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("seed", range(40))
def test_random_convs_match_float64(engine: ModuleType, seed: int) -> None:
    check(engine, random_case(seed), torch.float16 if seed % 2 else torch.float32)


@pytest.mark.parametrize("case", [Case(), Case(channels=72, outputs=56)], ids=["3x3", "edge blocks"])
def test_tf32_multiplies_rounded_weights(engine: ModuleType, case: Case) -> None:
    check(engine, case, precision="tf32")


@pytest.mark.parametrize(
    ("block", "rows"), [((8, 8), 1), ((8, 8), 4), ((32, 32), 1), ((32, 32), 2), ((32, 32), 4), ((48, 16), 2)], ids=str
)
def test_any_number_of_rows_to_a_union(engine: ModuleType, block: tuple[int, int], rows: int) -> None:
    check(engine, Case(outputs=96, block=block, form={"kernel": "gather", "rows_per_union": rows}))


LANES = {16: (16, 16), 32: (32, 32), 64: (64, 32), 128: (128, 32)}


def every_tile() -> list[tuple[str, int, int]]:
    """(precision, lanes, index) of every tile that is shipped for sm_90, which has all of the others' and more."""
    configs = importlib.import_module("fxdbsr.kernels.triton_configs")
    found = []
    for precision in configs.PRECISIONS:
        depth = 64 if precision == "16" else 32
        for lanes in LANES:
            count = len(configs.tiles("cuda:90", precision, lanes, depth, 9))
            found += [(precision, lanes, index) for index in range(count)]
    return found


@pytest.mark.parametrize(("precision", "lanes", "index"), every_tile())
def test_every_tile_matches_float64(engine: ModuleType, precision: str, lanes: int, index: int) -> None:
    case = Case(channels=72, outputs=2 * lanes - 8, block=LANES[lanes], size=(5, 5), density=0.6)
    pixels = case.batch * case.spatial[0] * case.spatial[1]
    form: dict[str, Any] = {"rows_per_union": 1, "tile": index, "splits": 1 + index % 2, "pixels": pixels}
    if precision == "3xtf32":
        form["precision"] = "3xtf32"
    dtype = torch.float16 if precision == "16" else torch.float32
    check(engine, replace(case, form=form), dtype, "tf32" if precision == "tf32" else "ieee")


BITMASK = {
    "3x3": Case(channels=96, outputs=160),
    "1x1": Case(kernel=(1, 1), padding=(0, 0), outputs=128),
    "7x7": Case(kernel=(7, 7), padding=(3, 3), channels=32, outputs=32, density=1),
    "stride 2": Case(outputs=128, stride=(2, 1)),
    "groups": Case(groups=2, channels=128, outputs=192, dilation=(1, 2)),
    "nothing stored": Case(density=0),
    "all stored, no residual": Case(density=1, residual=False),
    "no bias": Case(bias=False, activation="silu"),
    "blocks 64x32": Case(block=(64, 32), outputs=128),
    "blocks 32x64": Case(block=(32, 64), outputs=128),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BITMASK.values(), ids=BITMASK)
def test_bitmask_matches_float64(engine: ModuleType, case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and case.block != (32, 32):
        pytest.skip("the bitmask kernel multiplies float32 in blocks of 32x32 alone")
    check(engine, replace(case, form={"kernel": "bitmask"}), dtype, "tf32")


@pytest.mark.skipif(GPU, reason="a GPU runs what is compiled for it alone")
@pytest.mark.parametrize("name", ["3x3", "1x1", "nothing stored"])
def test_bitmask_matches_float64_where_row_0_is_under_a_branch(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    devices = importlib.import_module("fxdbsr.kernels.triton_device")
    kernel = importlib.import_module("fxdbsr.kernels.triton_bitmask")
    monkeypatch.setattr(kernel, "device_of", lambda _: devices.A100)
    check(engine, replace(BITMASK[name], form={"kernel": "bitmask"}), torch.float16)


PRECISE = {
    "3x3": Case(),
    "1x1, edge blocks": Case(kernel=(1, 1), padding=(0, 0), channels=72, outputs=56),
    "128 outputs": Case(channels=32, outputs=128, block=(128, 32)),
    "split": Case(channels=128, outputs=32, size=(2, 2)),
    "nothing stored": Case(density=0),
}


@pytest.mark.parametrize("case", PRECISE.values(), ids=PRECISE)
def test_3xtf32_is_as_accurate_as_float32(engine: ModuleType, case: Case) -> None:
    check(engine, replace(case, form={"precision": "3xtf32"}))


def test_3xtf32_splits_without_loss(engine: ModuleType) -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    pack = importlib.import_module("fxdbsr.kernels.triton_pack")
    high = pack.round_to_tf32(x)
    low = pack.round_to_tf32(x - high)
    assert ((high.view(torch.int32) & 0x1FFF) == 0).all()
    torch.testing.assert_close(high.double() + low.double(), x.double(), rtol=2**-22, atol=0)


def test_nan_and_infinities_survive_rounding_to_tf32(engine: ModuleType) -> None:
    pack = importlib.import_module("fxdbsr.kernels.triton_pack")
    of_a_gpu = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([of_a_gpu, torch.tensor([float("nan"), float("inf"), float("-inf")])])
    torch.testing.assert_close(pack.round_to_tf32(x), x, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(engine: ModuleType, activation: str) -> None:
    check(engine, Case(channels=32, activation=activation))


def run(engine: ModuleType, x: Tensor, weight: Tensor, activation: str = "none", groups: int = 1) -> Tensor:
    """A padded 3x3 conv or an unpadded 1x1 conv without an epilogue, blocks of 32x32."""
    grid = BlockGrid.of(tuple(weight.shape), (32, 32), groups)
    values, crow, col = (t.to(DEVICE) for t in grid.pack(weight))
    padding = [weight.shape[2] // 2] * 2
    tables = engine.tables(grid, values, crow, col, (1, 1), padding, (1, 1))
    geometry = ((1, 1), padding, (1, 1), groups)
    sizes = (grid.in_channels, grid.out_channels)
    y: Tensor = engine.conv(
        x.to(DEVICE), values, crow, col, None, None, tables, *sizes, *geometry, activation, 0.01
    )  # fmt: skip
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
    x = torch.randn(1, 80, 3, 3)
    x[:, 40:] = float("inf")
    y = run(engine, x, torch.ones(32, 40, 1, 1), groups=2)
    assert y[:, :16].isfinite().all()
    assert y[:, 16:].isposinf().all()


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_split_reduction_is_right_and_repeats_exactly(
    engine: ModuleType, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call = importlib.import_module("fxdbsr.kernels.triton_run")
    choose = at_call.tile_of
    monkeypatch.setattr(at_call, "tile_of", lambda *args: (choose(*args)[0], splits))
    check(engine, Case(channels=128, outputs=72))
    check(engine, Case(density=0))
    x, w = torch.randn(1, 64, 4, 4), torch.randn(64, 64, 3, 3)
    assert torch.equal(run(engine, x, w), run(engine, x, w))


def test_one_table_serves_every_size(engine: ModuleType) -> None:
    torch.manual_seed(0)
    grid = BlockGrid.of((32, 64, 3, 3), (32, 32))
    weight = torch.randn(32, 64, 3, 3)
    values, crow, col = (t.to(DEVICE) for t in grid.pack(weight))
    with float32_precision("ieee"):
        tables = engine.tables(grid, values, crow, col, (1, 1), (1, 1), (1, 1))
        for shape in ((1, 64, 3, 4), (3, 64, 7, 2)):
            x = torch.randn(shape, device=DEVICE)
            y = engine.conv(x, values, crow, col, None, None, tables, 64, 32, (1, 1), (1, 1), (1, 1), 1, "none", 0.0)
            torch.testing.assert_close(y, F.conv2d(x, weight.to(DEVICE), padding=1), rtol=1e-4, atol=1e-3)


def test_batches_beyond_32_bit_offsets_run_in_parts(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fxdbsr.kernels.triton_run"), "LIMIT", 64 * 6 * 5 * 2)
    check(engine, Case(batch=5))


def test_memory_formats_and_views_give_the_same(engine: ModuleType) -> None:
    case = Case(batch=3, activation="none")
    data = build(case, torch.float32)
    values, crow, col = (t.to(DEVICE) for t in data.grid.pack(data.weight.float(), data.keep))
    tables = engine.tables(data.grid, values, crow, col, *case.geometry)
    assert data.bias is not None
    assert data.residual is not None
    x, residual, bias = (t.to(DEVICE, torch.float32) for t in (data.input, data.residual, data.bias))

    def conv(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        rest: tuple[Any, ...] = (tables, 64, 64, *case.geometry, 1, "none", 0.0)
        y: Tensor = engine.conv(x, values, crow, col, bias, residual, *rest)
        return y

    last = torch.channels_last
    expected = conv(x.contiguous(memory_format=last), bias, residual.contiguous(memory_format=last))
    wide = torch.cat([x, x], 3)
    for y in (
        conv(x, bias, residual),
        conv(wide[..., :5], bias.repeat_interleave(2)[::2], residual.transpose(2, 3).contiguous().transpose(2, 3)),
        conv(wide[..., 5:], bias, residual.flip(0).flip(0)),
    ):
        assert torch.equal(y, expected)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_3xtf32_repeats_exactly_on_a_gpu(engine: ModuleType) -> None:
    case = Case(channels=128, outputs=128, batch=8, form={"precision": "3xtf32"})
    data = build(case, torch.float32)
    first = sparse(engine, case, data, torch.float32)
    assert all(torch.equal(sparse(engine, case, data, torch.float32), first) for _ in range(100))
