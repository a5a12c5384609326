"""packed conv(x, r) -> act(conv(x) + r) with the dense conv of `torch.nn`, and scaled layer(x) -> layer(x).

The inverse of `pack_convs` and `fuse_epilogues`: what is left is an ordinary model of torch's own layers, zeros
where blocks were dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.pack_convs import unscale_

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}


def unpack_convs(model: fx.GraphModule, lowering: Lowering) -> None:
    """Replace every packed conv and scaled layer of the graph by the layer of `torch.nn` that it stands for."""
    layers = {str(n.target): called_module(n) for n in model.graph.nodes if n.op == "call_module"}
    for node in list(model.graph.nodes):
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, PackedConv):
            spell_out(node, layer)
    for name, layer in layers.items():
        if isinstance(layer, PackedConv):
            model.set_submodule(name, dense_layer(layer))
        elif isinstance(layer, ScaledLayer):
            unscale_(layer)


def spell_out(node: fx.Node, layer: PackedConv) -> None:
    """Let nodes of their own do the residual add and the activation of the call `node`."""
    x, *residual = node.args
    graph, users, last = node.graph, list(node.users), node
    node.args = (x,)
    with graph.inserting_after(node):
        if residual:
            last = graph.call_function(operator.add, (node, residual[0]))
    with graph.inserting_after(last):
        if layer.activation == "leaky_relu":
            last = graph.call_function(F.leaky_relu, (last, layer.negative_slope))
        elif layer.activation != "none":
            last = graph.call_function(FUNCTIONS[layer.activation], (last,))
    for user in users:
        user.replace_input_with(node, last)


def dense_layer(layer: PackedConv) -> nn.Module:
    """The layer of `torch.nn` with `layer`'s weight, without its residual and activation."""
    grid, bias = layer.grid, layer.bias is not None
    axes = len(grid.kernel_size)
    if axes == 0:
        made: nn.Module = nn.Linear(grid.in_channels, grid.out_channels, bias, device="meta")
    else:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if grid.transposed else CONVS
        padding, mode = whole_padding(layer)
        geometry = (grid.kernel_size, tuple(layer.stride), padding)
        more: dict[str, Any] = {"dilation": tuple(layer.dilation), "padding_mode": mode, "groups": grid.groups}
        if grid.transposed:
            more["output_padding"] = tuple(layer.output_padding)
        made = kinds[axes - 1](grid.in_channels, grid.out_channels, *geometry, **more, bias=bias, device="meta")  # type: ignore
    made.register_parameter("weight", nn.Parameter(layer.weight()))
    if layer.bias is not None:
        made.register_parameter("bias", nn.Parameter(layer.bias.clone()))
    return made.eval()


def whole_padding(layer: PackedConv) -> tuple[tuple[int, ...] | str, str]:
    """`padding` and `padding_mode` of the conv that was packed: the inverse of `pack_convs.split_padding`."""
    if layer.pad is None:
        return tuple(layer.padding), "zeros"
    amounts, mode = layer.pad
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    even = all(before == after for before, after in pairs)
    return tuple(before for before, _ in reversed(pairs)) if even else "same", "zeros" if mode == "constant" else mode
