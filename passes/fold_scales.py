"""scaled layer(W, S, M) -> the same layer with W := expand(S * M) * W and S := 1.

Functional convs become modules on the way: scaled function(x, w, s, m, b) -> scaled conv(x). The blocks that S
or M switch off are then exact zeros of W; the outputs stay equal, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxdbsr.calls import FUNCTIONS
from fxdbsr.graph import called_module, get_attribute, replace
from fxdbsr.nn.scaled import ScaledFunction, ScaledLayer, scale_layer_
from fxdbsr.passes.lowering import Lowering


def fold_scales(model: fx.GraphModule, lowering: Lowering) -> None:
    """Fold every scale and mask of the graph into its weight.

    Raises:
        ValueError: NaN or infinity in a scale or weight, or a weight that a hook computes; the message names the layer.
    """
    for node in list(model.graph.nodes):
        if isinstance(layer := called_module(node), ScaledFunction):
            call_as_layer(node, layer)
    keep_what_is_read(model)
    layers = {str(n.target): m for n in model.graph.nodes if isinstance(m := called_module(n), ScaledLayer)}
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise ValueError(f"{name}.weight: a hook computes it: remove it first, or hook before prepare")
        for what, tensor in (("scale", layer.scale), ("weight", layer.weight), ("bias", layer.bias)):
            check_finite(tensor, f"{name}.{what}")  # type: ignore[arg-type]
    for layer in layers.values():
        folded = layer.scaled_weight().detach()
        if layer.grid.transposed:
            folded = folded.contiguous()
        layer.weight = nn.Parameter(folded, requires_grad=False)
        layer.scale = nn.Parameter(torch.ones_like(layer.scale), requires_grad=False)


def keep_what_is_read(model: fx.GraphModule) -> None:
    """Give tensors of called modules that the graph reads by name (`conv.weight.mean()`) a name of their own.

    The passes change and remove the modules' own ones.
    """
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    for node in list(model.graph.nodes):
        owner, _, leaf = str(node.target).rpartition(".")
        if node.op != "get_attr" or owner not in called or not node.users:
            continue
        name = f"{owner.replace('.', '_')}_{leaf}"
        value = get_attribute(model, str(node.target))
        while getattr(model, name, value) is not value:
            name = f"{name}_"
        model.register_buffer(name, value.detach())
        node.target = name


def check_finite(tensor: Tensor | None, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: `tensor` holds one; the message says `name` and how many.
    """
    if tensor is None or bool(tensor.sum(dtype=torch.float64).isfinite()):  # a sum of finite values, or nearly always
        return
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are not finite")


def call_as_layer(node: fx.Node, function: ScaledFunction) -> None:
    """Let `node` call a scaled layer with the tensors that it now passes to `function`."""
    model = node.graph.owning_module
    assert model is not None
    x, *tensors = node.args
    weight, scale, mask, bias = (
        None if t is None else get_attribute(model, str(t.target))  # type: ignore[union-attr]
        for t in tensors
    )
    grid, arguments = function.grid, dict(function.arguments)
    kind = FUNCTIONS[function.function][0]
    if kind is nn.Linear:
        layer: nn.Module = nn.Linear(grid.in_channels, grid.out_channels, bias is not None, device="meta")
    else:
        arguments.pop("groups", None)
        layer = kind(
            grid.in_channels,
            grid.out_channels,
            grid.kernel_size,
            groups=grid.groups,
            bias=bias is not None,
            device="meta",
            **arguments,
        )
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    scale_layer_(layer, grid, function.form)
    layer.register_parameter("scale", scale)
    layer.register_buffer("mask", mask)
    layer.training = False
    model.add_submodule(str(node.target), layer)
    with node.graph.inserting_before(node):
        new = node.graph.call_module(str(node.target), (x,))
    replace(node, new)
