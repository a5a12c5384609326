"""What tiles and convs of a library were measured to cost: what the planner makes of the figures."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from fxdbsr.kernels.triton_configs import HOPPER, Tile, tiles
from fxdbsr.kernels.triton_measured import (
    CUDNN,
    NARROW,
    NARROW_BYTES,
    SCATTERED,
    START,
    UNEVEN,
    UNEVEN_PAIRS,
    Library,
    Load,
    clocks,
    cost_of,
    norm,
    resident,
    work_clocks,
)

LARGE = tiles("cuda:90", "16", 128, 64, 9)[0]
LISTED = {
    (precision, tile): None
    for precision, depth in (("16", 64), ("ieee", 32), ("3xtf32", 32))
    for lanes in HOPPER
    for tile in tiles("cuda:90", precision, lanes, depth, 9)
}


@pytest.mark.parametrize(("precision", "tile"), LISTED, ids=str)
def test_every_tile_of_an_h100_was_measured_and_costs_more_with_more_to_do(precision: str, tile: Tile) -> None:
    if precision == "3xtf32" and tile.outputs == 64:
        pytest.skip("for a Triton that was not measured")
    cost = cost_of(tile, precision, "cuda:90")
    assert cost is not None
    loads = [Load(programs, 8 * programs, 8) for programs in (100, 200, 1000, 10_000)]
    work = [work_clocks(cost, tile, precision, load) for load in loads]
    assert work == sorted(work)
    assert work[-1] == pytest.approx(100 * work[0])
    times = [clocks(cost, tile, precision, load, 132) for load in loads]
    assert all(a < b for a, b in pairwise(times))
    assert work_clocks(cost, tile, precision, replace(loads[0], steps=900)) > work[0]
    relu, silu, added, both = (
        work_clocks(cost, tile, precision, replace(loads[0], residual=residual, activation=activation))
        for residual, activation in ((False, "relu"), (False, "silu"), (True, "relu"), (True, "silu"))
    )
    assert work[0] == relu < min(silu, added) <= max(silu, added) < both


def test_exponentials_cost_more_an_output_in_wide_tiles() -> None:
    def of_an_output(tile: Tile, activation: str) -> float:
        cost = cost_of(tile, "16", "cuda:90")
        assert cost is not None
        one, two = (work_clocks(cost, tile, "16", Load(1, 0, 0, activation=name)) for name in ("relu", activation))
        return (two - one) / (tile.pixels * tile.outputs)

    for activation in ("silu", "sigmoid"):
        wide = {of_an_output(t, activation) for t in tiles("cuda:90", "16", 128, 64, 1)}
        narrow = {of_an_output(t, activation) for lanes in (32, 64) for t in tiles("cuda:90", "16", lanes, 64, 1)}
        assert min(wide) > 1.5 * max(narrow) > 0
    assert of_an_output(LARGE, "hardswish") == 0


def test_what_was_not_measured_has_no_cost() -> None:
    assert cost_of(LARGE, "16", "cuda:90") is not None
    assert cost_of(LARGE, "16", "cuda:80") is None
    assert cost_of(LARGE, "16", "hip:gfx942") is None
    assert cost_of(LARGE, "ieee", "cuda:90") is None
    assert cost_of(replace(LARGE, stages=4), "16", "cuda:90") is None
    assert cost_of(replace(LARGE, warps=4), "16", "cuda:90") is None


def test_tf32_is_taken_to_cost_what_16_bits_cost() -> None:
    tile = tiles("cuda:90", "tf32", 128, 32, 9)[0]
    assert cost_of(tile, "tf32", "cuda:90") == cost_of(LARGE, "16", "cuda:90") is not None


def test_steps_of_half_the_depth_cost_less_but_not_nothing() -> None:
    for precision, depth in (("16", 64), ("ieee", 32)):
        tile = tiles("cuda:90", precision, 128, depth, 9)[0]
        cost = cost_of(tile, precision, "cuda:90")
        assert cost is not None
        load = Load(0, 100, 100)
        whole, half = (work_clocks(cost, replace(tile, depth=d), precision, load) for d in (depth, depth // 2))
        assert 0.3 * whole < half < 0.7 * whole


def test_the_longest_program_bounds_the_time() -> None:
    cost = cost_of(LARGE, "16", "cuda:90")
    assert cost is not None
    assert clocks(cost, LARGE, "16", Load(0, 0, 100), 132) == pytest.approx(START + 100 * cost.latency)
    programs = 264 * 10_000
    busy = programs * cost.fixed * (1 + SCATTERED / 256)
    assert clocks(cost, LARGE, "16", Load(programs, 0, 0), 132) == pytest.approx(busy / 132)


def test_a_multiprocessor_runs_as_many_programs_as_its_memory_and_registers_hold() -> None:
    of = {(t.pixels, t.outputs, t.stages): resident(t, p) for p, t in LISTED if p == "16"}
    assert of[128, 128, 3] == 2
    assert of[64, 128, 3] == 3  # 72 KiB each of 227
    assert of[64, 128, 2] == of[64, 64, 2] == 4  # 128 threads with 128 registers each
    assert resident(replace(LARGE, stages=8), "16") == 1


def test_the_busiest_multiprocessor_counts_more_than_the_average_but_not_alone() -> None:
    cost = cost_of(LARGE, "16", "cuda:90")
    assert cost is not None

    def of(programs: int) -> float:
        return clocks(cost, LARGE, "16", Load(programs, 1e4 * programs, 0), 132)

    assert of(264) < of(265) < of(396) < of(528) == pytest.approx(2 * of(264), rel=0.001)
    assert of(265) == pytest.approx(of(264) * (265 / 264) * (2 * 264 / 265) ** UNEVEN_PAIRS, rel=0.001)
    assert of(198) == pytest.approx(of(264) * (198 / 264) * (2 / 1.5) ** UNEVEN, rel=0.001)
    assert [of(33), of(66), of(132)] == pytest.approx([of(264) / 8, of(264) / 4, of(264) / 2], rel=0.001)


def test_outputs_in_short_pieces_cost_more() -> None:
    cost = cost_of(LARGE, "16", "cuda:90")
    assert cost is not None
    whole, pieces = (work_clocks(cost, LARGE, "16", Load(1, 0, 0, piece=piece)) for piece in (256, 64))
    assert cost.fixed < whole < pieces < 1.3 * cost.fixed


def test_steps_that_copy_narrow_pieces_take_longer() -> None:
    cost = cost_of(LARGE, "16", "cuda:90")
    assert cost is not None
    wide, narrow = (work_clocks(cost, LARGE, "16", Load(0, 100, 100, width)) for width in (NARROW_BYTES, 32))
    assert narrow == pytest.approx(NARROW * wide)
    assert NARROW > 1


@pytest.mark.parametrize("order", [2.1, 4, 6])
def test_the_norm_is_close_to_the_larger_one(order: float) -> None:
    assert norm(3, 3, order) == pytest.approx(3 * 2 ** (1 / order))
    for small in (0, 0.3, 1, 2.9):
        assert 3 <= norm(3, small, order) == norm(small, 3, order) <= 3 * 2 ** (1 / order)
    assert norm(3, 0.3, order) == pytest.approx(3, rel=0.01)
    assert norm(0, 0, order) == pytest.approx(0, abs=1e-20)
    assert norm(1e200, 1e200, order) < 2e200


def test_a_library_takes_the_longer_of_its_launch_and_products_and_of_memory() -> None:
    cudnn = CUDNN["16"]
    computing, memory = cudnn.seconds(100e-6, 0, 64, 512), cudnn.seconds(0, 100e-6, 64, 512)
    assert computing == pytest.approx(8.4e-6 + 100e-6 / 0.815 + 15e-9, rel=1e-3)
    assert memory == pytest.approx(100e-6 / 0.6, rel=1e-3)
    assert max(computing, memory) < cudnn.seconds(100e-6, 100e-6, 64, 512) < computing + memory


def test_a_fused_pointwise_conv_of_a_library_starts_sooner_and_a_residual_moves_slower() -> None:
    cudnn = CUDNN["16"]
    plain, pointwise = (cudnn.seconds(0, 0, 64, 512, pointwise) for pointwise in (False, True))
    assert pointwise < plain == cudnn.seconds(0, 0, 64, 512, pointwise=True, residual=True)
    assert cudnn.seconds(0, 1e-3, 64, 512, residual=True) > cudnn.seconds(0, 1e-3, 64, 512)


def test_few_outputs_cost_a_library_a_whole_tile() -> None:
    library = Library(0, 1, 0, 1, 1, 0)
    assert library.seconds(1, 0, 0, 32) == pytest.approx(4 * library.seconds(1, 0, 0, 128))
    assert library.seconds(1, 0, 0, 512) == library.seconds(1, 0, 0, 128)
