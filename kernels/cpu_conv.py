"""All that the CPU engine's code of a conv depends on: the code is written, compiled and kept once for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxdbsr.kernels.cpu_layout import Layout, Order
from fxdbsr.kernels.jit import Target


@dataclass(frozen=True)
class Conv:
    """All that the code of a conv knows; sizes and steps are (rows, columns).

    Args:
        target: what the code is for.
        bfloat16: dtype of every tensor; float32 otherwise.
        block: (outputs, inputs) of a block.
        order: of the weights in a block.
        group: (outputs, inputs) of a group.
        kernel, stride, padding, dilation: as in nn.Conv2d.
        x, y, residual: layouts of one image.
        out: (P, Q), the outputs that tiles are cut from.
        tile: (rows, columns) of pixels.
        edge: outputs of the last block row of a group.
        bias: there is one.
        activation, negative_slope: of the epilogue.
        pool: windows of (rows, columns) of the outputs, of which `y` takes the maxima; (1, 1) to take all outputs.
    """

    target: Target
    bfloat16: bool
    block: tuple[int, int]
    order: Order
    group: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    x: Layout
    y: Layout
    residual: Layout | None
    out: tuple[int, int]
    tile: tuple[int, int]
    edge: int
    bias: bool
    activation: str
    negative_slope: float
    pool: tuple[int, int] = (1, 1)

    @property
    def patch(self) -> tuple[int, int]:
        """(rows, columns) of outputs computed at a place: a tile, or tiles below each other that fill windows."""
        return max(self.tile[0], self.pool[0]), self.tile[1]

    @property
    def last(self) -> Conv:
        """The code for what tiles leave over of the rows; itself where the last tile starts early instead."""
        rest = self.out[0] % self.tile[0]
        may = rest and self.pool == (1, 1) and not self.order.tiles
        return replace(self, tile=(rest, self.tile[1])) if may else self

    @property
    def written(self) -> Layout:
        """Where tiles write: `y`, or a patch of one block row's outputs that is pooled while it is in the cache."""
        return self.y if self.pool == (1, 1) else Layout.channels_last(self.block[0], self.patch)

    @property
    def element(self) -> tuple[str, int]:
        """(IR type that an element is copied with, bytes)."""
        return ("i16", 2) if self.bfloat16 else ("float", 4)

    @property
    def weight(self) -> tuple[str, int]:
        """(IR type of a weight, bytes)."""
        return ("float", 4) if self.order.spread else self.element

    @property
    def inputs(self) -> int:
        """Inputs of a block, filled up to whole units."""
        return -(-self.block[1] // self.order.unit) * self.order.unit

    def parts(self, edge: bool) -> list[tuple[int, int]]:
        """(first, number) of the outputs that a micro-kernel computes at once, of a block row or of the edge one."""
        most = self.target.vectors * self.target.lanes
        whole = self.edge if edge else self.block[0]
        return [(start, min(most, whole - start)) for start in range(0, whole, most)]
