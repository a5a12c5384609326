"""The specification of the block-sparse conv, in plain torch: any device, dtype, number of axes and groups.

    y = activation(conv(x, unpack(values)) + bias + residual)

Every other engine is held against this one. It multiplies the unpacked, dense weight: right, not faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.blocks import BlockGrid


def activate(y: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """`y` through the epilogue's activation; NaN passes through all of them.

    Raises:
        ValueError: an activation that is not in `geometry.ACTIVATIONS`.
    """
    match activation:
        case "none":
            return y
        case "relu":
            return F.relu(y)
        case "relu6":
            return F.relu6(y)
        case "silu":
            return F.silu(y)
        case "hardswish":
            return F.hardswish(y)
        case "leaky_relu":
            return F.leaky_relu(y, negative_slope)
        case "sigmoid":
            return torch.sigmoid(y)
    raise ValueError(f"activation: unknown {activation!r}")


def conv(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tables: Sequence[Tensor],
    in_channels: int,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """`[N, I, *size]` to `[N, O, *out]`; arguments as in the operator `torch.ops.fxdbsr.conv`."""
    _, bo, bc, *kernel = values.shape
    grid = BlockGrid(out_channels, in_channels, tuple(kernel), groups, (bo, bc))
    weight = grid.unpack(values, crow_indices, col_indices)
    function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    y = function(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    return activate(y, activation, negative_slope)
