"""The forms in which a conv can run on the Triton engine, and the work of each: what the planner weighs.

A form is a kernel and how rows of blocks share its tiles. Its work is counted from the blocks that are there:
unions of rows are made as `triton_pack` makes them, then the steps of each are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_configs import BITMASK, Tile, bitmask_tile, default_tiles, tiles
from fxdbsr.kernels.triton_cost import bitmask_clocks, fixed_clocks, gather_clocks
from fxdbsr.kernels.triton_device import Device
from fxdbsr.kernels.triton_measured import UNMEASURED, Load, cost_of, work_clocks
from fxdbsr.kernels.triton_plan import choose_depth, entry_width, lanes
from fxdbsr.kernels.triton_rows import Row, spans, split_rows, unions, visits

ROWS = (1, 2, 4)
BITMASK_ROWS = 4
TALLEST = 128


@dataclass(frozen=True)
class Form:
    """One way to run a conv.

    Args:
        kernel: "gather" or "bitmask".
        rows: rows of blocks that share an activation tile.
        precision: one of `triton_configs.PRECISIONS`.
    """

    kernel: str
    rows: int
    precision: str

    @property
    def sums(self) -> int:
        """Tiles of outputs that a program sums."""
        return self.rows if self.kernel == "bitmask" else 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `triton.tables`, plain values."""
        found: dict[str, Any] = {"kernel": self.kernel}
        if self.kernel == "gather":
            found["rows_per_union"] = self.rows
        if self.precision == "3xtf32":
            found["precision"] = "3xtf32"
        return found

    def __str__(self) -> str:
        name = "bitmask" if self.kernel == "bitmask" else f"gather, {self.rows} rows" if self.rows > 1 else "gather"
        return f"{name}, 3xTF32" if self.precision == "3xtf32" else name


@dataclass(frozen=True)
class Work:
    """What a form does for each tile of pixels.

    Args:
        lengths: steps of each union, the longest first.
        taken: blocks taken a step, of the bitmask kernel.
        lanes: outputs of a union, padded.
        depth: products of a step along the reduction.
        bytes: that a step copies of a pixel at a time.
        piece: bytes of neighbouring outputs that a program writes, on average.
    """

    lengths: tuple[int, ...]
    taken: float
    lanes: int
    depth: int
    bytes: int
    piece: float

    @property
    def unions(self) -> int:
        """Programs for each tile of pixels, before a tile narrower than the table cuts them."""
        return len(self.lengths)

    @property
    def steps(self) -> int:
        """Steps over all unions."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Steps of the longest union."""
        return self.lengths[0]

    def load(self, each: int, splits: int = 1, residual: bool = False, activation: str = "none") -> Load:
        """Of a kernel with `each` programs for a union, each of them in `splits` parts of the reduction."""
        sizes = (each * self.unions * splits, each * self.steps, ceil(self.longest / splits))
        return Load(*sizes, self.bytes, self.piece, residual, activation)


def forms(grid: BlockGrid, precision: str) -> list[Form]:
    """Every form that can run a conv of that grid."""
    height = min(grid.block_size[0], grid.out_channels // grid.groups)
    found = [Form("gather", rows, precision) for rows in ROWS if rows == 1 or rows * height <= TALLEST]
    if why_not_bitmask(grid, precision) is None:
        found.append(Form("bitmask", BITMASK_ROWS, precision))
    return found


def why_not_bitmask(grid: BlockGrid, precision: str) -> str | None:
    """A sentence that says why the bitmask kernel cannot run the conv, beyond `triton.why_not`; else None."""
    if not grid.is_exact or grid.out_channels // grid.groups % grid.block_size[0]:
        return "the bitmask kernel needs blocks that cut the weight evenly"
    if torch.version.hip:
        return "the bitmask kernel runs on NVIDIA GPUs"
    if (precision, *grid.block_size) not in BITMASK:
        bo, bc = grid.block_size
        return f"the bitmask kernel has no tile for blocks of {bo}x{bc} with {precision} products"
    return None


def may_win(form: Form, device: Device) -> bool:
    """False for the bitmask kernel on sm_90: gather was faster on all convs that were measured (docs/gpu.md).

    Tuning measures it all the same, and it runs where it is asked for by name.
    """
    return form.kernel != "bitmask" or device.target != "cuda:90"


@lru_cache(1024)
def work(grid: BlockGrid, columns: tuple[int, ...], form: Form, itemsize: int) -> Work:
    """The work of `form` where row i of blocks has the columns in the bit mask `columns[i]`."""
    rows = split_rows(grid, columns)
    joined = unions(rows, form.rows)
    taps = prod(grid.kernel_size)
    if form.kernel == "bitmask":
        steps = [visits(members) * taps for members in joined]
        blocks = sum(row.columns.bit_count() for row in rows) * taps
        height, width = grid.block_size
        lengths = tuple(sorted(steps, reverse=True))
        taken = blocks / max(sum(steps), 1)
        return Work(lengths, taken, form.rows * height, width, width * itemsize, height * itemsize)
    reductions = [reduction(grid, members) for members in joined]
    widest = max(lanes(sum(row.height for row in members)) for members in joined)
    depth = choose_depth(reductions, itemsize, widest, form.precision)
    lengths = tuple(sorted((-(-n // depth) for n in reductions), reverse=True))
    width = entry_width(grid.in_channels, grid.block_size[1], grid.groups, depth)
    pieces = sum(a.first + a.height != b.first for members in joined for a, b in pairwise(members)) + len(joined)
    return Work(lengths, 1.0, widest, depth, width * itemsize, itemsize * grid.out_channels / pieces)


def reduction(grid: BlockGrid, members: Sequence[Row]) -> int:
    """Products that a union of these rows forms for each output, before padding to whole steps."""
    return prod(grid.kernel_size) * sum(stop - start for _, start, stop in spans(grid, members))


def step_clocks(form: Form, work: Work, tile: Tile, taps: int, device: Device) -> float:
    """Clocks of one step of `form` with `tile`."""
    if form.kernel == "bitmask":
        return bitmask_clocks(tile, form.precision, work.taken, taps, device)
    return gather_clocks(tile, form.precision, taps, device)


def tiles_of(form: Form, work: Work, taps: int, device: Device) -> tuple[Tile, ...]:
    """Tiles that `form` may run with, most pixels first."""
    if form.kernel == "bitmask":
        return (bitmask_tile(form.precision, (work.lanes // form.rows, work.depth), taps),)
    return default_tiles(device.target, form.precision, work.lanes, work.depth, taps)


def busy_clocks(form: Form, work: Work, taps: int, device: Device) -> float:
    """Clocks for each pixel, over all outputs, of a device that has all the pixels that it can use."""
    measured = []
    for tile in tiles(device.target, form.precision, work.lanes, work.depth, taps) if form.kernel == "gather" else ():
        cost, each = cost_of(tile, form.precision, device.target), work.lanes // tile.outputs
        if cost is not None:
            measured.append(work_clocks(cost, tile, form.precision, work.load(each)) / tile.pixels)
    if measured:
        return min(measured)
    tile = tiles_of(form, work, taps, device)[0]
    slices = work.lanes // (tile.outputs * form.sums)
    looping = work.steps * step_clocks(form, work, tile, taps, device)
    busy = slices * (looping + work.unions * fixed_clocks(tile, taps, form.sums)) / tile.pixels
    return busy * (UNMEASURED if device.target == "cuda:90" else 1)


def by_work(grid: BlockGrid, columns: tuple[int, ...], precision: str, itemsize: int, device: Device) -> list[Form]:
    """All forms, that of the least work first: the order for a conv whose input size is not known."""
    taps = prod(grid.kernel_size)

    def clocks(form: Form) -> float:
        return busy_clocks(form, work(grid, columns, form, itemsize), taps, device)

    return sorted((form for form in forms(grid, precision) if may_win(form, device)), key=clocks)
