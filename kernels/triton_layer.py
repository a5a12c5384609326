"""One conv at one input size, as the planner sees it: shapes, blocks, epilogue, and the work that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import or_
from typing import TYPE_CHECKING

import torch

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.triton_plan import precision_of
from fxdbsr.kernels.triton_rows import column_masks

if TYPE_CHECKING:
    from fxdbsr.kernels.choice import Case

SIZE = (32, 56, 56)  # images, height, width of an input of which nothing is known


@dataclass(frozen=True)
class Layer:
    """One conv at one input size, with its epilogue.

    Args:
        batch: images.
        size: input height and width.
        columns: for each row of blocks the bit mask of the columns in which it has a block.
        bias, residual: whether the epilogue adds them.
        activation: one of `geometry.ACTIVATIONS`.
        allow_3xtf32: whether float32 may be formed from three products in tf32.
        pool: side of a max pool that alone reads the output, 1 for none.
    """

    grid: BlockGrid
    batch: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    columns: tuple[int, ...]
    bias: bool = True
    residual: bool = False
    activation: str = "relu"
    allow_3xtf32: bool = False
    pool: int = 1

    @classmethod
    def of(cls, case: Case) -> Layer:
        """The layer of a case whose size is known, or taken to be `SIZE` where it is not."""
        images, height, width = case.size or SIZE
        stride, padding, dilation = ((pair[0], pair[1]) for pair in (case.stride, case.padding, case.dilation))
        geometry = (stride, padding, dilation)
        columns = column_masks(case.crow_indices.tolist(), case.col_indices.tolist())
        return cls(
            case.grid,
            images or SIZE[0],
            (height, width),
            *geometry,
            case.dtype,
            columns,
            case.bias,
            case.residual,
            case.activation,
            case.precision == "3xtf32",
            case.pool,
        )

    @property
    def precision(self) -> str:
        """How products are formed, as cuDNN's switch says now."""
        return precision_of(self.dtype)

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding, dilation."""
        return self.stride, self.padding, self.dilation

    @property
    def density(self) -> float:
        """Share of the blocks that are kept."""
        rows, columns = self.grid.shape
        return sum(mask.bit_count() for mask in self.columns) / (rows * columns)

    @property
    def pixels(self) -> int:
        """Output pixels, N*P*Q."""
        spatial = output_size(self.size, self.grid.kernel_size, *self.geometry)
        return self.batch * prod(spatial)

    @property
    def output_bytes(self) -> int:
        """Bytes of the conv's output, before a pool."""
        return self.pixels * self.grid.out_channels * self.dtype.itemsize

    @property
    def pool_bytes(self) -> int:
        """Bytes that a pool of its own reads and writes; 0 without one."""
        return round(self.output_bytes * (1 + 1 / self.pool**2)) if self.pool > 1 else 0

    @property
    def read_share(self) -> float:
        """Share of the input channels that a kept block reads."""
        rows, columns = self.grid.shape
        sharing = max(1, rows // self.grid.groups)  # rows of one group; a row may hold several
        of_groups = [self.columns[row : row + sharing] for row in range(0, rows, sharing)]
        return sum(reduce(or_, masks).bit_count() for masks in of_groups) / (len(of_groups) * columns)

    def bytes(self, residual: bool, pool: int = 1) -> float:
        """Bytes of device memory that its blocks touch, with a pool of that side in the kernel."""
        grid = self.grid
        read = self.batch * prod(self.size)
        if prod(grid.kernel_size) == 1:
            read = min(read, self.pixels)
        elements = read * grid.in_channels * self.read_share + prod(grid.weight_shape) * self.density
        return elements * self.dtype.itemsize + self.output_bytes * (int(residual) + 1 / pool**2)

    @property
    def flop(self) -> float:
        """FLOP of its blocks, two a product."""
        return 2 * self.pixels * prod(self.grid.weight_shape) * self.density

    def full(self) -> Layer:
        """The layer with all its blocks."""
        return replace(self, columns=((1 << self.grid.shape[1]) - 1,) * self.grid.shape[0])


def random_columns(grid: BlockGrid, density: float, seed: int = 0) -> tuple[int, ...]:
    """A random choice of `round(density * blocks)` blocks, as bit masks of columns.

    Raises:
        ValueError: a density outside 0 to 1.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected 0 to 1, got {density}")
    rows, columns = grid.shape
    kept = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    found = [0] * rows
    for block in kept[: round(density * rows * columns)].tolist():
        found[block // columns] |= 1 << block % columns
    return tuple(found)
