"""torch's own conv on the channels that hold a block alone: which those are, how they are taken out and put back.

    y[:, rows] = conv(x[:, columns], weight[rows][:, columns])

The other channels of y hold their bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid


def channels_with_blocks(grid: BlockGrid, crow_indices: Tensor, col_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Output channels and input channels that hold a block, of a conv with one group."""
    rows = [range(*span) for span, count in zip(grid.rows(), crow_indices.diff().tolist(), strict=True) if count]
    used = set(col_indices.tolist())
    columns = [range(*span) for i, span in enumerate(grid.columns()) if i in used]
    flat = [torch.tensor([c for span in spans for c in span], dtype=torch.int64) for spans in (rows, columns)]
    return flat[0], flat[1]


def why_not_compact(grid: BlockGrid, crow_indices: Tensor, col_indices: Tensor) -> str | None:
    """Why a conv on the channels that hold a block is no candidate, as a sentence, or None where it is one."""
    if grid.groups > 1:
        return "channels of a grouped conv cannot be left out one by one"
    rows, columns = channels_with_blocks(grid, crow_indices, col_indices)
    if not len(rows):
        return "no channel holds a block"
    whole = len(rows) == grid.out_channels and len(columns) == grid.in_channels
    return "every channel holds a block" if whole else None


def take_channels(x: Tensor, channels: Tensor, axis: int) -> Tensor:
    """`x` at `channels` along `axis`; where channels lie last in memory, a copy of rows, which is many times faster."""
    if x.stride(axis) != 1 or axis == x.dim() - 1:
        return x.index_select(axis, channels)
    last = x.movedim(axis, -1)
    taken = last.reshape(-1, last.shape[-1]).index_select(1, channels)
    return taken.view(*last.shape[:-1], len(channels)).movedim(-1, axis)


def place_channels(y: Tensor, channels: Tensor, axis: int, others: Tensor) -> Tensor:
    """`others [O]` everywhere, but for `y` at `channels` along `axis`; channels lie in memory as in `y`."""
    last = y.movedim(axis, -1)
    shape, number = last.shape[:-1], len(others)
    others = others.to(y.dtype)
    if y.stride(axis) == 1:
        rows = last.reshape(-1, len(channels))
        placed = others.expand(len(rows), number).contiguous().index_copy(1, channels, rows)
        return placed.view(*shape, number).movedim(-1, axis)
    whole = others.expand(*shape, number).movedim(-1, axis).contiguous()
    return whole.index_copy(axis, channels, y)
