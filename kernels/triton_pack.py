"""From packed blocks to the tables of the gather kernel; runs once, at conversion.

A union of rows visits every column in which one of its rows has a block:

    choice, entries [steps + 1, BK/EW], pointers [unions + 1], weights [steps, LANES, BK], outputs [unions, LANES]

as `triton_gather` describes them; `choice` is a `triton_plan.Choice`. Nothing here depends on the size of the
input. With tf32 products the weights are rounded to tf32, which the matrix unit would cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_forms import Form, reduction
from fxdbsr.kernels.triton_plan import Choice, choose_depth, entry_width, lanes, power_of_two_divisor
from fxdbsr.kernels.triton_rows import Row, column_masks, spans, split_rows, unions

PADDING = 7 << 24 | 7 << 27


def run_length(out_channels: int, block_height: int, groups: int) -> int:
    """Lanes that always hold neighbouring outputs, the first one a multiple of their number."""
    per_group = out_channels // groups
    return power_of_two_divisor(gcd(per_group, min(block_height, per_group)), 16)


def pack(
    grid: BlockGrid, values: Tensor, crow_indices: Tensor, col_indices: Tensor, form: Form, depth: int | None = None
) -> list[Tensor]:
    """`choice`, `entries`, `pointers`, `weights`, `outputs` on the device of `values [nnz, BO, BC, R, S]`.

    Args:
        depth: BK, products of a step; None: `triton_plan.choose_depth`.
    """
    crow, col = crow_indices.tolist(), col_indices.tolist()
    joined = unions(split_rows(grid, column_masks(crow, col)), form.rows)
    joined.sort(key=lambda members: reduction(grid, members), reverse=True)
    most = max(lanes(sum(row.height for row in members)) for members in joined)
    if depth is None:
        depth = choose_depth(
            [reduction(grid, members) for members in joined], values.element_size(), most, form.precision
        )
    width = entry_width(grid.in_channels, grid.block_size[1], grid.groups, depth)
    blocks = values.detach().cpu().movedim(2, 4)  # [nnz, BO, R, S, BC]
    entries, pointers, tiles = [], [0], []
    for members in joined:
        steps = -(-reduction(grid, members) // depth)
        tiles.append(_weights(grid, members, blocks, crow, col, most, steps, depth))
        entries += _entries(grid, members, steps, depth, width)
        pointers.append(pointers[-1] + steps)
    entries += [PADDING] * (depth // width)
    device = values.device
    return [
        Choice("gather", form.precision).as_table(device),
        torch.tensor(entries, dtype=torch.int32, device=device).view(-1, depth // width),
        torch.tensor(pointers, dtype=torch.int32, device=device),
        _rounded(torch.cat(tiles).contiguous(), form.precision).to(device),
        output_lanes(grid, joined, most).to(device),
    ]


def output_lanes(grid: BlockGrid, joined: Sequence[Sequence[Row]], most: int) -> Tensor:
    """int32 `[unions, most]`: the output channel of each lane, `out_channels` and more where there is none."""
    beyond = (grid.out_channels + 15) // 16 * 16
    lane = torch.arange(beyond, beyond + most, dtype=torch.int32).repeat(len(joined), 1)
    for u, members in enumerate(joined):
        top = 0
        for row in members:
            lane[u, top : top + row.height] = torch.arange(row.first, row.first + row.height)
            top += row.height
    return lane


def _weights(
    grid: BlockGrid,
    members: Sequence[Row],
    blocks: Tensor,
    crow: list[int],
    col: list[int],
    most: int,
    steps: int,
    depth: int,
) -> Tensor:
    """`[steps, most, depth]`: the blocks of the union where its rows have them, zeros elsewhere."""
    taps = grid.kernel_size[0] * grid.kernel_size[1]
    tile = blocks.new_zeros(most, steps * depth)
    top = 0
    for row in members:
        present = {col[i]: i for i in range(crow[row.block_row], crow[row.block_row + 1])}
        at = 0
        for c, start, stop in spans(grid, members):
            size = taps * (stop - start)
            if c in present:
                block = blocks[present[c], row.skip : row.skip + row.height, :, :, : stop - start]
                tile[top : top + row.height, at : at + size] = block.flatten(1)
            at += size
        top += row.height
    return tile.view(most, steps, depth).movedim(0, 1)


def _entries(grid: BlockGrid, members: Sequence[Row], steps: int, depth: int, width: int) -> list[int]:
    """The words of all steps of the union, column by column, then tap by tap; padding at the end."""
    R, S = grid.kernel_size
    first = members[0].group * (grid.in_channels // grid.groups)
    words = [
        first + channel | r << 24 | s << 27
        for _, start, stop in spans(grid, members)
        for r in range(R)
        for s in range(S)
        for channel in range(start, stop, width)
    ]
    return words + [first | PADDING] * (steps * depth // width - len(words))


def _rounded(weights: Tensor, precision: str) -> Tensor:
    """The weights as the matrix unit shall see them; `[steps, 2, ...]`, high and low parts, for 3xTF32."""
    if precision == "tf32":
        return round_to_tf32(weights)
    if precision == "3xtf32":
        high = round_to_tf32(weights)
        return torch.stack((high, round_to_tf32(weights - high)), 1)
    if precision == "ieee":
        return weights.mT.contiguous().mT
    return weights


def round_to_tf32(tensor: Tensor) -> Tensor:
    """float32 `tensor` rounded to the 10 bits of tf32's mantissa, ties away from zero; infinities and NaN stay."""
    rounded = ((tensor.contiguous().view(torch.int32) + 0x1000) & -8192).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded, tensor)  # a GPU's own NaN, all bits set, would become -0
