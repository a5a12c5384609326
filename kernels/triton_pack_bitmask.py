"""From packed blocks to the tables of the bitmask kernel; runs once, at conversion.

    entries, blocks [steps + 1], pointers [unions + 1], weights [tiles, BO, BC], outputs [unions, 4*BO]

as `triton_bitmask` describes them. Every stored weight is there once: tiles are blocks at one tap, in the
order in which the kernel meets them (union, column, tap, row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_pack import cluster, columns_of, split_rows
from fxdbsr.kernels.triton_plan import BITMASK_CONFIGS, precision_of

ROWS = 4


def why_not_bitmask(grid: BlockGrid, dtype: torch.dtype) -> str | None:
    """A sentence that says why the bitmask kernel cannot run the conv, beyond `triton.why_not`; else None."""
    if not grid.is_exact or grid.out_channels // grid.groups % grid.block_size[0]:
        return "the bitmask kernel needs blocks that cut the weight evenly"
    if torch.version.hip:
        return "the bitmask kernel runs on NVIDIA GPUs"
    if (precision_of(dtype), *grid.block_size) not in BITMASK_CONFIGS:
        bo, bc = grid.block_size
        return f"the bitmask kernel has no tile for blocks of {bo}x{bc} with {precision_of(dtype)} products"
    return None


def pack_bitmask(grid: BlockGrid, values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> list[Tensor]:
    """The five tables, on the device of `values [nnz, BO, BC, R, S]`."""
    R, S = grid.kernel_size
    bo, bc = grid.block_size
    channels = grid.in_channels // grid.groups
    crow, col = crow_indices.tolist(), col_indices.tolist()
    rows = split_rows(grid, crow, col)
    unions = []
    for group in range(grid.groups):
        unions += cluster([row for row in rows if row.group == group], ROWS)
    unions.sort(key=lambda members: sum(row.columns.bit_count() for row in members), reverse=True)

    entries: list[int] = []
    blocks: list[int] = []
    order: list[int] = []  # index into [nnz, taps] of each tile
    pointers = [0]
    beyond = (grid.out_channels + 15) // 16 * 16
    lane = torch.arange(beyond, beyond + ROWS * bo, dtype=torch.int32).repeat(len(unions), 1)
    for u, members in enumerate(unions):
        present = []  # for each row: column to stored block
        for g, row in enumerate(members):
            stored = range(crow[row.block_row], crow[row.block_row + 1])
            present.append({col[i]: i for i in stored})
            lane[u, g * bo : (g + 1) * bo] = torch.arange(row.first, row.first + bo)
        mask = columns_of(members)
        for c in (c for c in range(mask.bit_length()) if mask >> c & 1):
            taken = [(g, where[c]) for g, where in enumerate(present) if c in where]
            bits = sum(1 << g for g, _ in taken)
            for tap in range(R * S):
                first = members[0].group * channels + c * bc
                entries.append(first | tap // S << 24 | tap % S << 27)
                blocks.append(len(order) << 4 | bits)
                order += [block * R * S + tap for _, block in taken]
        pointers.append(len(entries))
    tiles = values.detach().movedim((3, 4), (1, 2)).reshape(-1, bo, bc)
    device = values.device
    return [
        torch.tensor([*entries, 0], dtype=torch.int32, device=device),
        torch.tensor(pointers, dtype=torch.int32, device=device),
        tiles[torch.tensor(order, dtype=torch.int64, device=device)].contiguous(),
        lane.to(device),
        torch.tensor([*blocks, 0], dtype=torch.int32, device=device),
    ]
