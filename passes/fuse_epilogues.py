"""act(conv(x) + r) -> packed conv(x, residual=r, activation=act), and the same without r or without act.

Every conv of a ResNet ends in one of these; in the conv's own loop they cost no pass over memory. The value in
between must have no other reader, and nothing may be written in place between the conv and the add, whose
place in the order the conv takes.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module, replace
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes.lowering import Lowering

ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
}
FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.leaky_relu: "leaky_relu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}


def fuse_epilogues(model: fx.GraphModule, lowering: Lowering) -> None:
    """Fuse residual adds and activations into the packed convs before them."""
    calls = Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")
    for node in reversed(list(model.graph.nodes)):
        if isinstance(called_module(node), PackedConv) and calls[str(node.target)] == 1:
            fuse_activation(fuse_add(node))


def fuse_add(conv: fx.Node) -> fx.Node:
    """Fuse the add that alone reads `conv` into it; returns the node that calls the conv now."""
    add = next(iter(conv.users), None)
    if add is None or len(conv.users) > 1 or add.target not in ADDS or add.kwargs or len(add.args) != 2:
        return conv
    left, right = add.args
    other = right if left is conv else left
    if not isinstance(other, fx.Node) or other is conv or (right is conv and writes_in_place(add)):
        return conv
    between = conv.next
    while between is not add:
        if writes_in_place(between):
            return conv
        between = between.next
    with add.graph.inserting_before(add):
        fused = add.graph.call_module(str(conv.target), (conv.args[0], other))
    replace(add, fused)
    conv.graph.erase_node(conv)
    return fused


def fuse_activation(conv: fx.Node) -> None:
    """Fuse the activation that alone reads `conv` into it."""
    node = next(iter(conv.users), None)
    found = None if node is None or len(conv.users) > 1 else activation_of(node)
    if node is None or found is None:
        return
    layer = called_module(conv)
    assert isinstance(layer, PackedConv)
    layer.activation, layer.negative_slope = found
    node.replace_all_uses_with(conv)
    node.graph.erase_node(node)


def activation_of(node: fx.Node) -> tuple[str, float] | None:
    """(activation, negative slope) that `node` applies to its first argument, or None."""
    module = called_module(node)
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        name = None if hooked else MODULES.get(type(module))
        return None if name is None else (name, float(getattr(module, "negative_slope", 0.01)))
    name = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None  # type: ignore
    if name is None:
        return None
    slope = node.kwargs.get("negative_slope", node.args[1] if name == "leaky_relu" and node.args[1:] else 0.01)
    return (name, float(slope)) if isinstance(slope, int | float) else None


def writes_in_place(node: fx.Node) -> bool:
    """True where `node` may change a tensor that it reads."""
    module = called_module(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return (name.startswith("i") and hasattr(operator, name[1:])) or name == "setitem"
    inplace = node.kwargs.get("inplace", any(argument is True for argument in node.args))
    return bool(inplace) or (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs
