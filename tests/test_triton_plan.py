"""The planner of the Triton engine: plain functions of shapes, tested without a GPU and without Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.ops import macs_run
from fxdbsr.kernels.triton_pack import cluster, columns_of, entry_width, pack, run_length, split_rows
from fxdbsr.kernels.triton_plan import (
    CONFIGS,
    PRECISIONS,
    choose_depth,
    choose_tile,
    packed_weights,
    precision_of,
    step_clocks,
)
from fxdbsr.kernels.triton_roofline import Layer, choose, dense_seconds, why_dense


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    yield
    conv.fp32_precision = before


def set_precision(value: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = value  # type: ignore[attr-defined]


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
) -> Layer:
    """A conv that keeps its input's size."""
    grid = BlockGrid.of((outputs, channels // groups, kernel, kernel), block, groups)
    padding = (kernel // 2, kernel // 2)
    return Layer(grid, batch, (size, size), (1, 1), padding, (1, 1), dtype, density)


# Worked by hand from the roofline of an H200: FLOP and bytes of the layer, steps and clocks of the kernel.
SPARSE = [
    # 118 GFLOP, 150 us dense; 18 steps of 128 outputs instead of 72, no padding
    ("VGG 512->512 3x3 at 28, 128x32 blocks, half", layer(512, 512, 3, 28, (128, 32), 0.5), "tf32"),
    ("VGG 512->512 3x3 at 28, 64x16 blocks, 30 %", layer(512, 512, 3, 28, (64, 16), 0.3), "tf32"),
    ("VGG 256->256 3x3 at 56, 32x32 blocks, 10 %", layer(256, 256, 3, 56, (32, 32), 0.1), "tf32"),
    # 7.4 GFLOP, 11 us dense; a tenth of the blocks leaves launch and traffic
    ("ResNet 256->256 3x3 at 14, 32x32 blocks, 10 %", layer(256, 256, 3, 14, (32, 32), 0.1), "tf32"),
    ("ResNet 512->512 3x3 at 7, 128x32 blocks, 30 %", layer(512, 512, 3, 7, (128, 32), 0.3), "tf32"),
    # FMA units: 150 us dense, nothing but products counts
    (
        "ResNet 128->128 3x3 at 28, ieee, 32x32, half",
        layer(128, 128, 3, 28, (32, 32), 0.5, dtype=torch.float32),
        "ieee",
    ),
    (
        "ResNet 1024->256 1x1 at 14, ieee, 32x32, half",
        layer(1024, 256, 1, 14, (32, 32), 0.5, dtype=torch.float32),
        "ieee",
    ),
    (
        "ResNet 512->512 3x3 at 7, tf32, 64x16, 10 %",
        layer(512, 512, 3, 7, (64, 16), 0.1, dtype=torch.float32),
        "tf32",
    ),
]
DENSE = [
    # 64 MB read and written take 13.4 us at any sparsity
    ("ResNet 64->256 1x1 at 56, half", layer(64, 256, 1, 56, (32, 32), 0.5), "tf32"),
    ("ResNet 64->256 1x1 at 56, 10 %", layer(64, 256, 1, 56, (128, 32), 0.1), "tf32"),
    ("ResNet 256->64 1x1 at 56, tf32", layer(256, 64, 1, 56, (32, 32), 0.1, dtype=torch.float32), "tf32"),
    ("ResNet 256->1024 1x1 at 14, half", layer(256, 1024, 1, 14, (32, 32), 0.5), "tf32"),
    # unions of 32x32 blocks at half: two rows touch 64 % of the columns, four 75 %
    ("ResNet 256->256 3x3 at 14, 32x32 blocks, half", layer(256, 256, 3, 14, (32, 32), 0.5), "tf32"),
    ("ResNet 128->128 3x3 at 28, 8x8 blocks, half", layer(128, 128, 3, 28, (8, 8), 0.5), "tf32"),
    # one image: launch and latency
    ("ResNet 256->256 3x3 at 14, one image", layer(256, 256, 3, 14, (128, 32), 0.5, batch=1), "tf32"),
    ("nothing pruned", layer(512, 512, 3, 28, (128, 32), 1.0), "tf32"),
    ("channels not in 16 bytes", layer(100, 128, 3, 28, (32, 32), 0.1), "tf32"),
]


@pytest.mark.parametrize(("case", "precision"), [c[1:] for c in SPARSE], ids=[c[0] for c in SPARSE])
def test_layers_that_must_go_sparse(case: Layer, precision: str) -> None:
    set_precision(precision)
    assert why_dense(case) is None


@pytest.mark.parametrize(("case", "precision"), [c[1:] for c in DENSE], ids=[c[0] for c in DENSE])
def test_layers_that_must_stay_dense(case: Layer, precision: str) -> None:
    set_precision(precision)
    assert why_dense(case)


def test_the_reason_names_both_times_and_what_bounds_the_layer() -> None:
    reason = why_dense(DENSE[0][1])
    assert reason is not None
    assert "dense is estimated at 15.4 us, sparse at 15.7 us: memory traffic" in reason


def test_dense_time_is_the_roofline() -> None:
    flop = 2 * 32 * 28 * 28 * 512 * 512 * 9
    assert dense_seconds(SPARSE[0][1]) == pytest.approx(2e-6 + flop / 0.8 / 990e12, rel=0.01)


def test_sparse_is_never_faster_than_its_ceiling() -> None:
    for _, case, precision in SPARSE + DENSE:
        set_precision(precision)
        choice = choose(case)
        assert choice.dense / choice.sparse <= choice.ceiling * 1.0001


def test_density_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density: expected 0 to 1, got 1\.5"):
        why_dense(layer(64, 64, 3, 8, (32, 32), 1.5))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wider_tiles_cost_more_a_step_and_less_an_output(precision: str) -> None:
    for taps in (1, 9):
        clocks = [step_clocks(outputs, precision, taps) for outputs in (16, 32, 64, 128)]
        assert clocks == sorted(clocks)
        each = [c / outputs for c, outputs in zip(clocks, (16, 32, 64, 128), strict=True)]
        assert each == sorted(each, reverse=True)


def test_every_tile_that_can_be_chosen_is_listed() -> None:
    for (precision, outputs), tiles in CONFIGS.items():
        for pixels in (1, 49, 6272, 401408):
            tile, splits = choose_tile(pixels, 4, 200, outputs, 32, 1, precision, 132, "cuda:90")
            listed = {(t.pixels, t.warps, t.stages, t.weights_first) for t in tiles}
            assert (tile.pixels, tile.warps, tile.stages, tile.weights_first) in listed
            assert splits in (1, 2, 4, 8)


def test_small_outputs_with_long_reductions_are_split() -> None:
    assert choose_tile(49, 4, 4 * 72, 128, 64, 9, "16", 132, "cuda:90")[1] > 1
    assert choose_tile(49, 4, 4 * 8, 128, 64, 9, "16", 132, "cuda:90")[1] == 1
    assert choose_tile(32 * 56 * 56, 4, 4 * 72, 128, 64, 9, "16", 132, "cuda:90")[1] == 1


def test_float32_follows_the_switch_of_cudnn() -> None:
    set_precision("tf32")
    assert precision_of(torch.float32) == "tf32"
    set_precision("ieee")
    assert precision_of(torch.float32) == "ieee"
    assert precision_of(torch.float16) == precision_of(torch.bfloat16) == "16"


def test_depth_halves_where_that_saves_padding() -> None:
    assert choose_depth([32] * 8, torch.float16) == 32
    assert choose_depth([288 * 4] * 8, torch.float16) == 64
    assert choose_depth([], torch.float32) == 32


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
    rows = split_rows(grid, [0, 1, 2], [0, 0])
    assert [(row.first, row.height, row.group, row.block_row, row.skip) for row in rows] == [
        (0, 16, 0, 0, 0),
        (16, 16, 1, 0, 16),
        (32, 16, 2, 1, 0),
        (48, 16, 3, 1, 16),
    ]


def test_clustering_joins_rows_with_equal_columns() -> None:
    grid = BlockGrid.of((128, 128, 1, 1), (32, 32))
    rows = split_rows(grid, [0, 2, 4, 6, 8], [0, 1, 2, 3, 0, 1, 2, 3])
    sets = cluster(rows, 2)
    assert sum(columns_of(members).bit_count() for members in sets) == 4


def test_full_density_without_padding_multiplies_every_weight_once() -> None:
    grid = BlockGrid.of((64, 64, 3, 3), (32, 32))
    weight = torch.randn(64, 64, 3, 3)
    values, crow, col = grid.pack(weight)
    shapes = [table.shape for table in pack(grid, values, crow, col)]
    assert packed_weights(values.shape, shapes) == weight.numel()
    assert macs_run(values.shape, 2, (5, 5), 64, 64, 1, "triton", shapes) == 50 * weight.numel()


def test_flops_of_the_engine_need_its_tables() -> None:
    with pytest.raises(ValueError, match="expected 4 or 5 shapes, got 0"):
        macs_run((1, 32, 32, 1, 1), 1, (1, 1), 32, 32, 1, "triton")


def test_every_channel_and_tap_of_a_stored_block_is_visited_once() -> None:
    grid = BlockGrid.of((40, 72, 3, 2), (16, 32))
    values, crow, col = grid.pack(torch.ones(40, 72, 3, 2))
    entries, pointers, weights, outputs = pack(grid, values, crow, col, rows_per_union=1)
    assert pointers.tolist() == [0, *torch.tensor([weights.shape[0] // 3]).repeat(3).cumsum(0).tolist()]
    words = entries[: pointers[1]].flatten()
    real = words[words >> 27 != 7].tolist()
    width = weights.shape[2] // entries.shape[1]
    expected = {c | r << 24 | s << 27 for c in range(0, 72, width) for r in range(3) for s in range(2)}
    assert set(real) == expected
    assert len(real) == len(expected)
    assert sorted(outputs[outputs < 40].tolist()) == list(range(40))
    assert weights.sum() == 40 * 72 * 6
