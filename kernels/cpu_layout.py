"""Where the channels of an image lie in memory, and in which order a conv's weights are read.

An image is cut into planes of `block` channels; a plane is rows of pixels with a border of zeros around them, a
pixel is its `block` channels side by side:

    element (c, h, w) at  c // block * plane + (h + top) * line + (w + left) * pixel + c % block

With one plane of all channels and no border that is channels last. With planes as wide as a conv's blocks, neighbouring
pixels and taps are neighbours in memory, and padding needs no code. Where a conv has groups whose channels do not
fill their last plane, each group starts a plane of its own (`groups`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.jit import Target


@dataclass(frozen=True)
class Layout:
    """Layout of one image.

    Args:
        channels: C.
        size: (H, W) without the border.
        block: channels of a plane.
        pixel: elements from a pixel to the next, at least `block`; what is between is zero.
        border: rows of zeros above and below, columns left and right.
        groups: parts of the channels that start a plane each.
    """

    channels: int
    size: tuple[int, int]
    block: int
    pixel: int
    border: tuple[int, int] = (0, 0)
    groups: int = 1

    @classmethod
    def channels_last(cls, channels: int, size: tuple[int, int]) -> Layout:
        """One plane of all channels, no border."""
        return cls(channels, size, channels, channels)

    @property
    def line(self) -> int:
        """Elements from a row to the next."""
        return (self.size[1] + 2 * self.border[1]) * self.pixel

    @property
    def plane(self) -> int:
        """Elements from a plane to the next."""
        return (self.size[0] + 2 * self.border[0]) * self.line

    @property
    def group(self) -> int:
        """Elements from a group to the next."""
        return ceil(self.channels // self.groups / self.block) * self.plane

    @property
    def image(self) -> int:
        """Elements of an image."""
        return self.groups * self.group

    @property
    def is_full(self) -> bool:
        """True where every element of an image is one of its values."""
        return self.image == self.channels * self.size[0] * self.size[1]

    def at(self, channel: int, row: int = 0, column: int = 0) -> int:
        """Element of a channel at a pixel; negative rows and columns are in the border."""
        group, inner = divmod(channel, self.channels // self.groups)
        plane, within = divmod(inner, self.block)
        pixel = (row + self.border[0]) * self.line + (column + self.border[1]) * self.pixel
        return group * self.group + plane * self.plane + pixel + within

    def runs(self) -> list[tuple[int, int]]:
        """(first, number) of the channels of each plane."""
        size = self.channels // self.groups
        return [
            (group * size + start, min(self.block, size - start))
            for group in range(self.groups)
            for start in range(0, size, self.block)
        ]


@dataclass(frozen=True)
class Order:
    """Order of the weights of a block: `[R, S, BC / unit, height, unit]`.

    Args:
        height: outputs of a block, filled up with zeros to whole vectors.
        sums: float32 sums of an output side by side in a vector; more than 1 where a block is lower than a vector.
        unit: neighbouring inputs of an output that one instruction multiplies: one a sum, or a pair of bfloat16.
        spread: vectors hold outputs of several groups, each with inputs of its own; sums are of float32 weights.
        tiles: tile registers multiply, 16 outputs at a time.
    """

    height: int
    sums: int
    unit: int
    spread: bool
    tiles: bool = False

    @classmethod
    def of(cls, grid: BlockGrid, target: Target, bfloat16: bool) -> Order:
        """The order in which code for `target` reads the blocks of `grid`."""
        (height, width), lanes = grid.block_size, target.lanes
        spread = grid.groups > 1 and height > grid.out_channels // grid.groups
        sums = lanes // height if height < lanes and lanes % height == 0 and width % (lanes // height) == 0 else 1
        if spread:
            sums = 1
        elif bfloat16 and target.tiles and height >= 12:
            return cls(-(-height // 16) * 16, 1, 2, False, True)
        whole, rest = divmod(height, lanes)
        rest = max(4, 1 << (rest - 1).bit_length()) if rest else 0
        return cls(
            whole * lanes + rest if sums == 1 else height, sums, sums * (2 if bfloat16 and not spread else 1), spread
        )

    def is_stored(self, grid: BlockGrid, bfloat16: bool) -> bool:
        """True where `values [nnz, BO, BC, R, S]` themselves can be kept in this order, by their strides."""
        return self.height == grid.block_size[0] and self.unit == 1 and not (self.spread and bfloat16)

    def weights(self, values: Tensor) -> Tensor:
        """`values [nnz, BO, BC, R, S]` as `[nnz, R, S, ceil(BC / unit), height, unit]`."""
        _, bo, bc, *_ = values.shape
        pad = (0, 0, 0, 0, 0, -bc % self.unit, 0, self.height - bo)
        whole = torch.nn.functional.pad(values.float() if self.spread else values, pad)
        ordered: Tensor = whole.unflatten(2, (-1, self.unit)).permute(0, 4, 5, 2, 1, 3).contiguous()
        return ordered

    def block(self, inputs: int, taps: int) -> int:
        """Weights of a block with so many inputs."""
        return prod((taps, ceil(inputs / self.unit), self.unit, self.height))
