"""The planner of the Triton engine: plain functions of shapes, tested without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import triton_roofline
from fxdbsr.kernels.ops import macs_run
from fxdbsr.kernels.triton_configs import PRECISIONS, bitmask_tile, default_tiles, tiles
from fxdbsr.kernels.triton_cost import bitmask_clocks, gather_clocks
from fxdbsr.kernels.triton_device import A100, H100, H200, MI300X, Device, device_of
from fxdbsr.kernels.triton_forms import Form, by_work, forms, why_not_bitmask, work
from fxdbsr.kernels.triton_layer import Layer, random_columns
from fxdbsr.kernels.triton_pack import entry_width, pack, run_length
from fxdbsr.kernels.triton_plan import Choice, choose_depth, choose_tile, packed_weights, precision_of, tile_of
from fxdbsr.kernels.triton_roofline import (
    choose,
    library_seconds,
    sparse_seconds,
    why_dense,
    why_sparse,
)
from fxdbsr.kernels.triton_rows import cluster, column_masks, split_rows, visits
from tests.triton_cases import float32_precision

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    with float32_precision("tf32"):
        yield


def layer(
    channels: int,
    outputs: int,
    kernel: int,
    size: int,
    block: tuple[int, int],
    density: float,
    *,
    batch: int = 32,
    dtype: torch.dtype = torch.float16,
    groups: int = 1,
    residual: bool = False,
    activation: str = "relu",
) -> Layer:
    """A conv that keeps its input's size, with a random choice of blocks."""
    grid = BlockGrid.of((outputs, channels // groups, kernel, kernel), block, groups)
    half = (kernel // 2, kernel // 2)
    columns = random_columns(grid, density)
    return Layer(grid, batch, (size, size), (1, 1), half, (1, 1), dtype, columns, True, residual, activation)


def worked_by_hand() -> list[dict[str, str]]:
    """The rows of the table in docs/gpu.md."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if row[0] == "no.")
    return [dict(zip(rows[start], row, strict=True)) for row in rows[start + 2 :] if len(row) == len(rows[start])]


HAND = worked_by_hand()


def test_the_page_works_six_layers_each_way() -> None:
    assert sum(row["must go"] == "sparse" for row in HAND) >= 6
    assert sum(row["must go"] == "dense" for row in HAND) >= 6


@pytest.fixture(params=[(3, 6), (3, 9)], ids=["narrow copies", "wide copies"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of another Triton, which nothing cached before or after knows of."""
    caches = (tiles, triton_roofline._choose, choose_tile)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr("fxdbsr.kernels.triton_configs.triton_version", lambda: request.param)
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize("row", HAND, ids=lambda row: row["no."])
def test_layers_worked_by_hand_go_where_they_must(row: dict[str, str]) -> None:
    height, width = map(int, row["blocks"].split("x"))
    channels, outputs, kernel, size = (int(row[name]) for name in ("channels", "outputs", "kernel", "size"))
    dtype = torch.float16 if row["precision"] == "fp16" else torch.float32
    case = layer(
        channels,
        outputs,
        kernel,
        size,
        (height, width),
        float(row["kept"]),
        dtype=dtype,
        residual="residual" in row["epilogue"],
        activation=row["epilogue"].split()[-1],
    )
    with float32_precision(row["precision"] if row["precision"] != "fp16" else "tf32"):
        reason = why_dense(case)
    assert (reason is None) == (row["must go"] == "sparse"), reason


def test_the_reason_names_both_times_and_what_bounds_the_layer() -> None:
    reason = why_dense(layer(64, 256, 1, 56, (32, 32), 0.5))
    assert reason is not None
    assert reason.startswith("16-bit dense is estimated at 15.4 us (cudnn_convolution_relu; 16.7 us with dense Triton)")
    assert "memory traffic and launch, which sparsity does not save" in reason
    assert "(gather)" in why_sparse(layer(512, 512, 3, 28, (128, 32), 0.3))


def test_dense_time_is_the_roofline() -> None:
    flop = 2 * 32 * 28 * 28 * 512 * 512 * 9
    fused = library_seconds(layer(512, 512, 3, 28, (128, 32), 0.5))["cudnn_convolution_relu"]
    assert fused == pytest.approx(2e-6 + flop / 0.8 / 990e12, rel=0.01)


def test_an_epilogue_that_cudnn_does_not_fuse_costs_passes_over_memory() -> None:
    case = layer(64, 64, 1, 56, (32, 32), 0.5, residual=True, activation="silu")
    found = library_seconds(case)
    assert list(found) == ["cuDNN conv and epilogue kernels"]
    bytes_of_output = 32 * 56 * 56 * 64 * 2
    conv = 2e-6 + 2 * bytes_of_output / 4.8e12
    passes = 3 * 2e-6 + (2 + 3 + 2) * bytes_of_output / 4.8e12
    assert found["cuDNN conv and epilogue kernels"] == pytest.approx(conv + passes, rel=0.01)


@pytest.mark.parametrize("device", [H200, H100, A100, MI300X], ids=lambda device: device.target)
def test_sparse_is_never_faster_than_its_ceiling(device: Device) -> None:
    for density in (0.1, 0.5, 1):
        for dtype in (torch.float16, torch.float32):
            case = layer(256, 256, 3, 14, (32, 32), density, dtype=dtype)
            choice = choose(case, device)
            assert choice.dense / choice.sparse <= choice.ceiling * 1.0001


def test_fewer_blocks_never_take_longer() -> None:
    times = [choose(layer(256, 256, 3, 28, (32, 32), density)).sparse for density in (0.1, 0.3, 0.5, 0.9, 1)]
    assert times == sorted(times)


def test_with_all_blocks_sparse_is_dense_triton() -> None:
    case = layer(512, 512, 3, 28, (128, 32), 1)
    choice = choose(case)
    assert choice.sparse == choice.dense_triton


def test_the_planner_takes_the_bitmask_kernel_by_itself() -> None:
    case = layer(1024, 1024, 1, 14, (32, 32), 0.2)
    assert choose(case).form == Form("bitmask", 4, "16")
    assert by_work(case.grid, case.columns, "16", 2, H200)[0] == Form("bitmask", 4, "16")
    full = layer(1024, 1024, 1, 14, (32, 32), 1)
    assert by_work(full.grid, full.columns, "16", 2, H200)[0] == Form("gather", 4, "16")


def test_rows_with_equal_columns_are_joined() -> None:
    grid = BlockGrid.of((256, 256, 3, 3), (32, 32))
    columns = (0b00001111,) * 4 + (0b11110000,) * 4
    assert by_work(grid, columns, "16", 2, H200)[0] == Form("gather", 4, "16")


def test_3xtf32_needs_to_be_allowed() -> None:
    case = layer(512, 512, 3, 14, (128, 32), 0.5, dtype=torch.float32)
    with float32_precision("ieee"):
        assert choose(case).form.precision == "ieee"
        allowed = replace(case, allow_3xtf32=True)
        assert choose(allowed).form.precision == "3xtf32"
        assert choose(allowed).sparse < choose(case).sparse


def test_channels_that_16_bytes_do_not_cut_stay_dense() -> None:
    assert "multiples of 8, here 100" in str(why_dense(layer(100, 128, 3, 28, (32, 32), 0.1)))


def test_density_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density: expected 0 to 1, got 1\.5"):
        random_columns(BlockGrid.of((64, 64), (32, 32)), 1.5)


def test_random_columns_keep_exactly_that_many_blocks() -> None:
    grid = BlockGrid.of((96, 80, 3, 3), (32, 16))
    assert sum(mask.bit_count() for mask in random_columns(grid, 0.5)) == round(0.5 * 15)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wider_tiles_cost_more_a_step_and_no_more_an_output(precision: str) -> None:
    clocks = []
    for lanes in (16, 32, 64, 128):
        tile = default_tiles("cuda:90", precision, lanes, 64 if precision == "16" else 32, 1)[0]
        step = gather_clocks(tile, precision, 1, H200) * lanes / tile.outputs / tile.pixels
        clocks.append(step)
    assert clocks == sorted(clocks)
    each = [c / lanes for c, lanes in zip(clocks, (16, 32, 64, 128), strict=True)]
    assert each == sorted(each, reverse=True)


def test_blocks_that_are_not_taken_cost_less() -> None:
    tile = bitmask_tile("16", (32, 32), 9)
    assert bitmask_clocks(tile, "16", 1, 9, H200) < bitmask_clocks(tile, "16", 4, 9, H200)


def test_work_counts_the_steps_of_the_tables() -> None:
    grid = BlockGrid.of((96, 128, 3, 3), (32, 32))
    keep = torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    values, crow, col = grid.pack(torch.ones(96, 128, 3, 3), keep)
    columns = column_masks(crow.tolist(), col.tolist())
    for form in forms(grid, "tf32"):
        if form.kernel == "bitmask":
            continue
        tables = pack(grid, values, crow, col, form)
        counted = work(grid, columns, form, 4)
        assert (counted.steps, counted.lanes, counted.depth) == tuple(tables[3].shape)
        assert counted.unions == tables[4].shape[0]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:120", "hip:gfx942"])
@pytest.mark.parametrize("precision", ["16", "tf32", "ieee"])
def test_every_table_has_a_tile_that_fits_it(target: str, precision: str) -> None:
    for lanes in (16, 32, 64, 128):
        for depth in (64, 32) if precision == "16" else (32, 16):
            for taps in (1, 9):
                listed = tiles(target, precision, lanes, depth, taps)
                assert listed
                assert all(lanes % tile.outputs == 0 and tile.depth == depth for tile in listed)
                assert set(default_tiles(target, precision, lanes, depth, taps)) <= set(listed)


def test_large_tiles_need_pixels_for_all_processors() -> None:
    def pixels(of: int) -> int:
        return choose_tile(of, 4, 4 * 72, 128, 64, 9, "16", 132, "cuda:90")[0].pixels

    assert [pixels(of) for of in (49, 6272, 32 * 56 * 56)] == [64, 128, 256]


def test_small_outputs_with_long_reductions_are_split() -> None:
    assert choose_tile(49, 4, 4 * 72, 128, 64, 9, "16", 132, "cuda:90")[1] > 1
    assert choose_tile(49, 4, 4 * 8, 128, 64, 9, "16", 132, "cuda:90")[1] == 1
    assert choose_tile(32 * 56 * 56, 4, 4 * 72, 128, 64, 9, "16", 132, "cuda:90")[1] == 1


def test_a_measured_tile_serves_the_size_that_was_measured() -> None:
    listed = tiles("cuda:90", "16", 64, 64, 9)
    choice = Choice("gather", "16", len(listed) - 1, 2, 6272)
    sizes = (4, 4 * 72, 64, 64, 9, 132, "cuda:90")
    assert tile_of(choice, 6272, *sizes) == (listed[-1], 2)
    assert tile_of(choice, 49, *sizes) == choose_tile(49, *sizes[:5], "16", *sizes[5:])
    elsewhere = replace(choice, tile=len(listed))  # of another GPU, which has more tiles
    assert tile_of(elsewhere, 6272, *sizes) == choose_tile(6272, *sizes[:5], "16", *sizes[5:])


@pytest.mark.parametrize(
    "choice", [Choice("gather", "16"), Choice("bitmask", "tf32"), Choice("gather", "3xtf32", 0, 8, 9)]
)
def test_a_choice_survives_as_a_shape(choice: Choice) -> None:
    assert Choice.of(choice.as_table(torch.device("cpu")).shape) == choice


def test_float32_follows_the_switch_of_cudnn() -> None:
    assert precision_of(torch.float32) == "tf32"
    with float32_precision("ieee"):
        assert precision_of(torch.float32) == "ieee"
    assert precision_of(torch.float16) == precision_of(torch.bfloat16) == "16"


def test_depth_halves_where_that_saves_padding() -> None:
    assert choose_depth([32] * 8, 2, 64) == 32
    assert choose_depth([288 * 4] * 8, 2, 64) == 64
    assert choose_depth([32] * 8, 2, 16) == 64
    assert choose_depth([], 4, 64) == 32


def test_entries_and_runs_divide_blocks_and_edges() -> None:
    assert entry_width(64, 32, 1, 64) == 32
    assert entry_width(72, 32, 1, 64) == 8
    assert entry_width(96, 24, 1, 64) == 8
    assert entry_width(37, 32, 1, 64) == 1
    assert run_length(64, 32, 1) == 16
    assert run_length(56, 32, 1) == 8
    assert run_length(48, 32, 4) == 4


def test_rows_that_hold_several_groups_are_split() -> None:
    grid = BlockGrid.of((64, 32, 1, 1), (32, 32), 4)
    rows = split_rows(grid, (1, 1))
    assert [(row.first, row.height, row.group, row.block_row, row.skip) for row in rows] == [
        (0, 16, 0, 0, 0),
        (16, 16, 1, 0, 16),
        (32, 16, 2, 1, 0),
        (48, 16, 3, 1, 16),
    ]


def test_clustering_joins_rows_with_equal_columns() -> None:
    grid = BlockGrid.of((128, 128, 1, 1), (32, 32))
    rows = split_rows(grid, (0b0011, 0b1100, 0b0011, 0b1100))
    assert sum(visits(members) for members in cluster(rows, 2)) == 4


def test_bitmask_needs_even_blocks_that_it_has_a_tile_for() -> None:
    assert why_not_bitmask(BlockGrid.of((64, 64, 3, 3), (32, 32)), "16") is None
    assert "evenly" in str(why_not_bitmask(BlockGrid.of((64, 72, 3, 3), (32, 32)), "16"))
    assert "no tile" in str(why_not_bitmask(BlockGrid.of((64, 64, 3, 3), (16, 16)), "16"))


def test_full_density_without_padding_multiplies_every_weight_once() -> None:
    grid = BlockGrid.of((64, 64, 3, 3), (32, 32))
    weight = torch.randn(64, 64, 3, 3)
    values, crow, col = grid.pack(weight)
    shapes = [table.shape for table in pack(grid, values, crow, col, Form("gather", 2, "ieee"))]
    assert packed_weights(values.shape, shapes) == weight.numel()
    assert macs_run(values.shape, 2, (5, 5), 64, 64, 1, "triton", shapes) == 50 * weight.numel()


def test_flops_of_the_engine_need_its_tables() -> None:
    with pytest.raises(ValueError, match="expected 5 or 6 shapes, got 0"):
        macs_run((1, 32, 32, 1, 1), 1, (1, 1), 32, 32, 1, "triton")


def test_every_channel_and_tap_of_a_stored_block_is_visited_once() -> None:
    grid = BlockGrid.of((40, 72, 3, 2), (16, 32))
    values, crow, col = grid.pack(torch.ones(40, 72, 3, 2))
    _, entries, pointers, weights, outputs = pack(grid, values, crow, col, Form("gather", 1, "ieee"))
    assert pointers.tolist() == [0, *torch.tensor([weights.shape[0] // 3]).repeat(3).cumsum(0).tolist()]
    words = entries[: pointers[1]].flatten()
    real = words[words >> 27 != 7].tolist()
    width = weights.shape[2] // entries.shape[1]
    expected = {c | r << 24 | s << 27 for c in range(0, 72, width) for r in range(3) for s in range(2)}
    assert set(real) == expected
    assert len(real) == len(expected)
    assert sorted(outputs[outputs < 40].tolist()) == list(range(40))
    assert weights.sum() == 40 * 72 * 6


def test_the_cpu_is_planned_for_as_an_h200() -> None:
    assert device_of(torch.device("cpu")) == H200


def test_an_estimate_is_positive_for_every_form_and_device() -> None:
    case = layer(64, 96, 3, 7, (32, 32), 0.3, batch=1, groups=1)
    for device in (H200, A100, MI300X):
        for form in forms(case.grid, "16"):
            if form.kernel == "bitmask" and device is MI300X:
                continue
            assert sparse_seconds(case, form, device) > device.launch
