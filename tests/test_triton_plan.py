"""The planner of the Triton engine: plain functions of shapes, tested without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_hand import HAND, layer_of
from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.ops import macs_run
from fxdbsr.kernels.triton_configs import PRECISIONS, bitmask_tile, default_tiles, tiles
from fxdbsr.kernels.triton_cost import bitmask_clocks, gather_clocks
from fxdbsr.kernels.triton_device import A100, H100, H200, MI300X, Device, device_of, overlaps
from fxdbsr.kernels.triton_forms import Form, by_work, forms, why_not_bitmask, work
from fxdbsr.kernels.triton_layer import Layer, random_columns
from fxdbsr.kernels.triton_pack import pack, run_length
from fxdbsr.kernels.triton_plan import (
    Choice,
    choose_depth,
    choose_tile,
    entry_width,
    packed_weights,
    precision_of,
    tile_of,
)
from fxdbsr.kernels.triton_roofline import (
    choose,
    library_seconds,
    sparse_seconds,
    why_dense,
    why_sparse,
)
from fxdbsr.kernels.triton_rows import cluster, column_masks, split_rows, visits
from tests.triton_cases import float32_precision


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


def test_six_layers_each_way_are_worked_by_hand() -> None:
    ways = [row[-1] for row in HAND]
    assert ways.count("sparse") >= 6
    assert ways.count("dense") >= 6


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text().split("## Layers worked by hand")[1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    listed = [(*row[:9], row[-1]) for row in cells[2:]]
    assert listed == [(*map(str, row[:6]), "x".join(map(str, row[6])), *map(str, row[7:])) for row in HAND]


@pytest.mark.parametrize("row", HAND, ids=lambda row: row[0])
def test_layers_worked_by_hand_go_where_they_must(row: tuple[Any, ...]) -> None:
    with float32_precision("tf32" if row[5] == "fp16" else row[5]):
        reason = why_dense(layer_of(row))
    assert (reason is None) == (row[-1] == "sparse"), reason


def test_channels_that_no_block_reads_are_not_read() -> None:
    case = layer(128, 128, 1, 28, (32, 32), 1)
    assert case.read_share == case.full().read_share == 1
    half = replace(case, columns=(0b0001, 0b0100, 0b0001, 0b0000))
    assert half.read_share == 0.5
    image, weights = 32 * 28 * 28 * 128 * 2, 128 * 128 * 2
    assert half.bytes(residual=False) == image / 2 + weights * 3 / 16 + image
    grouped = replace(layer(128, 128, 3, 28, (32, 32), 1, groups=2), columns=(0b01, 0b01, 0b10, 0b01))
    assert grouped.read_share == 0.75
    narrow = layer(128, 128, 3, 28, (32, 32), 1, groups=32)  # eight groups in a row of blocks
    assert replace(narrow, columns=(1, 0, 1, 1)).read_share == 0.75


def test_the_reason_names_both_times() -> None:
    case = layer(64, 256, 1, 56, (32, 32), 0.75)
    choice, reason = choose(case), str(why_dense(case))
    dense, own, sparse = (f"{1e6 * seconds:.1f} us" for seconds in (choice.dense, choice.dense_triton, choice.sparse))
    told = f"dense is estimated at {dense} (cudnn_convolution_relu; {own} with dense Triton), sparse at {sparse}"
    assert reason == f"16-bit {told}"
    assert "(gather)" in why_sparse(layer(512, 512, 3, 28, (128, 32), 0.3))


def test_the_reason_says_where_sparsity_saves_nothing() -> None:
    reason = str(why_dense(layer(64, 256, 1, 56, (32, 32), 0.75), A100))
    assert reason.endswith("memory traffic and launch, which sparsity does not save, bound it")


def test_dense_time_is_what_cudnn_was_measured_at() -> None:
    flop = 2 * 32 * 28 * 28 * 512 * 512 * 9
    case = layer(512, 512, 3, 28, (128, 32), 0.5)
    expected = 8.4e-6 + flop / 0.815 / 990e12 + 72 * 15e-9
    assert library_seconds(case)["cudnn_convolution_relu"] == pytest.approx(expected, rel=0.01)
    assert library_seconds(case, A100)["cudnn_convolution_relu"] == pytest.approx(2e-6 + flop / 0.8 / 312e12, rel=0.01)


def test_cudnn_without_tf32_takes_71_us_and_about_half_of_the_peak() -> None:
    flop = 2 * 32 * 14 * 14 * 512 * 512 * 9
    with float32_precision("ieee"):
        found = library_seconds(layer(512, 512, 3, 14, (32, 32), 0.5, dtype=torch.float32))["cudnn_convolution_relu"]
    assert 71e-6 + flop / 0.6 / 67e12 < found < 71e-6 + flop / 0.45 / 67e12


def test_an_epilogue_that_cudnn_does_not_fuse_costs_one_more_kernel() -> None:
    case = layer(64, 64, 1, 56, (32, 32), 0.5, residual=True, activation="silu")
    bytes_of_output = 32 * 56 * 56 * 64 * 2
    one_pass = 2e-6 + 3 * bytes_of_output / 4.8e12  # reads the output and the residual, writes the output
    (found,) = library_seconds(case).values()
    bare = replace(case, residual=False, activation="none", bias=False)
    assert found == pytest.approx(min(library_seconds(bare).values()) + one_pass, rel=1e-6)


@pytest.mark.parametrize("device", [H200, H100, A100, MI300X], ids=lambda device: device.target)
def test_sparse_is_never_faster_than_its_ceiling(device: Device) -> None:
    for density in (0.1, 0.5, 1):
        for dtype in (torch.float16, torch.float32):
            case = layer(256, 256, 3, 14, (32, 32), density, dtype=dtype)
            choice = choose(case, device)
            assert choice.dense / choice.sparse <= choice.ceiling * 1.0001


def test_fewer_blocks_never_take_longer() -> None:
    *times, full = [choose(layer(256, 256, 3, 28, (32, 32), density)).sparse for density in (0.1, 0.3, 0.5, 0.9, 1)]
    assert times == sorted(times)
    assert 0.99 * times[-1] < full  # whose rows lie in order, and are written in longer pieces


def test_with_all_blocks_sparse_is_dense_triton() -> None:
    case = layer(512, 512, 3, 28, (128, 32), 1)
    choice = choose(case)
    assert choice.sparse == choice.dense_triton


def test_the_planner_takes_the_bitmask_kernel_by_itself_on_an_a100_alone() -> None:
    case, full = (layer(1024, 1024, 1, 14, (32, 32), density) for density in (0.2, 1))
    assert Form("bitmask", 4, "16") in forms(case.grid, "16")
    assert choose(case, A100).form == by_work(case.grid, case.columns, "16", 2, A100)[0] == Form("bitmask", 4, "16")
    assert choose(full, A100).form.kernel == by_work(full.grid, full.columns, "16", 2, A100)[0].kernel == "gather"
    for device in (H100, H200):
        assert choose(case, device).form.kernel == "gather"
        assert {form.kernel for form in by_work(case.grid, case.columns, "16", 2, device)} == {"gather"}


def test_rows_with_equal_columns_are_joined() -> None:
    grid = BlockGrid.of((256, 256, 3, 3), (32, 32))
    columns = (0b00001111,) * 4 + (0b11110000,) * 4
    assert by_work(grid, columns, "16", 2, H200)[0] == Form("gather", 4, "16")


def test_rows_that_fit_alike_are_joined_in_order() -> None:
    grid = BlockGrid.of((512, 64), (32, 32))
    rows = split_rows(grid, (0b11,) * 16)
    assert [[row.block_row for row in members] for members in cluster(rows, 4)] == [
        [*range(i, i + 4)] for i in range(0, 16, 4)
    ]
    rows = split_rows(grid, (0b01, 0b10) * 8)
    found = sorted([row.block_row for row in members] for members in cluster(rows, 4))
    assert found == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]


def test_what_is_written_in_pieces_is_known() -> None:
    grid, form = BlockGrid.of((512, 64), (32, 32)), Form("gather", 4, "16")
    assert work(grid, (0b11,) * 16, form, 2).piece == 256
    assert work(grid, (0b01, 0b10) * 8, form, 2).piece == 64
    assert work(grid, (0b01, 0b10) * 8, Form("gather", 1, "16"), 2).piece == 64
    assert work(BlockGrid.of((512, 64), (128, 32)), (1,) * 4, Form("gather", 1, "16"), 2).piece == 256


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


def test_row_0_costs_a_product_in_every_step_of_wgmma() -> None:
    tile = bitmask_tile("16", (64, 32), 1)
    wgmma = replace(H200, l2=1e9, shared=1e9, synchronous=1.0)  # products and instructions alone
    other = replace(wgmma, target="cuda:80")
    for taken, formed in ((1, 1.75), (2, 2.5), (4, 4)):
        assert bitmask_clocks(tile, "16", taken, 1, wgmma) == bitmask_clocks(tile, "16", formed, 1, other)


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


@pytest.mark.parametrize(
    ("target", "processors", "expected"), [("cuda:90", 132, [64, 64, 64, 128]), ("cuda:80", 108, [64, 64, 128, 128])]
)
def test_large_tiles_need_pixels_for_all_processors(target: str, processors: int, expected: list[int]) -> None:
    def pixels(of: int) -> int:
        return choose_tile(of, 4, 4 * 72, 128, 64, 9, "16", processors, target)[0].pixels

    assert [pixels(of) for of in (49, 1568, 6272, 32 * 56 * 56)] == expected


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


@pytest.mark.parametrize(("precision", "lanes_last"), [("ieee", True), ("tf32", False), ("3xtf32", False)])
def test_lanes_are_neighbours_in_memory_for_ieee_products_alone(precision: str, lanes_last: bool) -> None:
    grid = BlockGrid.of((64, 64, 3, 3), (32, 32))
    weights = pack(grid, *grid.pack(torch.randn(64, 64, 3, 3)), Form("gather", 2, precision))[3]
    assert weights.stride()[-2:] == ((1, 64) if lanes_last else (weights.shape[-1], 1))


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


def test_kernels_overlap_on_nvidia_from_9_0_on() -> None:
    targets = ("cuda:80", "cuda:89", "cuda:90", "cuda:120", "hip:gfx942")
    assert [target for target in targets if overlaps(target)] == ["cuda:90", "cuda:120"]


def test_the_cpu_is_planned_for_as_an_h200() -> None:
    assert device_of(torch.device("cpu")) == H200


def test_an_estimate_is_positive_for_every_form_and_device() -> None:
    case = layer(64, 96, 3, 7, (32, 32), 0.3, batch=1, groups=1)
    for device in (H200, A100, MI300X):
        for form in forms(case.grid, "16"):
            if form.kernel == "bitmask" and device is MI300X:
                continue
            assert sparse_seconds(case, form, device) > device.launch
