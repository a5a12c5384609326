"""The grid of blocks over a conv weight: where each block lies, how scales multiply it, how it is packed.

A weight `[O, I/groups, *kernel]` is cut along its outer two axes into blocks of `block_size = (BO, BC)`: BO
output channels by BC input channels, all taps of the kernel together. Blocks at the far edges are smaller.
With groups, rows are cut inside each group, or, where a group has fewer than BO outputs, each row of blocks
holds as many whole groups as fit. Transposed convs store `[I, O/groups, *kernel]`; the grid is (out, in) for
them too. A linear layer is a conv without taps.

Packed form: `values [nnz, BO, BC, *kernel]`, edge blocks padded with zeros, and `crow_indices [rows + 1]`,
`col_indices [nnz]` (int32) as in the block compressed sparse row format. A column index counts within a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from fxdbsr.config import BlockSize


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of one weight.

    Args:
        out_channels: O, over all groups.
        in_channels: I, over all groups.
        kernel_size: taps along each spatial axis; empty for a linear layer.
        groups: number of groups.
        block_size: (BO, BC) after clipping to the weight; make grids by `BlockGrid.of`.
        transposed: the weight is stored `[I, O/groups, *kernel]`.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    block_size: tuple[int, int]
    transposed: bool = False

    @classmethod
    def of(
        cls,
        weight_shape: tuple[int, ...],
        block_size: BlockSize,
        groups: int = 1,
        transposed: bool = False,
    ) -> BlockGrid:
        """The grid that `block_size` (entries of None: the whole axis) cuts a weight of `weight_shape` into.

        >>> BlockGrid.of((64, 3, 7, 7), (32, 32)).shape
        (2, 1)
        """
        first, second, *kernel = weight_shape
        out, in_ = (second * groups, first) if transposed else (first, second * groups)
        bo, bc = block_size
        per_group = out // groups
        bo = out if bo is None else min(bo, out)
        if bo < per_group:
            height = bo
        elif groups > 1:
            height = bo // per_group * per_group
        else:
            height = per_group
        width = in_ // groups if bc is None else min(bc, in_ // groups)
        return cls(out, in_, tuple(kernel), groups, (max(height, 1), max(width, 1)), transposed)

    @property
    def _sections(self) -> int:
        """Parts of the out axis that are cut separately: the groups, or one where a row holds whole groups."""
        return self.groups if self.block_size[0] < self.out_channels // self.groups else 1

    @property
    def _rows_per_section(self) -> int:
        return ceil(self.out_channels // self._sections / self.block_size[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the grid."""
        return (
            self._sections * self._rows_per_section,
            ceil(self.in_channels // self.groups / self.block_size[1]),
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape in which the layer stores its weight."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def is_exact(self) -> bool:
        """True where no block is smaller than `block_size`."""
        return (
            self.out_channels // self._sections % self.block_size[0] == 0
            and self.in_channels // self.groups % self.block_size[1] == 0
        )

    def rows(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) output channel of each row of blocks."""
        size = self.out_channels // self._sections
        for section in range(self._sections):
            for start in range(0, size, self.block_size[0]):
                yield section * size + start, section * size + min(start + self.block_size[0], size)

    def columns(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) input channel, within its group, of each column of blocks."""
        size = self.in_channels // self.groups
        for start in range(0, size, self.block_size[1]):
            yield start, min(start + self.block_size[1], size)

    def numel(self) -> Tensor:
        """Weights in each block, `[rows, columns]` int64, edge blocks with their real size."""
        heights = torch.tensor([stop - start for start, stop in self.rows()])
        widths = torch.tensor([stop - start for start, stop in self.columns()])
        return heights[:, None] * widths[None, :] * prod(self.kernel_size)

    def to_out_in(self, weight: Tensor) -> Tensor:
        """`weight` as `[O, I/groups, *kernel]`; a view unless the conv is transposed and grouped."""
        if not self.transposed:
            return weight
        parts = weight.unflatten(0, (self.groups, self.in_channels // self.groups))
        whole: Tensor = parts.transpose(1, 2).flatten(0, 1)
        return whole

    def from_out_in(self, weight: Tensor) -> Tensor:
        """The inverse of `to_out_in`."""
        if not self.transposed:
            return weight
        parts = weight.unflatten(0, (self.groups, self.out_channels // self.groups))
        whole: Tensor = parts.transpose(1, 2).flatten(0, 1)
        return whole

    def scale(self, weight: Tensor, scale: Tensor) -> Tensor:
        """`expand(scale) * weight`: every block of `weight` (as stored) times its entry of `scale`.

        The product is a broadcast over a view of the weight; where edge blocks are smaller, one product for
        each of the up to four kinds of blocks, joined by `cat`. Differentiable in both arguments.
        """
        if (blocks := self._cut(weight)) is not None:
            return (blocks * self._over(blocks, scale)).reshape(weight.shape)
        bands = [
            [(part * factor).flatten(3, 4).flatten(1, 2) for part, factor in band]
            for band in self._parts(self.to_out_in(weight), scale)
        ]
        rows = [band[0] if len(band) == 1 else torch.cat(band, 2) for band in bands]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        return self.from_out_in(whole.flatten(0, 1))

    def scale_(self, weight: Tensor, scale: Tensor) -> Tensor:
        """As `scale`, in place where `to_out_in` is a view; returns the result."""
        if (blocks := self._cut(weight)) is not None:
            blocks.mul_(self._over(blocks, scale))
            return weight
        if self.transposed and self.groups > 1:
            return self.scale(weight, scale)
        for band in self._parts(self.to_out_in(weight), scale):
            for part, factor in band:
                part.mul_(factor)
        return weight

    def _cut(self, weight: Tensor) -> Tensor | None:
        """View `[rows, height, columns, width, *kernel]` of `weight` as stored; None where there is no such view.

        A training step cuts every weight, and its time is the host's where the GPU is fast: this is the short way for
        blocks that are all of one size.
        """
        if self.transposed or not self.is_exact:
            return None
        height, width = self.block_size
        return weight.view(-1, height, weight.shape[1] // width, width, *self.kernel_size)

    @staticmethod
    def _over(blocks: Tensor, scale: Tensor) -> Tensor:
        """`scale [rows, columns]` as a factor for `_cut`'s blocks."""
        taps = (1,) * (blocks.dim() - 4)
        return scale.to(blocks.dtype).view(blocks.shape[0], 1, blocks.shape[2], 1, *taps)

    def _parts(self, weight: Tensor, scale: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """(blocks `[sections, rows, height, columns, width, *kernel]`, their scales) by height and width.

        Views of `weight [O, I/groups, *kernel]`: one pair where no block is smaller at the edges, else up to four.
        """
        w = weight.unflatten(0, (self._sections, -1))
        s = scale.unflatten(0, (self._sections, -1)).to(weight.dtype)
        taps = (1,) * len(self.kernel_size)
        bands = []
        for row, height in _pieces(w.shape[1], self.block_size[0]):
            band = []
            for column, width in _pieces(w.shape[2], self.block_size[1]):
                part = w[:, _span(row, height, self.block_size[0]), _span(column, width, self.block_size[1])]
                part = part.unflatten(2, (-1, width)).unflatten(1, (-1, height))
                factor = s[:, row, column]
                band.append((part, factor.view(*factor.shape[:2], 1, factor.shape[2], 1, *taps)))
            bands.append(band)
        return bands

    def block_sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` (shaped like the stored weight) over each block, `[rows, columns]`, at least in float32."""
        if (blocks := self._cut(tensor)) is not None:
            axes = (1, 3, *range(4, blocks.dim()))
            return blocks.sum(axes, dtype=None if blocks.dtype == torch.float64 else torch.float32)
        t = self.to_out_in(tensor).flatten(2) if self.kernel_size else self.to_out_in(tensor).unsqueeze(2)
        t = t.sum(2, dtype=torch.promote_types(t.dtype, torch.float32)).unflatten(0, (self._sections, -1))
        pad = (-t.shape[2] % self.block_size[1], -t.shape[1] % self.block_size[0])
        t = torch.nn.functional.pad(t, (0, pad[0], 0, pad[1])) if any(pad) else t
        t = t.unflatten(2, (-1, self.block_size[1])).unflatten(1, (-1, self.block_size[0])).sum((2, 4))
        sums: Tensor = t.flatten(0, 1)
        return sums

    def nonzero(self, weight: Tensor) -> Tensor:
        """`[rows, columns]` bool: the blocks of `weight` (as stored) that hold anything but zeros."""
        return self.block_sum((weight.detach() != 0).to(torch.float32)) > 0

    def pack(self, weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`values`, `crow_indices`, `col_indices` of the blocks of `weight` where `keep` (default: nonzero)."""
        keep = self.nonzero(weight) if keep is None else keep
        bo, bc = self.block_size
        w = self.to_out_in(weight).unflatten(0, (self._sections, -1))
        pad = [0, 0] * len(self.kernel_size) + [0, -w.shape[2] % bc, 0, -w.shape[1] % bo]
        w = torch.nn.functional.pad(w, pad) if any(pad) else w
        w = w.unflatten(2, (-1, bc)).unflatten(1, (-1, bo)).transpose(2, 3).flatten(0, 1)
        row, column = keep.nonzero(as_tuple=True)
        counts = keep.sum(1)
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return w[row, column].contiguous(), crow, column.to(torch.int32)

    def unpack(self, values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
        """The dense weight, as the layer stores it; the inverse of `pack`."""
        rows, columns = self.shape
        bo, bc = self.block_size
        counts = crow_indices.diff().long()
        row = torch.repeat_interleave(
            torch.arange(rows, device=values.device), counts, output_size=col_indices.shape[0]
        )
        blocks = values.new_zeros((rows, columns, bo, bc, *self.kernel_size))
        blocks[row, col_indices.long()] = values
        w = blocks.unflatten(0, (self._sections, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        w = w[:, : self.out_channels // self._sections, : self.in_channels // self.groups]
        return self.from_out_in(w.flatten(0, 1)).contiguous()

    def check_indices(self, crow_indices: Tensor, col_indices: Tensor, where: str = "") -> None:
        """Refuse indices that are not those of packed blocks of this grid.

        Raises:
            ValueError: they are not; the message begins with `where`.
        """
        rows, columns = self.shape
        for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"{where}{name}: expected one axis of int32, got {tensor.dim()} of {tensor.dtype}")
        counts = crow_indices.diff()
        if len(counts) != rows or crow_indices[0] != 0 or bool((counts < 0).any()) or counts.sum() != len(col_indices):
            raise ValueError(f"{where}crow_indices: expected {rows + 1} offsets from 0 to {len(col_indices)} in order")
        if bool(((col_indices < 0) | (col_indices >= columns)).any()):
            raise ValueError(f"{where}col_indices: expected columns from 0 to {columns - 1}")
        row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts.long())
        if bool(((row * columns + col_indices).diff() <= 0).any()):
            raise ValueError(f"{where}col_indices: expected the columns of a row in order, each once")

    def expand_mask(self, mask: Tensor) -> Tensor:
        """`mask [rows, columns]` at every weight, bool of the stored weight's shape. For checks and pictures."""
        out = torch.repeat_interleave(
            mask, torch.tensor([stop - start for start, stop in self.rows()], device=mask.device), 0
        )
        out = torch.repeat_interleave(
            out, torch.tensor([stop - start for start, stop in self.columns()], device=mask.device), 1
        )
        whole = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return self.from_out_in(out[(..., *(None,) * len(self.kernel_size))].expand(whole)).contiguous()


def _pieces(size: int, block: int) -> list[tuple[slice, int]]:
    """The (slice of the grid, block extent) pairs along one axis: the full blocks, then the edge block."""
    full, edge = divmod(size, block)
    pieces = [(slice(0, full), block)] if full else []
    return [*pieces, (slice(full, full + 1), edge)] if edge else pieces


def _span(blocks: slice, extent: int, block: int) -> slice:
    """Channels that the grid slice `blocks` of blocks `extent` wide covers, blocks starting every `block`."""
    return slice(blocks.start * block, (blocks.stop - 1) * block + extent)
