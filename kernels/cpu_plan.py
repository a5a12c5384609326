"""A conv for the CPU engine: which blocks its code should have, and which layouts that code takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.cpu_layout import Layout, Order
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.jit import Target

RATES = {8: 0.78, 16: 0.91, 32: 1.0}  # of code for blocks of that height, relative (bench/results/cpu_resnet50.jsonl)
_WAYS = 8  # lines of a 4 KB column of the first-level cache


@dataclass(frozen=True)
class Geometry:
    """A conv without its layouts; sizes and steps are (rows, columns)."""

    grid: BlockGrid
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    bfloat16: bool
    bias: bool
    activation: str
    negative_slope: float
    pool: tuple[int, int] = (1, 1)  # windows of outputs that follow, of which the maxima are kept

    def order(self, target: Target) -> Order:
        """Order of the weights in code for `target`."""
        return Order.of(self.grid, target, self.bfloat16)

    def out(self, size: tuple[int, int]) -> tuple[int, int]:
        """(P, Q) for an input of `size`."""
        p, q = output_size(size, self.grid.kernel_size, self.stride, self.padding, self.dilation)
        return p, q


def work_by_height(grid: BlockGrid, crow_indices: Tensor, col_indices: Tensor) -> dict[int, float]:
    """Weights that a conv multiplies with blocks of each height that may be taken, over the rate of that height.

    A tall block holds the low ones below each other, zeros where they are not kept: more work at a higher rate.
    """
    height, width = grid.block_size
    rate = RATES.get(height, min(1.0, RATES[8] * height / 8) if height < 32 else 1.0)
    found = {height: len(col_indices) * height * width / rate}
    if grid.groups > 1 or height not in RATES or not len(col_indices):
        return found
    rows, columns = grid.shape
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    kept[torch.arange(rows).repeat_interleave(crow_indices.cpu().diff().long()), col_indices.cpu().long()] = True
    for tall, rate in RATES.items():
        if height < tall <= grid.out_channels:
            parts = ceil(rows * height / tall)
            padded = torch.nn.functional.pad(kept, (0, 0, 0, parts * (tall // height) - rows))
            found[tall] = int(padded.view(parts, -1, columns).any(1).sum()) * tall * width / rate
    return found


def best_grid(grid: BlockGrid, crow_indices: Tensor, col_indices: Tensor) -> BlockGrid:
    """The grid, of the same blocks or taller ones, in which the kept blocks are expected to run fastest."""
    work = work_by_height(grid, crow_indices, col_indices)
    best = min(work, key=work.__getitem__)
    return grid if best == grid.block_size[0] else BlockGrid.of(grid.weight_shape, (best, grid.block_size[1]))


def packed_input(conv: Geometry, target: Target, size: tuple[int, int]) -> Layout:
    """The layout in which the conv's code reads an input best: planes as wide as blocks, borders as wide as padding."""
    grid, order = conv.grid, conv.order(target)
    width = grid.block_size[1]
    if order.spread:
        width *= grid.block_size[0] // (grid.out_channels // grid.groups)
    pixel = width if order.spread else ceil(width / order.unit) * order.unit
    return Layout(grid.in_channels, size, width, pixel, conv.padding, 1 if order.spread else grid.groups)


def takes(conv: Geometry, target: Target, x: Layout) -> bool:
    """Whether the conv's code can read an input in layout `x` as it lies."""
    best = packed_input(conv, target, x.size)
    if x.border[0] < conv.padding[0] or x.border[1] < conv.padding[1]:
        return False
    if (x.block, x.pixel, x.groups) == (best.block, best.pixel, best.groups):
        return True
    group = x.channels // best.groups
    aligned = x.groups == 1 and (best.groups == 1 or group % x.block == 0 or x.block % group == 0)
    return aligned and x.block % best.block == 0 and group % best.block == 0 and best.pixel == best.block


def writes(conv: Geometry, y: Layout, target: Target) -> bool:
    """Whether the conv's code can write its output, or read a residual, in layout `y`."""
    grid, (height, _) = conv.grid, conv.grid.block_size
    if y.block >= y.channels:
        return y.groups == 1
    aligned = (
        grid.groups == 1 or grid.out_channels // grid.groups % height == 0 or height > grid.out_channels // grid.groups
    )
    vector = min(target.lanes, height)
    return y.groups == 1 and aligned and (y.block % height == 0 or (height % y.block == 0 and y.block % vector == 0))


def conflicts(pitch: int, pixels: int) -> bool:
    """Whether lines `pitch` bytes apart, one a pixel, crowd each other out of the first-level cache."""
    sets = 1
    while pitch % (4096 // sets) and sets < 64:
        sets *= 2
    return sets * _WAYS < pixels
