"""Reading and editing the nodes of a graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from types import BuiltinFunctionType
from typing import Any

from torch import Tensor, fx, nn

from fxdbsr.nn.scaled import ScaledFunction


def called_module(node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, or None."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def functional_scales(parts: Iterable[fx.GraphModule]) -> list[Tensor]:
    """The scales of the functional convs of `parts`, which are parameters of modules that know nothing of them."""
    nodes = [node for part in parts for node in part.graph.nodes if isinstance(called_module(node), ScaledFunction)]
    return [get_attribute(node.graph.owning_module, str(node.args[2].target)) for node in nodes]


def get_attribute(root: nn.Module, target: str) -> Any:
    """`root.a.b.c` for the target "a.b.c" of a get_attr node."""
    found: Any = root
    for name in target.split("."):
        found = getattr(found, name)
    return found


def writes_in_place(node: fx.Node) -> bool:
    """True where `node` may change a tensor that it reads; functions from outside of torch may (`fx.wrap`)."""
    module = called_module(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return (name.startswith("i") and hasattr(operator, f"__{name[1:]}__")) or name == "setitem"
    if name == "__setitem__" or (name.startswith("__i") and hasattr(operator, f"__{name[3:]}")):
        return True
    if node.op == "call_function" and not _is_known(node.target):
        return True
    inplace = node.kwargs.get("inplace", any(argument is True for argument in node.args))
    return bool(inplace) or (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs


def _is_known(function: Any) -> bool:
    """True for functions of torch and Python, whose names tell what they write."""
    module = str(getattr(function, "__module__", None) or "")
    return isinstance(function, BuiltinFunctionType) or module.split(".")[0] in ("torch", "builtins", "math")


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let every reader of `node` read `new`, and erase `node`."""
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    node.graph.erase_node(node)
