"""From packed blocks to the tables of the gather kernel; runs once, at conversion.

Rows of blocks (parts of rows, where a row holds several groups) that read the same input channels are joined,
1, 2 or 4 at a time, into unions; a union visits every column in which one of its rows has a block:

    entries [steps + 1, BK/EW], pointers [unions + 1], weights [steps, BN, BK], outputs [unions, BN]

as `triton_gather` describes them. Nothing here depends on the size of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from random import Random

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_plan import (
    choose_depth,
    lanes,
    power_of_two_divisor,
    precision_of,
    step_clocks,
)

PADDING = 7 << 24 | 7 << 27


@dataclass(frozen=True)
class Row:
    """Outputs `first .. first + height` of one group: lines `skip .. skip + height` of a row of blocks.

    Args:
        columns: bit c is set where the row has a block in column c.
    """

    first: int
    height: int
    group: int
    block_row: int
    skip: int
    columns: int


def entry_width(in_channels: int, block_width: int, groups: int, depth: int) -> int:
    """EW: input channels of one entry, the largest power of two that cuts every block evenly."""
    return power_of_two_divisor(gcd(in_channels // groups, block_width), min(32, depth))


def run_length(out_channels: int, block_height: int, groups: int) -> int:
    """Lanes that always hold neighbouring outputs, the first one a multiple of their number."""
    per_group = out_channels // groups
    return power_of_two_divisor(gcd(per_group, min(block_height, per_group)), 16)


def split_rows(grid: BlockGrid, crow: list[int], col: list[int]) -> list[Row]:
    """The rows of blocks, those that hold several groups cut into one for each group."""
    per_group = grid.out_channels // grid.groups
    rows = []
    for i, (start, stop) in enumerate(grid.rows()):
        columns = sum(1 << c for c in col[crow[i] : crow[i + 1]])
        first = start
        while first < stop:
            group = first // per_group
            end = min(stop, (group + 1) * per_group)
            rows.append(Row(first, end - first, group, i, first - start, columns))
            first = end
    return rows


def cluster(rows: list[Row], size: int, swaps: int = 2000) -> list[list[Row]]:
    """Sets of up to `size` rows with many columns in common: greedy, then random swaps that do not hurt."""

    def cost(members: list[Row]) -> int:
        union = 0
        for row in members:
            union |= row.columns
        return union.bit_count()

    if size == 1:
        return [[row] for row in rows]
    left = sorted(rows, key=lambda row: row.columns.bit_count())
    sets = []
    while left:
        members = [left.pop()]
        union = members[0].columns
        while len(members) < size and left:
            best = min(range(len(left)), key=lambda i: ((union | left[i].columns).bit_count(), i))
            members.append(left.pop(best))
            union |= members[-1].columns
        sets.append(members)
    random = Random(0)
    for _ in range(swaps if len(sets) > 1 else 0):
        a, b = random.sample(range(len(sets)), 2)
        i, j = random.randrange(len(sets[a])), random.randrange(len(sets[b]))
        one, two = sets[a].copy(), sets[b].copy()
        one[i], two[j] = two[j], one[i]
        if cost(one) + cost(two) <= cost(sets[a]) + cost(sets[b]):
            sets[a], sets[b] = one, two
    return sets


def choose_unions(rows: list[Row], width: int, taps: int, precision: str, size: int | None) -> list[list[Row]]:
    """Rows joined 1, 2 or 4 at a time (`size` if given), whichever `step_clocks` finds cheapest."""
    height = max(row.height for row in rows)
    best: tuple[float, list[list[Row]]] | None = None
    for candidate in (1, 2, 4) if size is None else (size,):
        if candidate > 1 and candidate * height > 128:
            continue
        unions = []
        for group in sorted({row.group for row in rows}):
            unions += cluster([row for row in rows if row.group == group], candidate)
        outputs = max(lanes(sum(row.height for row in members)) for members in unions)
        blocks = sum(columns_of(members).bit_count() for members in unions)
        clocks = blocks * width * taps * step_clocks(outputs, precision, taps)
        if best is None or clocks < best[0]:
            best = (clocks, unions)
    assert best is not None
    return best[1]


def columns_of(members: list[Row]) -> int:
    """Bit mask of the columns in which any of the rows has a block."""
    union = 0
    for row in members:
        union |= row.columns
    return union


def pack(
    grid: BlockGrid,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    rows_per_union: int | None = None,
    precision: str | None = None,
) -> list[Tensor]:
    """`entries`, `pointers`, `weights`, `outputs` on the device of `values [nnz, BO, BC, R, S]`.

    Args:
        rows_per_union: rows of blocks to a union, 1, 2 or 4; None chooses.
        precision: one of `triton_plan.PRECISIONS`; None takes that of the dtype.
    """
    precision = precision or precision_of(values.dtype)
    R, S = grid.kernel_size
    taps = R * S
    channels = grid.in_channels // grid.groups
    crow, col = crow_indices.tolist(), col_indices.tolist()
    rows = split_rows(grid, crow, col)
    unions = choose_unions(rows, grid.block_size[1], taps, precision, rows_per_union)
    spans = list(grid.columns())

    def reduction(members: list[Row]) -> int:
        mask = columns_of(members)
        return taps * sum(stop - start for c, (start, stop) in enumerate(spans) if mask >> c & 1)

    unions.sort(key=reduction, reverse=True)
    depth = choose_depth([reduction(members) for members in unions], values.dtype)
    width = entry_width(grid.in_channels, grid.block_size[1], grid.groups, depth)
    outputs = max(lanes(sum(row.height for row in members)) for members in unions)
    blocks = values.detach().cpu().movedim(2, 4)  # [nnz, BO, R, S, BC]

    beyond = (grid.out_channels + 15) // 16 * 16
    entries, pointers, tiles = [], [0], []
    lane = torch.arange(beyond, beyond + outputs, dtype=torch.int32).repeat(len(unions), 1)
    for u, members in enumerate(unions):
        mask = columns_of(members)
        visited = [c for c in range(len(spans)) if mask >> c & 1]
        depths = [taps * (spans[c][1] - spans[c][0]) for c in visited]
        total = sum(depths)
        steps = -(-total // depth)
        tile = blocks.new_zeros(outputs, steps * depth)
        top = 0
        for row in members:
            lane[u, top : top + row.height] = torch.arange(row.first, row.first + row.height)
            present = {col[i]: i for i in range(crow[row.block_row], crow[row.block_row + 1])}
            at = 0
            for c, size in zip(visited, depths, strict=True):
                if c in present:
                    block = blocks[present[c], row.skip : row.skip + row.height, :, :, : size // taps]
                    tile[top : top + row.height, at : at + size] = block.flatten(1)
                at += size
            top += row.height
        tiles.append(tile.view(outputs, steps, depth).movedim(0, 1))
        first = members[0].group * channels
        words = [
            first + channel | r << 24 | s << 27
            for c in visited
            for r in range(R)
            for s in range(S)
            for channel in range(*spans[c], width)
        ]
        words += [first | PADDING] * (steps * depth // width - len(words))
        entries += words
        pointers.append(pointers[-1] + steps)
    entries += [PADDING] * (depth // width)
    device = values.device
    weights = torch.cat(tiles)
    if precision == "3xtf32":
        high = round_to_tf32(weights)
        weights = torch.stack((high, round_to_tf32(weights - high)), 1)
    return [
        torch.tensor(entries, dtype=torch.int32, device=device).view(-1, depth // width),
        torch.tensor(pointers, dtype=torch.int32, device=device),
        weights.contiguous().to(device),
        lane.to(device),
    ]


def round_to_tf32(tensor: Tensor) -> Tensor:
    """float32 `tensor` rounded to the 10 bits of tf32's mantissa, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & -8192).view(torch.float32)
