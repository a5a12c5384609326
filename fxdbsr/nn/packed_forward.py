"""A call of a packed conv: the engine's operator, or torch's own layer on all channels or on those that hold a block.

    y = activation(conv(x, unpack(values)) + bias + residual)

The operator takes whole batches of what the engine sees, a 2-d conv (`fxdbsr.nn.lift`), and residuals of exactly the
output's shape and dtype; everything else is added here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxdbsr.kernels import compact, dense, ops
from fxdbsr.kernels.choice import TORCH
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.plain import is_transformed
from fxdbsr.kernels.pool import max_pool
from fxdbsr.kernels.reference import activate
from fxdbsr.nn.leaf import call_in_graph

if TYPE_CHECKING:
    from fxdbsr.nn.packed import PackedConv


def run(layer: PackedConv, input: Tensor, residual: Tensor | None, pool: int) -> Tensor:
    """The output of `layer` for `input`, `[N, I, *size]` with or without N; errors as of `PackedConv.forward`."""
    if isinstance(input, fx.Proxy):
        return call_in_graph(layer, input, residual, pool)
    plain = isinstance(input, Tensor) and input.dim() == 4 and input.dtype == layer.values.dtype
    if pool == 1 or not plain or residual is not None or layer.pad is not None or layer.lift is not None:
        return max_pool(_run(layer, input, residual), pool)
    layer.refresh()
    run = _by_torch if layer.engine in TORCH else _by_operator
    return run(layer, input, None, layer.activation, pool)


def _run(layer: PackedConv, input: Tensor, residual: Tensor | None) -> Tensor:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if not torch.compiler.is_compiling() and not is_transformed():
        layer.refresh()
    batched = input.dim() == len(layer.stride) + 2 or not layer.stride
    x = input if batched else input.unsqueeze(0)
    if x.dtype != layer.values.dtype:
        if not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"input: expected {layer.values.dtype}, the dtype of the weights, got {x.dtype}")
        x = x.to(layer.values.dtype)
    if layer.pad is not None:
        x = F.pad(x, layer.pad[0], layer.pad[1])
    by_torch = layer.engine in TORCH
    if layer.lift is not None and not by_torch:
        return _lifted(layer, x, residual, batched)
    if batched and by_torch:
        return _by_torch(layer, x, residual, layer.activation)
    if batched and _fits(layer, x, residual):
        return _by_operator(layer, x, residual, layer.activation)
    y = _by_torch(layer, x, None, "none") if by_torch else _by_operator(layer, x, None, "none")
    y = y if batched else y.squeeze(0)
    return activate(y if residual is None else y + residual, layer.activation, layer.negative_slope)


def _lifted(layer: PackedConv, x: Tensor, residual: Tensor | None, batched: bool) -> Tensor:
    """The layer as a 2-d conv, `x` in the layer's own axes."""
    assert layer.lift is not None
    image = layer.lift.image(x)
    added = layer.lift.residual(residual, x) if batched and isinstance(residual, Tensor) else None
    alone = residual is None or (added is not None and _fits(layer, image, added))
    planar = _by_operator(layer, image, added if alone else None, layer.activation if alone else "none")
    y = layer.lift.result(planar, x)
    y = y if batched else y.squeeze(0)
    return y if residual is None or alone else activate(y + residual, layer.activation, layer.negative_slope)


def _fits(layer: PackedConv, x: Tensor, residual: Tensor | None) -> bool:
    """True where the operator can add `residual`: it does not broadcast and has the dtype of the output."""
    if residual is None:
        return True
    if not isinstance(residual, Tensor) or residual.dtype != x.dtype or residual.dim() != x.dim():
        return False  # before sizes are compared: with other axes, an exported batch could not be as large as one
    grid = layer.grid if layer.lift is None else layer.lift.grid
    spatial = output_size(x.shape[2:], grid.kernel_size, *layer.sizes[2:5])
    return tuple(residual.shape) == (x.shape[0], grid.out_channels, *spatial)


def _by_operator(layer: PackedConv, x: Tensor, residual: Tensor | None, activation: str, pool: int = 1) -> Tensor:
    """`torch.ops.fxdbsr.conv` on the layer's engine, and a max pool."""
    state: dict[str, Any] = layer._buffers
    own = layer.lift is None
    trained = torch.compiler.is_compiling() and layer.values.requires_grad  # then nothing derives again
    return ops.conv(
        x,
        state["values"] if own else layer.planar_values(),
        state["crow_indices"],
        state["col_indices"],
        state["bias"] if own else layer.planar_bias(),
        residual,
        [] if trained else layer.derived(),
        *layer.sizes,
        activation,
        layer.negative_slope,
        "reference" if trained else layer.engine,
        pool=pool,
    )


def _by_torch(layer: PackedConv, x: Tensor, residual: Tensor | None, activation: str, pool: int = 1) -> Tensor:
    """Torch's own layer, on all channels or on those that hold a block, and a max pool."""
    live = (torch.is_grad_enabled() or torch.compiler.is_compiling()) and layer.values.requires_grad
    if layer.engine == "compact":
        y = _compact(layer, x, live)
    else:
        weight, *spread = [layer.weight()] if live else layer.derived()
        if layer.grid.kernel_size and not layer.grid.transposed:
            geometry = (layer.stride, layer.padding, layer.dilation, layer.grid.groups)
            epilogue: tuple[Any, ...] = (activation, layer.negative_slope, pool, *spread)
            return dense.conv(x, weight, layer.bias, residual, *geometry, *epilogue)
        y = torch_layer(x, weight, layer.bias, layer)
    return max_pool(activate(y if residual is None else y + residual, activation, layer.negative_slope), pool)


def _compact(layer: PackedConv, x: Tensor, live: bool) -> Tensor:
    """The layer on the channels that hold a block, its bias on the others."""
    weight, rows, columns = layer.derived()
    weight = layer.compact_weight(rows, columns) if live else weight
    axis = 1 if layer.grid.kernel_size else x.dim() - 1
    if x.shape[axis] != layer.grid.in_channels:  # torch would not tell where more are given
        raise ValueError(f"input: expected {layer.grid.in_channels} on axis {axis}, got {tuple(x.shape)}")
    x = compact.take_channels(x, columns, axis) if len(columns) < layer.grid.in_channels else x
    y = torch_layer(x, weight, None if layer.bias is None else layer.bias[rows], layer)
    if len(rows) == layer.grid.out_channels:
        return y
    others = y.new_zeros(layer.grid.out_channels) if layer.bias is None else layer.bias
    return compact.place_channels(y, rows, axis, others)


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor | None, layer: PackedConv) -> Tensor:
    """`x` through the function of torch that `layer` stands for, with `weight` as stored; the groups are `layer`'s."""
    grid = layer.grid
    if not grid.kernel_size:
        return F.linear(x, weight, bias)
    if not grid.transposed:
        geometry = (layer.stride, layer.padding, layer.dilation, grid.groups)
        return dense.conv(x, weight, bias, None, *geometry, "none", 0.0)
    back: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(layer.stride) - 1]
    padding = (layer.padding, layer.output_padding or 0)
    y: Tensor = back(x, weight, bias, layer.stride, *padding, grid.groups, layer.dilation)
    return y
