"""From packed blocks to the tables of the bitmask kernel; runs once, at conversion.

    choice, entries [steps + 1], pointers [unions + 1], weights [tiles, BO, BC], outputs [unions, 4*BO],
    blocks [steps + 1]

as `triton_bitmask` describes them. Every stored weight is there once: tiles are blocks at one tap, in the
order in which the kernel meets them (union, column, tap, row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_forms import Form
from fxdbsr.kernels.triton_pack import output_lanes, round_to_tf32
from fxdbsr.kernels.triton_plan import Choice
from fxdbsr.kernels.triton_rows import column_masks, spans, split_rows, unions, visits


def pack_bitmask(
    grid: BlockGrid, values: Tensor, crow_indices: Tensor, col_indices: Tensor, form: Form
) -> list[Tensor]:
    """The six tables, on the device of `values [nnz, BO, BC, R, S]`."""
    R, S = grid.kernel_size
    bo, bc = grid.block_size
    channels = grid.in_channels // grid.groups
    crow, col = crow_indices.tolist(), col_indices.tolist()
    joined = unions(split_rows(grid, column_masks(crow, col)), form.rows)
    joined.sort(key=visits, reverse=True)

    entries: list[int] = []
    blocks: list[int] = []
    order: list[int] = []  # index into [nnz, taps] of each tile
    pointers = [0]
    for members in joined:
        present = []  # for each row: column to stored block
        for row in members:
            stored = range(crow[row.block_row], crow[row.block_row + 1])
            present.append({col[i]: i for i in stored})
        for c, start, _ in spans(grid, members):
            taken = [(g, where[c]) for g, where in enumerate(present) if c in where]
            bits = sum(1 << g for g, _ in taken)
            for tap in range(R * S):
                first = members[0].group * channels + start
                entries.append(first | tap // S << 24 | tap % S << 27)
                blocks.append(len(order) << 4 | bits)
                order += [block * R * S + tap for _, block in taken]
        pointers.append(len(entries))
    tiles = values.detach().movedim((3, 4), (1, 2)).reshape(-1, bo, bc)
    if form.precision == "tf32":
        tiles = round_to_tf32(tiles)
    device = values.device
    return [
        Choice("bitmask", form.precision).as_table(device),
        torch.tensor([*entries, 0], dtype=torch.int32, device=device),
        torch.tensor(pointers, dtype=torch.int32, device=device),
        tiles[torch.tensor(order, dtype=torch.int64, device=device)].contiguous(),
        output_lanes(grid, joined, form.rows * bo).to(device),
        torch.tensor([*blocks, 0], dtype=torch.int32, device=device),
    ]
