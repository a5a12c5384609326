"""F.conv2d(x, w, b) -> scaled function(x, w, w_scale, w_mask, b), where w is a parameter of the model.

The parameter `a.b.w` stays; its owner `a.b` gets the parameter `w_scale` and the buffer `w_mask`, and the call
becomes a module without state, `a.b.w_conv`. A conv on a computed weight or bias, or with a stride or padding
that is computed in the forward, is left alone (`why_unscalable_call`).
"""

from __future__ import annotations

from itertools import count

import torch
from torch import fx

from fxdbsr.blocks import BlockGrid
from fxdbsr.calls import FUNCTIONS, arguments_of, why_unscalable_call
from fxdbsr.graph import get_attribute, replace
from fxdbsr.nn.scaled import ScaledFunction, ScaledLayer, check_weight
from fxdbsr.nn.scaling import ones_like_scales
from fxdbsr.passes.selection import Selection


def scale_functions(model: fx.GraphModule, selection: Selection) -> None:
    """Scale every conv of `selection` that the graph calls as a function."""
    layers = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, ScaledLayer)}
    used: set[str] = set()
    for node in list(model.graph.nodes):
        grid = grid_of_call(node, selection)
        if grid is None:
            continue
        arguments = arguments_of(node)
        x, w, bias = (arguments.pop(key, None) for key in ("input", "weight", "bias"))
        name = str(w.target)
        owner_name, _, leaf = name.rpartition(".")
        owner, weight = model.get_submodule(owner_name), get_attribute(model, name)
        scale, mask = f"{name}_scale", f"{name}_mask"
        if id(weight) in layers:
            scale, mask = f"{layers[id(weight)]}.scale", f"{layers[id(weight)]}.mask"
        elif not hasattr(owner, f"{leaf}_scale"):
            ones = ones_like_scales(grid, selection.config.form, weight)
            owner.register_parameter(f"{leaf}_scale", ones)
            owner.register_buffer(f"{leaf}_mask", torch.ones_like(ones, dtype=torch.bool, requires_grad=False))
        if tuple(get_attribute(model, scale).shape) != grid.shape:
            continue
        function = ScaledFunction(grid, selection.config.form, node.target, arguments)
        used.add(call := add_function(model, f"{name}_conv", function, used))
        with model.graph.inserting_before(node):
            grids = [model.graph.get_attr(target) for target in (scale, mask)]
            new = model.graph.call_module(call, (x, w, *grids, bias))
        replace(node, new)


def add_function(model: fx.GraphModule, name: str, function: ScaledFunction, used: set[str]) -> str:
    """Add `function` to `model`; returns its name, `name` with a number where that is taken.

    What the graph of the other mode calls with the same arguments is taken instead, unless it is in `used`.
    """
    owner, _, leaf = name.rpartition(".")
    for number in count():
        call = f"{name}{number or ''}"
        known = getattr(model.get_submodule(owner), f"{leaf}{number or ''}", None)
        if known is None:
            model.add_submodule(call, function)
            return call
        if call not in used and isinstance(known, ScaledFunction) and known.is_like(function):
            return call
    raise AssertionError("unreachable")


def grid_of_call(node: fx.Node, selection: Selection) -> BlockGrid | None:
    """The grid that `selection` asks for on the weight of `node`, or None where the call is left alone.

    Raises:
        TypeError: the call is selected and its weight is not floating-point.
    """
    if node.op != "call_function" or node.target not in FUNCTIONS or why_unscalable_call(node):
        return None
    model = node.graph.owning_module
    assert model is not None
    kind = FUNCTIONS[node.target][0]
    arguments = arguments_of(node)
    name = str(arguments["weight"].target)
    block_size = selection.block_size_of(model.get_submodule(name.rpartition(".")[0]), name, kind)
    if block_size is None:
        return None
    weight = get_attribute(model, name)
    check_weight(weight, name)
    transposed = kind.__name__.startswith("ConvTranspose")
    return BlockGrid.of(tuple(weight.shape), block_size, arguments.get("groups", 1), transposed)
