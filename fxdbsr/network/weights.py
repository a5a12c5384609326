"""The weights of layers as steps of the CPU engine read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_plan import Geometry, best_grid
from fxdbsr.nn.packed import PackedConv


@dataclass(frozen=True)
class Weights:
    """What a conv's step needs beside its geometry."""

    conv: Geometry
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None


def conv_weights(layer: PackedConv, target: jit.Target) -> Weights:
    """The weights of a conv, or of a layer as a conv, in taller blocks than the layer's own where those are faster."""
    planar = layer.lift or layer
    stride, padding, dilation = ((v[0], v[1]) for v in (planar.stride, planar.padding, planar.dilation))
    grid = best_grid(planar.grid, layer.crow_indices, layer.col_indices)
    bfloat16, bias = layer.values.dtype == torch.bfloat16, layer.planar_bias()
    epilogue = (bias is not None, layer.activation, layer.negative_slope)
    conv = Geometry(grid, stride, padding, dilation, bfloat16, *epilogue)
    if grid == planar.grid:
        return Weights(conv, layer.engine_weights(), layer.crow_indices, layer.col_indices, bias)
    values, crow_indices, col_indices = grid.pack(layer.weight().detach().view(grid.weight_shape))
    return Weights(conv, conv.order(target).weights(values), crow_indices, col_indices, bias)


def linear_weights(layer: nn.Linear, target: jit.Target) -> Weights:
    """The weights of a linear layer as those of a conv over one pixel, in blocks as wide as the input."""
    bfloat16, bias = layer.weight.dtype == torch.bfloat16, layer.bias
    grid = BlockGrid.of((layer.out_features, layer.in_features, 1, 1), (32, None))
    conv = Geometry(grid, (1, 1), (0, 0), (1, 1), bfloat16, bias is not None, "none", 0.0)
    keep = torch.ones(grid.shape, dtype=torch.bool)
    values, crow, col = grid.pack(layer.weight.detach()[:, :, None, None], keep)
    return Weights(conv, conv.order(target).weights(values), crow, col, None if bias is None else bias.detach())
