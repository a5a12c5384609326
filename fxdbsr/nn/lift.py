"""Layers that are 2-d convs in other clothes, which is what the engines run.

    linear            [..., I] -> [M, I, 1, 1], a 1x1 conv
    1-d conv          [N, C, L] -> [N, C, 1, L], a conv with kernel (1, k)
    transposed conv   stride 1: a conv with the taps in reverse; stride = kernel: a 1x1 conv with k outputs for each,
                      which then move beside each other

All are exact: the same products, summed. A lifted grid has the blocks of the layer's own in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid


@dataclass(frozen=True)
class Lift:
    """How a layer is a 2-d conv.

    Attributes:
        own: the layer's blocks.
        grid: those of the conv.
        stride, padding, dilation: of the conv.
        moves: outputs of the conv that move beside each other, along both axes; (1, 1) for none.
    """

    own: BlockGrid
    grid: BlockGrid
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    moves: tuple[int, int] = (1, 1)

    def values(self, values: Tensor) -> Tensor:
        """The layer's `[nnz, BO, BC, *kernel]` as the conv's `[nnz, BO', BC, R, S]`; a view where nothing moves."""
        axes = len(self.own.kernel_size)
        planar = values[(..., *(None,) * (2 - axes))] if axes == 0 else values.unsqueeze(3) if axes == 1 else values
        if self.moves != (1, 1):
            return planar.permute(0, 1, 3, 4, 2).flatten(1, 3)[..., None, None]
        return planar.flip(3, 4) if self.own.transposed else planar

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The layer's bias for the conv's outputs."""
        return bias if bias is None or self.moves == (1, 1) else bias.repeat_interleave(prod(self.moves))

    def image(self, x: Tensor) -> Tensor:
        """The layer's input as the conv's, `[N, C, H, W]`."""
        match len(self.own.kernel_size):
            case 0:
                return x.reshape(-1, self.grid.in_channels, 1, 1)
            case 1:
                return x.unsqueeze(2)
        return x

    def result(self, y: Tensor, x: Tensor) -> Tensor:
        """The conv's output as the layer's, for the input `x`."""
        if self.moves != (1, 1):
            r, s = self.moves
            y = y.unflatten(1, (-1, r, s)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        match len(self.own.kernel_size):
            case 0:
                return y.reshape(*x.shape[:-1], self.own.out_channels)
            case 1:
                return y.squeeze(2)
        return y

    def residual(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """What is added to the layer's output for `x` as the conv's epilogue adds it.

        None where outputs move first, or where it broadcasts in a way that the conv's axes do not show.
        """
        if self.moves != (1, 1) or residual.dim() != x.dim():
            return None
        if self.own.kernel_size:
            return self.image(residual)
        whole = residual.shape == (*x.shape[:-1], self.own.out_channels)
        return residual.reshape(-1, self.own.out_channels, 1, 1) if whole else None


def lift_of(
    grid: BlockGrid,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    output_padding: tuple[int, ...] = (),
) -> Lift | None:
    """How the layer with these blocks is a 2-d conv, or None where it is one, or is none."""
    axes = len(grid.kernel_size)
    if axes == 0:
        return Lift(grid, replace(grid, kernel_size=(1, 1)))
    if axes == 3 or (axes == 2 and not grid.transposed):
        return None
    flat = axes == 1
    kernel, strides, pads, steps = (
        (neutral, *given) if flat else tuple(given)
        for neutral, given in ((1, grid.kernel_size), (1, stride), (0, padding), (1, dilation))
    )
    planar = replace(grid, kernel_size=kernel, transposed=False)
    if not grid.transposed:
        return Lift(grid, planar, strides, pads, steps)  # type: ignore[arg-type]
    if any(output_padding):
        return None
    if set(strides) == {1}:
        reach = tuple(d * (k - 1) - p for k, p, d in zip(kernel, pads, steps, strict=True))
        return Lift(grid, planar, (1, 1), reach, steps) if min(reach) >= 0 else None  # type: ignore[arg-type]
    if strides == kernel and not any(pads) and set(steps) == {1} and grid.groups == 1:
        times = prod(kernel)
        high = (grid.block_size[0] * times, grid.block_size[1])
        wide = BlockGrid(grid.out_channels * times, grid.in_channels, (1, 1), 1, high)
        return Lift(grid, wide, moves=kernel)  # type: ignore[arg-type]
    return None


def why_unpacked(layer: nn.Module) -> str | None:
    """Why `layer`, which has a `grid`, is not packed, as a sentence, or None where it can be."""
    grid = layer.grid
    assert isinstance(grid, BlockGrid)
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    if getattr(layer, "chooses_size", False):
        return "its calls choose the size of their output"
    if grid.transposed:
        geometry: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.output_padding)
        return None if lift_of(grid, *geometry) else "no engine packs transposed convs whose kernels overlap"
    return None
